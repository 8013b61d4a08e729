"""Best-fit packing of documents into rows of a fixed capacity."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def best_fit(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still has room.

    Args:
        lengths: tokens of each document, each at most `capacity`.

    Returns:
        rows of document indices; every document is in exactly one row.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    rows: list[list[int]] = []
    # Rows by the room they have left, and the distinct rooms in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document in order.tolist():
        size = int(sizes[document])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(at)
        rows[row].append(document)
        left = room - size
        if left in by_room:
            by_room[left].append(row)
        elif left:
            by_room[left] = [row]
            insort(rooms, left)
    return rows


def arranged(
    rows: list[list[int]], lengths: Sequence[int] | npt.NDArray[np.int64], first: int, seed: int
) -> list[list[int]]:
    """The rows shuffled, the `first` longest at the front: running out of memory shows at the first step."""
    sizes = np.array([sum(int(lengths[document]) for document in row) for row in rows])
    longest = np.argsort(-sizes, kind="stable")[:first]
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    rest = shuffled[~np.isin(shuffled, longest)]
    return [rows[index] for index in [*longest.tolist(), *rest.tolist()]]


def in_batches(lengths: Sequence[int] | npt.NDArray[np.int64], size: int, seed: int) -> list[list[int]]:
    """Rows of one document each, for batches of rows of like lengths, which pad little.

    The batch of the longest comes first, the others are shuffled, one that isn't full comes last.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    short = [batches.pop()] if len(batches[-1]) < size else []
    shuffled = np.random.default_rng(seed).permutation(len(batches)).tolist()
    batches = [*batches[:1], *[batches[number] for number in shuffled if number], *short]
    return [[document] for batch in batches for document in batch]
