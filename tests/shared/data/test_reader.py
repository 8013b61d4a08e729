"""Files of every kind, and files that are out to break the reader."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tempfile
import time
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.data import packed, reader
from shared.data.parquet_pages import largest_pages, row_groups
from shared.data.reader import read_rows
from shared.errors import DatasetError

ROWS: list[dict[str, Any]] = [{"text": f"row {n} °C 👍", "n": n} for n in range(1, 8)]


def rows_of(path: Path, content: bytes) -> list[tuple[int, dict[str, Any]]]:
    path.write_bytes(content)
    return list(read_rows(path))


def jsonl(rows: list[dict[str, Any]], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    plain = [jsonl(ROWS), jsonl(ROWS, "\r\n"), b"\xef\xbb\xbf" + jsonl(ROWS), jsonl(ROWS).rstrip()]
    arrays = [json.dumps(ROWS).encode(), json.dumps(ROWS, indent=2, ensure_ascii=False).encode()]
    table = tmp_path / "table"
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    for content in [*plain, *arrays, table.read_bytes()]:
        for form in (
            content,
            gzip.compress(content),
            gzip.compress(content[:9]) + gzip.compress(content[9:]),
        ):
            if form is content or not content.startswith(b"PAR1"):
                assert rows_of(tmp_path / "file", form) == list(enumerate(ROWS, 1))


def test_zstd(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(jsonl(ROWS))
    assert rows_of(tmp_path / "file", sink.getvalue().to_pybytes()) == list(enumerate(ROWS, 1))
    cut = sink.getvalue().to_pybytes()[:-9]
    with pytest.raises(DatasetError, match="damaged or cut off"):
        rows_of(tmp_path / "file", cut)


def test_zstd_that_begins_with_a_frame_to_skip(tmp_path: Path) -> None:
    frame = b"\x5a\x2a\x4d\x18\x04\0\0\0abcd"
    assert rows_of(tmp_path / "file", frame + zstd(jsonl(ROWS))) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_csv_with_quotes_and_line_breaks_in_cells(tmp_path: Path, delimiter: str) -> None:
    lines = ["instruction,input,output", '"say ""hi"", now","two\nlines",°C', "", "a,,b"]
    content = "\r\n".join(line.replace(",", delimiter) for line in lines).encode()
    expected = [
        (2, {"instruction": f'say "hi"{delimiter} now', "input": "two\nlines", "output": "°C"}),
        (5, {"instruction": "a", "input": "", "output": "b"}),
    ]
    assert rows_of(tmp_path / "file", content) == expected


def test_empty_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    content = b"\n\n \r\n" + jsonl(ROWS[:1]) + b"\n\n" + jsonl(ROWS[1:2])
    assert rows_of(tmp_path / "file", content) == [(4, ROWS[0]), (7, ROWS[1])]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", None, "empty"),
        (b" \n\n\t\n", None, "empty"),
        (jsonl(ROWS[:6]) + b'{"a": }\n' + jsonl(ROWS), 7, r"Not valid JSON at line 7: .* \(column 7\)"),
        (jsonl(ROWS[:1]) + b"[1]\n", 2, "Not a JSON object but an array at line 2"),
        (jsonl(ROWS[:1]) + b"null\n", 2, "Not a JSON object but null at line 2"),
        (jsonl(ROWS[:1]) + b'{"a": "\xe9"}\n', 2, "Not UTF-8 text at line 2 .byte 0xe9."),
        (jsonl(ROWS[:1]) + b'{"a": 1' + b"0" * 5000 + b"}\n", 2, "The row at line 2 can't be read"),
        (jsonl(ROWS[:1]) + b'{"a": "x\0y"}\n', None, "binary"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}\n", 1, "Nested more than 100 levels deep at line 1"),
        (b'{"a": ' + b"[" * 150 + b"]" * 150 + b"}\n", 1, "Nested more than 100 levels deep"),
        (b'[{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}]", 1, "Nested more than 100 levels deep"),
        (b'[\n{"a": 1},\n{"a": }\n]', 3, "Not valid JSON in row 2 of the array, at line 3: "),
        (b'[{"a": 1}\n{"a": 2}]', 2, "wanted ',' or ']' after row 1"),
        (b'[{"a": 1},\n{"a"', 2, "row 2 of the array, at line"),
        (b'[{"a": 1},', 1, "row 2 of the array, at line"),
        (b'[{"a": 1}] x', 1, "something follows"),
        (b'[{"a": 1}, 5]', 1, "Not a JSON object but a number at row 2 .line 1."),
        ("[{'a': \"\xe9\"}]".encode("latin-1"), 1, "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), None, "UTF-16"),
        (b"just a line of text\n", 1, "neither JSON nor a CSV"),
        (b'a,b\n1,2\n3\n', 3, "The row at line 3 has 1 cells, but the header has 2"),
        (b'a,b\n1,"2\n', 2, "Not valid CSV at line 2: "),
        (b"PK\x03\x04zip", None, "zip archive"),
        (b"%PDF-1.7", None, "PDF"),
        (b"\x7fELF\0\0\0", None, "binary"),
        (gzip.compress(jsonl(ROWS), mtime=0)[:-12], None, "damaged or cut off"),
        (gzip.compress(b"", mtime=0)[:5], None, "damaged or cut off"),
        (b"PAR1" + b"\x01" * 50, None, "Parquet file is damaged"),
    ],
)  # fmt: skip
def test_a_broken_file_says_where(tmp_path: Path, content: bytes, line: int | None, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as failure:
        rows_of(tmp_path / "file", content)
    assert failure.value.line == line


def test_rows_before_the_broken_one_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(jsonl(ROWS[:3]) + b"{\n")
    rows = read_rows(tmp_path / "file")
    assert [next(rows)[0] for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DatasetError, match="line 4"):
        next(rows)


def test_nulls_that_parquet_fills_into_structs_are_left_out(tmp_path: Path) -> None:
    rows = [
        {
            "text": None,
            "messages": [{"role": "assistant", "tool_calls": [{"name": name, "arguments": {key: 1}}]}],
            "tools": [{"name": name, "parameters": {"properties": {key: {"type": "string"}}}}],
        }
        for name, key in (("f", "city"), ("g", "amount"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "file")
    assert list(read_rows(tmp_path / "file")) == list(enumerate(rows, 1))


def test_a_parquet_file_that_is_cut_off(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS * 1000), tmp_path / "whole")
    with pytest.raises(DatasetError, match="damaged or cut off"):
        rows_of(tmp_path / "file", (tmp_path / "whole").read_bytes()[:-40])


@pytest.mark.parametrize("pages", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}])
def test_a_parquet_page_that_is_too_large_is_never_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: dict[str, Any]
) -> None:
    path = tmp_path / "file"
    pq.write_table(pa.table({"text": ["x" * 2**24] * 4}), path, compression="zstd", **pages)
    monkeypatch.setattr(packed, "MAX_PAGES_BYTES", 2**23)
    pa.default_memory_pool().release_unused()
    before = pa.total_allocated_bytes()
    with pytest.raises(DatasetError, match=r"row group 1 .* unpack to more than .* smaller pages"):
        list(read_rows(path))
    assert pa.total_allocated_bytes() - before < 2**20


def test_the_pages_sizes_are_those_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    rows = [{"a": f"{n} é" * 9, "b": {"c": [n, None], "d": [{"e": str(n)}] * 3}} for n in range(5000)]
    for options in ({}, {"data_page_version": "2.0"}, {"use_dictionary": False, "data_page_size": 1000}):
        pq.write_table(pa.Table.from_pylist(rows), path, compression="gzip", **options)
        with path.open("rb") as file:
            group = pq.ParquetFile(path).metadata.row_group(0)
            (told,) = row_groups(file)
            found = largest_pages(file, told.columns)
        columns = [group.column(number) for number in range(group.num_columns)]
        # One page holds all of a column here, but where pages are small.
        total = sum(column.total_uncompressed_size for column in columns)
        assert 0 < found.unpacked <= total
        assert found.unpacked > total * (0.9 if "data_page_size" not in options else 0.01)
        assert found.both > found.unpacked
        assert [row for _, row in read_rows(path)] == [packed.without_filled(row) for row in rows]


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 3000), st.binary(min_size=1, max_size=8))
# Columns whose metadata pyarrow would end the process for.
@example(319, b"d")
@example(336, b"\x29")
def test_a_parquet_file_with_damage_anywhere_fails_clearly(at: int, junk: bytes) -> None:
    whole = bytearray(parquet_bytes())
    whole[at % len(whole) : at % len(whole) + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(whole)
        with contextlib.suppress(DatasetError):
            list(read_rows(path))


@cache
def parquet_bytes() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS * 5), stream)
    return stream.getvalue()


def test_long_parquet_rows_in_a_dictionary_are_unpacked_a_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "file"
    pq.write_table(pa.table({"text": pa.array(["x" * 2**22 + str(n % 2) for n in range(40)])}), path)
    assert path.stat().st_size < 2**20
    before = pa.default_memory_pool()
    largest = 0
    for _ in read_rows(path):
        largest = max(largest, before.bytes_allocated())
    assert largest < 150 * 2**20


def test_a_parquet_row_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_ROW_BYTES", 2**20)
    table = pa.table({"text": ["a" * 2**19] * 3 + ["b" * 2**21]})
    pq.write_table(table, tmp_path / "file")
    with pytest.raises(DatasetError, match="Row 4 of the Parquet file is longer than 1 MiB") as raised:
        list(read_rows(tmp_path / "file"))
    assert raised.value.line == 4


@pytest.mark.parametrize("opening", [b"", b"["])
def test_a_row_of_100_mb_is_refused_in_bounded_memory(tmp_path: Path, opening: bytes) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(opening + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(DatasetError, match=r"1\)? is longer than 16 MiB"):
        list(read_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2**20


def test_a_zip_bomb_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"\n" * 2**20)
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(DatasetError):
        list(read_rows(path))
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(b"\n" * (packed.ALWAYS_ALLOWED + 2**20))
    with pytest.raises(DatasetError, match="unpacks to more than"):
        list(read_rows(path))


def test_ten_million_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"\n" * 10_000_000, jsonl(ROWS[:1]) + b"\n" * 10_000_000 + jsonl(ROWS[1:2])):
        path.write_bytes(content)
        began = time.process_time()
        if content.startswith(b"\n"):
            with pytest.raises(DatasetError, match="empty"):
                list(read_rows(path))
        else:
            assert [line for line, _ in read_rows(path)] == [1, 10_000_002]
        assert time.process_time() - began < 20


def test_chunk_borders_fall_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 3, 7, 50):
        monkeypatch.setattr(packed, "CHUNK", size)
        for content in (jsonl(ROWS), json.dumps(ROWS, indent=1, ensure_ascii=False).encode()):
            assert rows_of(tmp_path / "file", content) == list(enumerate(ROWS, 1))


def test_long_rows_of_an_array_are_read_in_linear_time(tmp_path: Path) -> None:
    rows = [{"text": "x" * (reader.MAX_ROW_BYTES - 100)}] * 2
    began = time.process_time()
    assert len(rows_of(tmp_path / "file", json.dumps(rows).encode())) == 2
    assert time.process_time() - began < 10


def test_a_csv_row_that_never_ends_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    cell = b'"' + b"x" * 1000 + b"\n" + b"x" * 1000 + b'",'
    with path.open("wb") as file:
        file.write(b"prompt,completion\n" + b'"a","b"\n')
        # Each cell ends, but the row does not: there is a line break inside each.
        file.write(b'"')
        for _ in range(60_000):
            file.write(b'x\ny","' + cell[1:-2] + b"x")
    tracemalloc.start()
    rows = read_rows(path)
    assert next(rows)[0] == 2
    with pytest.raises(DatasetError, match="is longer than 16 MiB"):
        list(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2**20


def test_parquet_in_gzip_and_in_zstd(tmp_path: Path) -> None:
    for content in (gzip.compress(parquet_bytes()), zstd(parquet_bytes())):
        assert rows_of(tmp_path / "file", content) == list(enumerate(ROWS * 5, 1))
    with pytest.raises(DatasetError, match="damaged or cut off"):
        rows_of(tmp_path / "file", gzip.compress(parquet_bytes()[:-30]))


def test_a_csv_with_a_column_twice(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="two columns with the name 'text'"):
        rows_of(tmp_path / "file", b"text,text\na,b\n")


def test_a_csv_of_one_column_and_one_that_begins_with_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_text('\n\r\nchat\n"USER: a\n\n\nASSISTANT: b"\n"USER: c"\n', encoding="utf-8")
    assert list(read_rows(path)) == [(4, {"chat": "USER: a\n\n\nASSISTANT: b"}), (8, {"chat": "USER: c"})]
    path.write_text("some words\nand more\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="neither JSON nor a CSV"):
        list(read_rows(path))
    path.write_text("\u00a0\n", encoding="utf-8")
    with pytest.raises(DatasetError, match="neither JSON nor a CSV"):
        list(read_rows(path))


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "data"
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, path)
    assert list(read_rows(path)) == []
    with pq.ParquetWriter(path, table.schema) as writer:
        for texts in ([], ["a"], [], ["b"]):
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    assert list(read_rows(path)) == [(1, {"text": "a"}), (2, {"text": "b"})]
