"""How large the pages of a Parquet file are, read from their headers before any is unpacked.

pyarrow unpacks a page as a whole and doesn't ask how large it gets. A header is a Thrift struct in the
compact protocol; of its fields only the sizes matter here.
"""

from __future__ import annotations

from typing import IO, Any, NamedTuple

from shared.errors import DatasetError

# Headers hold statistics, which writers keep short.
MAX_HEADER = 2**20
MAX_PAGES = 2**20
_FIRST_READ = 256
_DICTIONARY = 2
_DEEPEST = 16
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


class Largest(NamedTuple):
    """Bytes of the largest pages that are in memory at once: of each column one, and its dictionary.

    Attributes:
        unpacked: what one cell may have at most, too.
        both: with the packed pages beside them.
    """

    unpacked: int
    both: int


def largest_pages(file: IO[bytes], row_group: Any) -> Largest:
    """
    Args:
        row_group: pyarrow's metadata of it.

    Raises:
        DatasetError: the headers are damaged, or there are too many.
    """
    unpacked = both = pages = 0
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        at = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            at = min(at, column.dictionary_page_offset)
        end = at + column.total_compressed_size
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
            fields, used = _Thrift(text).struct()
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
    """Reads the integers of a struct and skips everything else; IndexError where the text ends before it."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def struct(self, depth: int = 0) -> tuple[dict[int, int], int]:
        fields: dict[int, int] = {}
        number = 0
        if depth > _DEEPEST:
            raise _damaged()
        while (head := self._byte()) != 0:
            step = head >> 4
            number = number + step if step else self._integer()
            kind = head & 15
            if kind in _INTEGERS:
                fields[number] = self._integer()
            elif kind not in _BOOLEANS:
                self._skip(kind, depth)
        return fields, self._at

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
            self.struct(depth + 1)
        elif kind in _LISTS:
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            for _ in range(count):
                self._skip(head & 15, depth + 1)
        else:
            # No page header has a map.
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
    return DatasetError("The Parquet file is damaged or cut off: a page's header can't be read.")
