"""Reading rows into tokenised documents, in file order, each counted as kept or dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from shared.data.conversation import Dropped
from shared.data.formats import with_format
from shared.data.inspect import check_usable
from shared.data.keys import Keys
from shared.data.reader import Row
from shared.data.tally import Counts, Tally
from shared.events import Control, Entry, EventSink
from shared.spec import DataFormat
from worker.training.encode import Encoded, RowSpec, encode_rows
from worker.training.templates import Template
from worker.training.tokenize import Tokens

SECONDS_BETWEEN_LOGS = 5.0


class Document(NamedTuple):
    """A row that can be trained on.

    Attributes:
        said: 64 bits of what is said, for the split.
    """

    counts: Counts
    said: int
    tokens: Tokens


# Keeps a usable row somewhere (None), or drops it for a reason of the job's.
Take = Callable[[Document], Dropped | None]


@dataclass(frozen=True)
class Collector:
    """How the rows of a job are read: up to `max_samples` usable ones of at most `limit` tokens."""

    tokenizer: Any
    template: Template
    limit: int
    cuts: bool
    max_samples: int | None
    drop_unparsable: bool
    sink: EventSink
    control: Control

    def collect(self, asked: DataFormat, rows: Iterator[Row], tally: Tally, take: Take) -> str:
        """Give what can be used to `take`; returns the format.

        Raises:
            DatasetError: nothing was kept.
        """
        data_format, every = with_format(rows, asked)
        spec = RowSpec(
            self.tokenizer, self.template, self.limit, self.cuts, data_format, self.drop_unparsable
        )
        told = time.monotonic()
        seen = Keys()
        for row in encode_rows(every, spec, self.control):
            if tally.used == self.max_samples:
                break
            tally.read += 1
            if time.monotonic() - told > SECONDS_BETWEEN_LOGS:
                told = time.monotonic()
                self.sink.log(Entry(f"Preparing data: {tally.read:,} rows read, {tally.used:,} used."))
            found = _usable(row, self.limit, seen)
            refused = found if isinstance(found, Dropped) else take(found)
            if refused is not None:
                tally.drop(refused)
            elif isinstance(found, Document):
                tally.keep(found.counts)
                for note in found.tokens.notes:
                    tally.note(note, found.counts.line)
        check_usable(tally)
        return data_format


def _usable(row: Encoded | Dropped, limit: int, seen: Keys) -> Document | Dropped:
    """
    Args:
        seen: the keys of the rows before, to which this one's is added.
    """
    if isinstance(row, Dropped):
        return row
    line = row.counts.line
    if not seen.add(row.key):
        return Dropped("duplicate", line)
    if isinstance(row.tokens, str):
        return Dropped(row.tokens, line)
    if not row.tokens.trained.any():
        return Dropped("nothing_to_train_on", line)
    if len(row.tokens.ids) > limit:
        return Dropped("too_long", line)
    return Document(row.counts, row.said, row.tokens)
