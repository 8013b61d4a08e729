"""Who is next, and the GPU time that it goes by."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.fairness import (
    HALF_LIFE_SECONDS,
    LEAST_CHARGE_SECONDS,
    FairQueue,
    Line,
    Standing,
    counted,
    counted_while_running,
    faded,
)

Item = tuple[str, int]


def queue(jobs: dict[tuple[int, str], list[int]], standings: dict[str, Standing]) -> FairQueue[Item]:
    """Jobs are (owner, age); `jobs` has the ages by priority and owner."""
    lines = {
        (priority, owner): Line(ages[0], iter([(owner, age) for age in ages]))
        for (priority, owner), ages in jobs.items()
    }
    return FairQueue(lines, standings, lambda item: item[1])


def taken(fair: FairQueue[Item], seconds: float = LEAST_CHARGE_SECONDS) -> list[str]:
    order = []
    for owner, age in fair:
        order.append(f"{owner}{age}")
        fair.take(seconds)
    return order


def test_priority_first_then_who_has_used_least_then_age() -> None:
    jobs = {(1, "a"): [1, 2], (1, "b"): [3], (2, "c"): [0], (0, "d"): [9]}
    standings = {"a": Standing(5000), "b": Standing(10), "c": Standing(), "d": Standing(9e9)}
    assert taken(queue(jobs, standings)) == ["d9", "b3", "a1", "a2", "c0"]
    even = {owner: Standing() for owner in "abcd"}
    assert taken(queue({(1, "b"): [3, 5], (1, "a"): [4]}, even), 0) == ["b3", "a4", "b5"]


def test_gpus_that_come_free_together_go_to_several_owners() -> None:
    jobs = {(1, "a"): [1, 2, 3, 4], (1, "b"): [5, 6], (1, "c"): [7]}
    standings = {"a": Standing(100), "b": Standing(0), "c": Standing(200)}
    assert taken(queue(jobs, standings)) == ["b5", "a1", "c7", "b6", "a2", "a3", "a4"]


def test_what_is_not_taken_counts_for_nothing() -> None:
    fair = queue({(1, "a"): [1, 2, 3], (1, "b"): [4]}, {"a": Standing(), "b": Standing(1)})
    assert [f"{owner}{age}" for owner, age in fair] == ["a1", "a2", "a3", "b4"]


def test_an_owner_at_its_quota_is_left_out_and_holds_up_nobody() -> None:
    jobs = {(0, "b"): [9], (1, "a"): [1, 2, 3], (1, "b"): [4], (2, "a"): [0]}
    standings = {"a": Standing(room=2, held_by="running_jobs"), "b": Standing(room=None)}
    assert taken(queue(jobs, standings)) == ["b9", "a1", "a2", "b4"]
    assert taken(queue({(1, "a"): [1]}, {"a": Standing(room=0)})) == []


def test_only_jobs_that_are_come_to_are_read() -> None:
    read: list[str] = []

    def line(owner: str) -> Iterator[Item]:
        for age in range(1000):
            read.append(owner)
            yield owner, age

    lines = {(1, owner): Line(0, line(owner)) for owner in "abc"}
    fair = FairQueue(lines, {owner: Standing() for owner in "abc"}, lambda item: item[1])
    offered = iter(fair)
    for _ in range(2):
        next(offered)
        fair.take(LEAST_CHARGE_SECONDS)
    assert sorted(read) == ["a", "a", "b"]


def test_use_fades_by_half_with_each_half_life() -> None:
    assert faded(100, HALF_LIFE_SECONDS) == pytest.approx(50)
    assert faded(100, 3 * HALF_LIFE_SECONDS) == pytest.approx(12.5)
    assert faded(100, -5) == 100


@pytest.mark.parametrize("cuts", [[1800.0], [10.0, 50_000.0], [HALF_LIFE_SECONDS * 2]])
def test_a_run_counts_the_same_in_however_many_attempts(cuts: list[float]) -> None:
    whole = sum(cuts) + 4000
    total = 0.0
    for part in [*cuts, 4000.0]:
        total = faded(total, part) + counted(2, part)
    assert total == pytest.approx(counted(2, whole))


def test_a_short_run_counts_its_seconds_and_an_endless_one_has_a_bound() -> None:
    assert counted(4, 60) == pytest.approx(240, rel=1e-3)
    assert counted(1, 1e9) == pytest.approx(HALF_LIFE_SECONDS * 1.4427, rel=1e-3)
    assert counted_while_running(2, 1) == 2 * LEAST_CHARGE_SECONDS
    assert counted_while_running(2, 7200) == counted(2, 7200)
