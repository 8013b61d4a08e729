"""Who is next: the order in which waiting jobs are offered to free GPUs, and the GPU time that it goes by.

The claim, what a job is told of its place, and bench/fairness.py all use this one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

# After so long a GPU-second counts for half.
HALF_LIFE_SECONDS = 86_400.0
# What a running job counts for at the least on each GPU, so that GPUs that come free together are not all
# given to the one owner who has used little until now.
LEAST_CHARGE_SECONDS = 600.0

Item = TypeVar("Item")


@dataclass
class Standing:
    """How an owner stands: the GPU-seconds that it used lately, and how many more of its jobs may start.

    `room` is None where nothing limits it; at 0 its jobs are `held_by` a quota of this name.
    """

    used: float = 0.0
    room: int | None = None
    held_by: str | None = None


@dataclass
class Line(Generic[Item]):
    """One owner's waiting jobs of one priority, in their order; `age` is the first one's (less is older)."""

    age: int
    jobs: Iterator[Item]


def faded(seconds: float, ago: float) -> float:
    """What GPU-seconds that were counted so long ago count for now."""
    return seconds * math.exp2(-max(ago, 0.0) / HALF_LIFE_SECONDS)


def counted(gpus: int, seconds: float) -> float:
    """What a run that ends now counts for: each of its seconds by how long ago it was.

    The integral over the run, so that it makes no difference in how many attempts it was done.
    """
    scale = HALF_LIFE_SECONDS / math.log(2)
    return gpus * scale * -math.expm1(-max(seconds, 0.0) / scale)


def counted_while_running(gpus: int, seconds: float) -> float:
    """What a run that goes on counts for."""
    return max(counted(gpus, seconds), gpus * LEAST_CHARGE_SECONDS)


class FairQueue(Generic[Item]):
    """Yields waiting jobs: by priority, then the owner who has used least, then age.

    An owner whose jobs may not start now is left out. Whoever takes the job that was yielded last says so
    with `take`, which counts against its owner from then on.
    """

    def __init__(
        self,
        lines: Mapping[tuple[int, str], Line[Item]],
        standings: Mapping[str, Standing],
        age: Callable[[Item], int],
    ) -> None:
        self._lines = lines
        self._standings = standings
        self._age = age
        self._offered: Standing | None = None

    @property
    def is_empty(self) -> bool:
        return not self._lines

    def __iter__(self) -> Iterator[Item]:
        for priority in sorted({priority for priority, _ in self._lines}):
            owners = [(owner, line) for (of, owner), line in self._lines.items() if of == priority]
            yield from self._merge(owners)

    def take(self, seconds: float) -> None:
        """The job just yielded starts; it is taken to use so many GPU-seconds."""
        if self._offered is None:
            raise ValueError("no job was offered")
        self._offered.used += seconds
        if self._offered.room is not None:
            self._offered.room -= 1
        self._offered = None

    def _merge(self, owners: Iterable[tuple[str, Line[Item]]]) -> Iterator[Item]:
        # A job is read only when it is its owner's turn: most owners' lines are not looked into.
        heap: list[tuple[float, int, str, list[Item], Iterator[Item]]] = [
            (self._standings[owner].used, line.age, owner, [], line.jobs) for owner, line in owners
        ]
        heapq.heapify(heap)
        while heap:
            _, _, owner, read, rest = heapq.heappop(heap)
            standing = self._standings[owner]
            if standing.room is not None and standing.room <= 0:
                continue
            for item in read or rest:
                self._offered = standing
                yield item
                break
            else:
                continue
            for item in rest:
                heapq.heappush(heap, (standing.used, self._age(item), owner, [item], rest))
                break
