"""Rows of a data file, one at a time, in bounded memory: JSONL, JSON array, CSV, Parquet, gzip and zstd.

What a file is, its first bytes tell; its name is never asked.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from shared.data.depth import MAX_DEPTH, is_too_deep
from shared.data.packed import PARQUET_MAGIC, parquet_rows, unpacked, without_filled
from shared.errors import DatasetError

MAX_ROW_BYTES = 16 * 2**20

Row = tuple[int, dict[str, Any]]

_DECODER = json.JSONDecoder()
_WHITE_SPACE = re.compile(r"[ \t\r\n]*")
_KINDS = {list: "an array", str: "a text", int: "a number", float: "a number", bool: "true or false"}
_DELIMITERS = (",", "\t", ";")
# A CSV of one column has no delimiter to be known by.
_ONLY_COLUMNS = ("text", "chat", "messages", "conversations", "conversation")
_FOREIGN = {
    b"PK\x03\x04": "a zip archive: unpack it, or use gzip or zstd",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
    b"ARROW1": "an Arrow file: save it as Parquet or JSONL",
    b"BZh": "a bzip2 file: use gzip or zstd",
    b"\xfd7zXZ": "an xz file: use gzip or zstd",
    b"%PDF": "a PDF",
}


def read_rows(path: Path) -> Iterator[Row]:
    """Every row with its 1-based line (JSONL, CSV) or number (JSON array, Parquet).

    Memory stays below a few times `MAX_ROW_BYTES`, whatever the file.

    Raises:
        DatasetError: the file is empty, binary, broken or too greedy; `line` says where.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(PARQUET_MAGIC):
        yield from _parquet(path)
        return
    chunks = unpacked(path)
    begin = next(chunks, b"")
    if begin.startswith(PARQUET_MAGIC):
        # Parquet is read from its end, so it has to be unpacked first.
        with tempfile.NamedTemporaryFile(prefix="tuneyard-") as file:
            file.writelines(chain([begin], chunks))
            file.flush()
            yield from _parquet(Path(file.name))
        return
    chunks = chain([begin], chunks)
    start, skipped = _first_text(chunks)
    match start.lstrip()[:1]:
        case b"":
            raise DatasetError("The file is empty: it holds nothing but white space.")
        case b"{":
            yield from _json_lines(chain([start], chunks), skipped)
        case b"[":
            yield from _json_array(chain([start], chunks), skipped)
        case _:
            yield from _csv_rows(chain([start], chunks), skipped)


def _parquet(path: Path) -> Iterator[Row]:
    for number, row in parquet_rows(path, MAX_ROW_BYTES):
        row = _checked(row, f"row {number}", number, "")
        yield number, {name: without_filled(cell) for name, cell in row.items()}


def _first_text(chunks: Iterator[bytes]) -> tuple[bytes, int]:
    """The first chunk that isn't all white space, without a BOM, and how many lines lie before it.

    Raises:
        DatasetError: the file is something else than UTF-8 text.
    """
    start = next(chunks, b"")
    for magic, name in _FOREIGN.items():
        if start.startswith(magic):
            raise DatasetError(f"The file is {name}.")
    start = start.removeprefix(codecs.BOM_UTF8)
    skipped = 0
    while start and not start.strip():
        skipped += start.count(b"\n")
        start = next(chunks, b"")
    if b"\0" in start:
        raise DatasetError("The file is binary: wanted are JSONL, a JSON array, CSV or Parquet.")
    return start, skipped


def _lines(chunks: Iterable[bytes], skipped: int) -> Iterator[tuple[int, str]]:
    """The lines that are not empty, decoded, with their 1-based numbers."""
    number, rest = skipped, b""
    for chunk in chain(chunks, (None,)):
        parts = [rest] if chunk is None else (rest + chunk).split(b"\n")
        rest = b"" if chunk is None else parts.pop()
        for part in parts:
            number += 1
            if len(part) > MAX_ROW_BYTES:
                raise _too_long(number)
            if part and not part.isspace():
                yield number, _decoded(part, number)
        if len(rest) > MAX_ROW_BYTES:
            raise _too_long(number + 1)


def _json_lines(chunks: Iterable[bytes], skipped: int) -> Iterator[Row]:
    for number, line in _lines(chunks, skipped):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DatasetError(
                f"Not valid JSON at line {number}: {error.msg} (column {error.colno}).", number
            ) from None
        except (ValueError, RecursionError) as error:
            raise _unreadable(f"line {number}", error, number) from None
        yield number, _checked(row, f"line {number}", number, line)


def _json_array(chunks: Iterable[bytes], skipped: int) -> Iterator[Row]:
    """The elements of one array, each decoded as soon as it is complete."""
    buffer = _Buffer(chunks, skipped + 1)
    buffer.skip(1)
    number = 0
    first = True
    while (mark := buffer.peek()) != "]":
        if not first:
            if mark != ",":
                raise buffer.broken(f"wanted ',' or ']' after row {number}")
            buffer.skip(1)
        first = False
        number += 1
        line = buffer.line
        row, text = buffer.value(number)
        yield number, _checked(row, f"row {number} (line {line})", line, text)
    buffer.skip(1)
    if buffer.peek():
        raise buffer.broken("something follows the array's end")


