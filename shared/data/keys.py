"""A set of 64-bit hashes in 12 to 24 bytes each, where Python's own takes about 70."""

from __future__ import annotations

from array import array

_SMALLEST = 1024


class Keys:
    """Open addressing: a key lies at the first free place from the one that its own bits name."""

    def __init__(self) -> None:
        self._table = array("Q", [0]) * _SMALLEST
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        # 0 marks a free place, so the key 0 shares that of 1.
        return self._table[self._place(key or 1)] != 0

    def add(self, key: int) -> bool:
        """Whether it is new."""
        place = self._place(key or 1)
        if self._table[place]:
            return False
        self._table[place] = key or 1
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            self._grow()
        return True

    def _place(self, key: int) -> int:
        table = self._table
        mask = len(table) - 1
        place = key & mask
        while (found := table[place]) and found != key:
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        old = self._table
        self._table = array("Q", [0]) * (2 * len(old))
        for key in old:
            if key:
                self._table[self._place(key)] = key
