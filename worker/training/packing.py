"""Best-fit packing of documents into rows of a fixed capacity."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

# A row is an array of its documents' indices, 4 bytes each: there may be many millions.
_AT_ONCE = 2**16


def best_fit(lengths: Sequence[int] | npt.NDArray[np.int64], capacity: int) -> list[array[int]]:
    """Best-fit decreasing: the longest document first, each into the fullest row that still has room.

    Args:
        lengths: tokens of each document, each at most `capacity`.

    Returns:
        rows of document indices; every document is in exactly one row.
    """
    sizes = np.asarray(lengths)
    order = np.argsort(-sizes, kind="stable")
    rows: list[array[int]] = []
    # Rows by the room they have left, and the distinct rooms in order.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document in chain.from_iterable(
        order[at : at + _AT_ONCE].tolist() for at in range(0, len(order), _AT_ONCE)
    ):
        size = int(sizes[document])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append(array("I"))
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
    rows: list[array[int]], lengths: Sequence[int] | npt.NDArray[np.int64], first: int, seed: int
) -> list[array[int]]:
    """The rows shuffled, the `first` longest at the front: running out of memory shows at the first step."""
    longest = np.argsort(-row_tokens(rows, np.asarray(lengths)), kind="stable")[:first]
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    rest = shuffled[~np.isin(shuffled, longest)]
    return [rows[index] for index in [*longest.tolist(), *rest.tolist()]]


def row_tokens(rows: list[array[int]], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tokens of each row, int64 [rows]."""
    return np.fromiter((lengths[row].sum() for row in rows), np.int64, len(rows))


def in_batches(lengths: Sequence[int] | npt.NDArray[np.int64], size: int, seed: int) -> npt.NDArray[np.int64]:
    """The order of the documents, each a row, for batches of `size` of like lengths, which pad little.

    The batch of the longest comes first, the others are shuffled, one that isn't full comes last.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    full = len(order) // size
    if not full:
        return order
    shuffled = np.random.default_rng(seed).permutation(full)
    batches = order[: full * size].reshape(full, size)
    others = batches[shuffled[shuffled != 0]].ravel()
    return np.concatenate([batches[0], others, order[full * size :]])
