"""The report on a file, made without a model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shared.data.chatml import render
from shared.data.conversation import Dropped
from shared.data.formats import parse_row
from shared.data.inspect import first_usable, inspect_file, row_at
from shared.errors import DatasetError


def chat(question: Any, answer: Any, **more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    }


def inspected(path: Path, rows: list[dict[str, Any]], data_format: str = "auto") -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    report = inspect_file(path, data_format).to_json()
    assert json.loads(json.dumps(report)) == report
    return report


def test_every_row_is_counted_once(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    rows = [
        chat("q", "a"),
        chat("q ", "a"),
        {**chat("q", None, tool_calls=[call, call]), "tools": [{"name": "f"}]},
        chat(1, "a"),
        chat("q", "a", weight=0),
        chat("q", ""),
        chat("", ""),
        *[chat(f"q{number}", "x" * number) for number in range(1, 101)],
    ]
    report = inspected(tmp_path / "rows", rows)
    assert report["format"] == "messages"
    assert (report["rows_read"], report["rows_used"], report["rows_dropped"]) == (107, 102, 5)
    assert {reason: found["lines"] for reason, found in report["dropped"].items()} == {
        "duplicate": [2],
        "not_text": [4],
        "nothing_to_train_on": [5, 6],
        "empty": [7],
    }
    assert all(found["meaning"] for found in report["dropped"].values())
    assert (report["calls"], report["rows_with_tools"], report["tools"]) == (2, 1, 1)
    assert report["turns"] == 2 * 101 + 3


def test_characters_are_those_of_the_rendered_rows(tmp_path: Path) -> None:
    rows = [chat("question", "a" * number) for number in range(1, 11)]
    report = inspected(tmp_path / "rows", rows)
    spans = [render(parse_row(row, "messages", 1)) for row in rows]
    lengths = [sum(len(span.text) for span in row) for row in spans]
    assert report["characters"] == sum(lengths)
    assert report["trained_characters"] == sum(number + len("<|im_end|>") for number in range(1, 11))
    assert report["characters_per_row"] == {
        "min": lengths[0], "p50": lengths[4], "p90": lengths[8], "p95": lengths[9], "p99": lengths[9],
        "max": lengths[9],
    }  # fmt: skip


def test_only_the_first_lines_of_many_are_kept(tmp_path: Path) -> None:
    report = inspected(tmp_path / "rows", [chat("q", "a")] * 50)
    assert report["dropped"]["duplicate"]["count"] == 49
    assert report["dropped"]["duplicate"]["lines"] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("rows", "data_format", "message", "line"),
    [
        ([], "auto", "empty", None),
        ([{"a": 1}], "auto", "columns a, which fit no known format", None),
        ([chat("", "")], "auto", "None of the 1 rows can be used", 1),
        ([{"b": 1}, *[{"messages": 1}] * 3], "messages", r"Most often \(3 rows\): a number, object", 2),
        ([chat("q", "a")], "alpaca", "lacks the columns", 1),
    ],
)
def test_a_file_that_cannot_be_used(
    tmp_path: Path, rows: list[dict[str, Any]], data_format: str, message: str, line: int | None
) -> None:
    with pytest.raises(DatasetError, match=message) as failure:
        inspected(tmp_path / "rows", rows, data_format)
    assert failure.value.line == line


def test_hostile_rows_are_read_in_time(tmp_path: Path) -> None:
    half = '{"name": "f", "arguments": \'{"a": {"b": 1,'
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "assistant", "content": "x"}] * 100_000},
        {
            "chat": "USER: x\n\n\nASSISTANT: y" * 50_000,
            "messages": [{"role": "tool", "content": "\n" * 10**6}],
        },
        {"messages": [{"role": "system", "content": "\n{" * 300_000}, {"role": "assistant", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": f"<functioncall> {half} " * 2000}]},
        {"tools": [{"name": "f"}] * 50_000, **chat("q", "a")},
        chat("<|im_end|>" * 100_000, "<|endoftext|>" * 100_000),
    ]
    began = time.process_time()
    report = inspected(tmp_path / "rows", rows)
    glaive = [{"chat": f"USER: x\n\n\nASSISTANT: <functioncall> {half * 20}'}} <|endoftext|>" * 500}]
    assert inspected(tmp_path / "rows", glaive)["rows_used"] == 1
    assert time.process_time() - began < 20
    assert report["rows_read"] == 6


def test_everything_is_trained_on_where_that_is_asked_for(tmp_path: Path) -> None:
    question = {"messages": [{"role": "user", "content": "q"}]}
    (tmp_path / "rows").write_text(json.dumps(question), encoding="utf-8")
    with pytest.raises(DatasetError, match="no assistant turn with text"):
        inspect_file(tmp_path / "rows")
    report = inspect_file(tmp_path / "rows", train_on="all")
    assert report.trained_characters == report.characters > 0


def test_rows_are_found_by_the_numbers_of_the_report(tmp_path: Path) -> None:
    rows = [{"messages": []}, chat("a", ""), chat("b", "c"), chat("d", "e")]
    (tmp_path / "lines").write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (tmp_path / "array").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    for name, third in (("lines", 5), ("array", 3)):
        file = tmp_path / name
        assert first_usable(file, "messages") == row_at(file, "messages", third)
        assert row_at(file, "messages", third) == parse_row(rows[2], "messages", third)
        assert row_at(file, "messages", 1) == Dropped("empty", 1)
    for absent in (2, 8):
        with pytest.raises(DatasetError, match=f"No row begins at line {absent}"):
            row_at(tmp_path / "lines", "messages", absent)
