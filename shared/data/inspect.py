"""What can be said about a data file without a model: used when it is uploaded, and by `datasets inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.data.chatml import TrainOn, render
from shared.data.conversation import Conversation, Dropped
from shared.data.formats import conversations, parse_row
from shared.data.keys import Keys
from shared.data.reader import Row, read_rows
from shared.data.tally import Tally, counts_of
from shared.errors import DatasetError

QUANTILES = {"min": 0, "p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1}


@dataclass(frozen=True)
class DatasetReport:
    """A file's rows, counted.

    Attributes:
        characters: of all usable rows as ChatML.
        trained_characters: of those, what is trained.
        quantiles: characters of one row, by quantile (`"p50"`, …, `"max"`).
    """

    format: str
    tally: Tally
    characters: int = 0
    trained_characters: int = 0
    quantiles: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            **self.tally.to_json(),
            "characters": self.characters,
            "trained_characters": self.trained_characters,
            "characters_per_row": self.quantiles,
        }


def inspect_file(path: Path, data_format: str = "auto", train_on: TrainOn = "assistant") -> DatasetReport:
    """Reads the whole file once.

    Raises:
        DatasetError: a file that can't be used at all: not readable, no known format, no usable row.
    """
    return inspect_rows(read_rows(path), data_format, train_on)


def inspect_rows(
    rows: Iterable[Row], data_format: str = "auto", train_on: TrainOn = "assistant"
) -> DatasetReport:
    """As `inspect_file`, for rows from anywhere."""
    found, parsed = conversations(rows, data_format)
    tally = Tally()
    seen = Keys()
    # Lengths are counted in a table: a file of millions of rows has far fewer different lengths.
    lengths: dict[int, int] = {}
    trained_characters = 0
    for row in parsed:
        tally.read += 1
        usable = unique(row, seen)
        if isinstance(usable, Dropped):
            tally.drop(usable)
            continue
        spans = render(usable, train_on)
        trained = sum(len(span.text) for span in spans if span.trained)
        if not trained:
            tally.drop(Dropped("nothing_to_train_on", usable.line))
            continue
        tally.keep(counts_of(usable))
        trained_characters += trained
        length = sum(len(span.text) for span in spans)
        lengths[length] = lengths.get(length, 0) + 1
    check_usable(tally)
    total = sum(length * count for length, count in lengths.items())
    return DatasetReport(found, tally, total, trained_characters, _quantiles(lengths))


def first_usable(path: Path, data_format: str, train_on: TrainOn = "assistant") -> Conversation:
    """The first row that `inspect_file` counts as used.

    Raises:
        DatasetError: there is none.
    """
    for row in conversations(read_rows(path), data_format)[1]:
        if isinstance(row, Conversation) and any(s.trained and s.text for s in render(row, train_on)):
            return row
    raise DatasetError("The file holds no row that can be used.")


def row_at(path: Path, data_format: str, line: int) -> Conversation | Dropped:
    """The row with this number in reports: a line (JSONL, CSV), or a place (JSON array, Parquet).

    Raises:
        DatasetError: no row begins there, or the file is broken before.
    """
    for number, row in read_rows(path):
        if number == line:
            return parse_row(row, data_format, line)
        if number > line:
            break
    raise DatasetError(f"No row begins at line {line}.", line)


def unique(row: Conversation | Dropped, seen: Keys) -> Conversation | Dropped:
    """The row, or Dropped if an earlier one said the same; `seen` keeps the keys."""
    if isinstance(row, Dropped):
        return row
    return row if seen.add(row.key()) else Dropped("duplicate", row.line)


def check_usable(tally: Tally) -> None:
    """
    Raises:
        DatasetError: no row was kept; it names the commonest reason and the first line.
    """
    if tally.used:
        return
    reason, counted = max(tally.dropped.items(), key=lambda item: item[1].count)
    meaning = tally.to_json()["dropped"][reason]["meaning"]
    raise DatasetError(
        f"None of the {tally.read} rows can be used. Most often ({counted.count} rows): {meaning}.",
        line=counted.lines[0],
    )


def _quantiles(lengths: dict[int, int]) -> dict[str, int]:
    """Nearest-rank quantiles of a table of length -> rows."""
    rows = sum(lengths.values())
    found: dict[str, int] = {}
    for name, quantile in QUANTILES.items():
        rank, passed = max(1, math.ceil(quantile * rows)), 0
        for length in sorted(lengths):
            passed += lengths[length]
            if passed >= rank:
                found[name] = length
                break
    return found