class _Buffer:
    """A text that is read as far as it is needed."""

    def __init__(self, chunks: Iterable[bytes], line: int) -> None:
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = line

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            match = _WHITE_SPACE.match(self._text, self._at)
            if match and match.end() > self._at:
                self.skip(match.end() - self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self, count: int) -> None:
        if not self._text:
            self.peek()
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def value(self, number: int) -> tuple[Any, str]:
        """The JSON value that comes next, and its text."""
        self.peek()
        wanted = 0
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                line = self.line + error.doc.count("\n", self._at, error.pos)
                # Broken, or not all there yet: each attempt has twice the text of the one before.
                wanted = max(wanted, 2 * (len(self._text) - self._at))
                if len(self._text) - self._at > MAX_ROW_BYTES:
                    raise _too_long(self.line, f"row {number} (line {self.line})") from None
                if not self._more(wanted):
                    raise DatasetError(
                        f"Not valid JSON in row {number} of the array, at line {line}: {error.msg}.", line
                    ) from None
                continue
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"row {number} (line {self.line})", error, self.line) from None
            text = self._text[self._at : end]
            self.skip(end - self._at)
            return value, text

    def broken(self, what: str) -> DatasetError:
        return DatasetError(f"The JSON array is broken at line {self.line}: {what}.", self.line)

    def _more(self, wanted: int = 1) -> bool:
        """Append text until `wanted` characters are there; False if nothing could be added."""
        pieces = [self._text[self._at :]]
        length = len(pieces[0])
        before = length
        while length < max(wanted, before + 1) and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            try:
                pieces.append(self._decoder.decode(chunk, final=self._ended))
            except UnicodeDecodeError as error:
                line = self.line + sum(piece.count("\n") for piece in pieces)
                raise _not_utf8(error, line + chunk[: error.start].count(b"\n")) from None
            length += len(pieces[-1])
        self._text, self._at = "".join(pieces), 0
        return length > before


def _csv_rows(chunks: Iterable[bytes], skipped: int) -> Iterator[Row]:
    lines = _CsvLines(chunks, skipped)
    header = next((line for line in lines if line.strip()), "\n")
    skipped = lines.number - 1
    delimiter = max(_DELIMITERS, key=header.count)
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader)]
        if len(names) < 2 and (names or [""])[0] not in _ONLY_COLUMNS:
            raise DatasetError(
                "The file is neither JSON nor a CSV with a header: its first line is "
                f"{header.strip()[:80]!r}. Wanted are JSONL, a JSON array, CSV or Parquet.",
                skipped + 1,
            )
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise DatasetError(f"The CSV has two columns with the name {twice[0][:80]!r}.", skipped + 1)
        before = reader.line_num
        for cells in reader:
            lines.taken = 0
            number, before = skipped + before + 1, reader.line_num
            if not cells:
                continue
            if len(cells) != len(names):
                raise DatasetError(
                    f"The row at line {number} has {len(cells)} cells, but the header has {len(names)}.",
                    number,
                )
            row = dict(zip(names, cells, strict=True))
            yield number, _checked(row, f"line {number}", number, "")
    except csv.Error as error:
        number = skipped + reader.line_num
        raise DatasetError(f"Not valid CSV at line {number}: {error}.", number) from None


class _CsvLines:
    """Lines with their ends, empty ones too: a quoted cell may hold them.

    Attributes:
        number: of the line given last, from 1.
        taken: characters since it was last set to 0, which must not become more than a row may have.
    """

    def __init__(self, chunks: Iterable[bytes], skipped: int) -> None:
        self._lines = self._decoded(chunks, skipped)
        self.number = skipped
        self.taken = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.taken += len(line)
        if self.taken > MAX_ROW_BYTES + len(line):
            raise _too_long(self.number)
        return line

    @staticmethod
    def _decoded(chunks: Iterable[bytes], skipped: int) -> Iterator[str]:
        number, rest = skipped, b""
        for chunk in chunks:
            *parts, rest = (rest + chunk).split(b"\n")
            for part in parts:
                number += 1
                yield _decoded(part, number) + "\n"
            if len(rest) > MAX_ROW_BYTES:
                raise _too_long(number + 1)
        if rest:
            yield _decoded(rest, number + 1)


def _checked(row: Any, where: str, line: int, text: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DatasetError(f"Not a JSON object but {_KINDS.get(type(row), 'null')} at {where}.", line)
    if is_too_deep(row, text or None):
        raise DatasetError(f"Nested more than {MAX_DEPTH} levels deep at {where}.", line)
    return row


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, number) from None


def _not_utf8(error: UnicodeDecodeError, line: int) -> DatasetError:
    byte = error.object[error.start]
    return DatasetError(f"Not UTF-8 text at line {line} (byte 0x{byte:02x}): save the file as UTF-8.", line)


def _too_long(line: int, where: str = "") -> DatasetError:
    limit = MAX_ROW_BYTES // 2**20
    return DatasetError(
        f"The row at {where or f'line {line}'} is longer than {limit} MiB, the most that a row may have.",
        line,
    )


def _unreadable(where: str, error: Exception, line: int) -> DatasetError:
    deep = isinstance(error, RecursionError)
    return DatasetError(
        f"Nested more than {MAX_DEPTH} levels deep at {where}."
        if deep
        else f"The row at {where} can't be read: {error}.",
        line,
    )
