"""When waiting jobs are expected to start, from what is known of those that run and of those before them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence


def expected_starts(
    boxes: Sequence[Sequence[float]], ahead: Iterable[tuple[int, float | None]]
) -> Iterator[float | None]:
    """Seconds until each job starts, in the order of the queue; None where it can't be known.

    Takes every job to fit every GPU, and to start as soon as one box has as many GPUs as it asks for.

    Args:
        boxes: of each box, seconds until each of its slots is free; infinity where that is not known.
        ahead: GPUs and expected seconds of each job; None for seconds that nobody knows.
    """
    slots = [sorted(box) for box in boxes]
    for gpus, seconds in ahead:
        fitting = [box for box in slots if len(box) >= gpus]
        if not fitting:
            yield None
            continue
        box = min(fitting, key=lambda free: free[gpus - 1])
        start = box[gpus - 1]
        yield start if math.isfinite(start) else None
        box[:gpus] = [start + seconds if seconds is not None else math.inf] * gpus
        box.sort()
