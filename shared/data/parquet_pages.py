"""How large the pages of a Parquet file are, read from its footer and their headers before any is unpacked.

pyarrow unpacks a page as a whole and doesn't ask how large it gets, and of a damaged column its metadata ends
the process. Footer and headers are Thrift structs in the compact protocol; of their fields only the sizes and
places matter here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

from shared.errors import DatasetError

# Headers hold statistics, which writers keep short.
MAX_HEADER = 2**20
MAX_PAGES = 2**20
_FIRST_READ = 256
_DICTIONARY = 2
# Fields of the footer, of a row group, of a column, and of a column's metadata.
_ROW_GROUPS = 4
_COLUMNS, _ROWS = 1, 3
_METADATA = 3
_PACKED_SIZE, _FIRST_PAGE, _DICTIONARY_PAGE = 7, 9, 11
_DEEPEST = 16
# Integers of all widths are written alike, but a field of another kind than it should have does not count.
_INT, _LONG = 5, 6
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


class Largest(NamedTuple):
    """Bytes of the largest pages that are in memory at once: of each column one, and its dictionary.

    Attributes:
        unpacked: what one cell may have at most, too.
        both: with the packed pages beside them.
    """

    unpacked: int
    both: int


class Column(NamedTuple):
    """Where the pages of one column of a row group begin, and where they end."""

    start: int
    end: int


class RowGroup(NamedTuple):
    """A part of the file's rows."""

    rows: int
    columns: list[Column]


def row_groups(file: IO[bytes]) -> list[RowGroup]:
    """
    Raises:
        DatasetError: the footer is damaged, or columns are encrypted.
    """
    size = file.seek(-8, 2)
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(size - length, 0))
    try:
        return _Thrift(file.read(min(length, size))).row_groups()
    except IndexError:
        raise _damaged() from None


def largest_pages(file: IO[bytes], columns: list[Column]) -> Largest:
    """
    Args:
        columns: of one row group.

    Raises:
        DatasetError: the headers are damaged, or there are too many.
    """
    unpacked = both = pages = 0
    for at, end in columns:
        # Of data pages and of dictionaries, the largest: unpacked, and together with its packed form.
        most = {False: (0, 0), True: (0, 0)}
        while at < end:
            pages += 1
            if pages > MAX_PAGES:
                raise DatasetError(f"A row group of the Parquet file has more than {MAX_PAGES:,} pages.")
            kind, size, packed, length = _header(file, at)
            at += length + packed
            is_dictionary = kind == _DICTIONARY
            most[is_dictionary] = max(most[is_dictionary], (size, size + packed))
        unpacked += sum(size for size, _ in most.values())
        both += sum(size for _, size in most.values())
    return Largest(unpacked, both)


def _header(file: IO[bytes], at: int) -> tuple[int, int, int, int]:
    """Kind, bytes unpacked, bytes packed, and the header's own length."""
    length = _FIRST_READ
    while True:
        file.seek(at)
        text = file.read(length)
        try:
            fields, used = _Thrift(text).struct(_INT)
        except IndexError:
            if len(text) < length or length >= MAX_HEADER:
                raise _damaged() from None
            length *= 16
            continue
        kind, size, packed = fields.get(1), fields.get(2), fields.get(3)
        if kind is None or size is None or packed is None or size < 0 or packed < 0:
            raise _damaged()
        return kind, size, packed, used


class _Thrift:
    """Reads integers of structs and skips everything else; IndexError where the text ends before it."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def row_groups(self) -> list[RowGroup]:
        """Those of a footer. Of anything that stands there twice the last counts, as for pyarrow."""
        found: list[RowGroup] = []
        for number, kind in self._fields():
            if number == _ROW_GROUPS and kind in _LISTS:
                found = [self._row_group() for _ in range(self._list()[0])]
            else:
                self._skip_field(kind, 0)
        return found

    def _row_group(self) -> RowGroup:
        rows, columns = 0, []
        for number, kind in self._fields():
            if number == _COLUMNS and kind in _LISTS:
                columns = [self._column() for _ in range(self._list()[0])]
            elif number == _ROWS and kind == _LONG:
                rows = self._integer()
            else:
                self._skip_field(kind, 1)
        return RowGroup(rows, columns)

    def _column(self) -> Column:
        told: dict[int, int] = {}
        for number, kind in self._fields():
            if number == _METADATA and kind == _STRUCT:
                told |= self.struct(_LONG, 2)[0]
            else:
                self._skip_field(kind, 2)
        start, size = told.get(_FIRST_PAGE, -1), told.get(_PACKED_SIZE, -1)
        # An encrypted column has no metadata.
        if start < 0 or size < 0:
            raise _damaged()
        start = min(start, told.get(_DICTIONARY_PAGE) or start)
        return Column(start, start + size)

    def _fields(self) -> Iterator[tuple[int, int]]:
        """Number and kind of each field of a struct; who asks reads its value before the next."""
        number = 0
        while (head := self._byte()) != 0:
            step = head >> 4
            number = number + step if step else self._integer()
            yield number, head & 15

    def _list(self) -> tuple[int, int]:
        """How many values of a list follow, and of which kind."""
        head = self._byte()
        return head >> 4 if head >> 4 < 15 else self._varint(), head & 15

    def struct(self, integers: int, depth: int = 0) -> tuple[dict[int, int], int]:
        """Its fields of this kind of integer, and where the text goes on."""
        fields: dict[int, int] = {}
        if depth > _DEEPEST:
            raise _damaged()
        for number, kind in self._fields():
            if kind == integers:
                fields[number] = self._integer()
            else:
                self._skip_field(kind, depth)
        return fields, self._at

    def _skip_field(self, kind: int, depth: int) -> None:
        # A struct's booleans are in their kind.
        if kind not in _BOOLEANS:
            self._skip(kind, depth)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (*_BOOLEANS, _BYTE):
            self._forward(1)
        elif kind in _INTEGERS:
            self._integer()
        elif kind == _DOUBLE:
            self._forward(8)
        elif kind == _BINARY:
            self._forward(self._varint())
        elif kind == _STRUCT:
            self.struct(_INT, depth + 1)
        elif kind in _LISTS:
            count, inner = self._list()
            for _ in range(count):
                self._skip(inner, depth + 1)
        else:
            # Nothing here has a map.
            raise _damaged()

    def _byte(self) -> int:
        found = self._text[self._at]
        self._at += 1
        return found

    def _forward(self, count: int) -> None:
        self._at += count
        if self._at > len(self._text):
            raise IndexError

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise _damaged()

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def _damaged() -> DatasetError:
    return DatasetError(
        "The Parquet file is damaged or cut off: what it says of its own columns and pages can't be read."
    )
