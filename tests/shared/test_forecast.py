"""When waiting jobs are expected to start."""

from __future__ import annotations

import math

from shared.forecast import expected_starts


def test_each_job_takes_the_slot_that_is_free_first() -> None:
    starts = expected_starts([[100.0, 40.0]], [(1, 10.0), (1, 200.0), (1, 5.0), (1, 5.0)])
    assert list(starts) == [40, 50, 100, 105]


def test_what_is_not_known_stays_unknown_until_it_no_longer_matters() -> None:
    assert list(expected_starts([[math.inf]], [(1, 10.0)])) == [None]
    assert list(expected_starts([[30.0]], [(1, None), (1, 10.0)])) == [30, None]
    assert list(expected_starts([[30.0, 60.0]], [(1, None), (1, 10.0)])) == [30, 60]
    assert list(expected_starts([], [(1, 10.0)])) == [None]


def test_a_job_on_several_gpus_waits_for_as_many_of_one_box() -> None:
    boxes = [[5.0], [10.0, 30.0]]
    assert list(expected_starts(boxes, [(2, 100.0), (1, 10.0), (4, 1.0), (1, 1.0)])) == [30, 5, None, 15]
