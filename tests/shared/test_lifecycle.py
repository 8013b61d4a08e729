from __future__ import annotations

import itertools

import pytest

from shared.errors import StateConflict
from shared.lifecycle import LEASED, TERMINAL, TRANSITIONS, JobStatus, check_transition


def test_every_status_has_a_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(JobStatus)


@pytest.mark.parametrize(("current", "target"), list(itertools.product(JobStatus, JobStatus)))
def test_a_step_is_allowed_exactly_when_the_table_holds_it(current: JobStatus, target: JobStatus) -> None:
    if target in TRANSITIONS[current]:
        check_transition(current, target)
    else:
        with pytest.raises(StateConflict, match=f"{current}.*{target}"):
            check_transition(current, target)


def test_nothing_leaves_a_terminal_status_and_everything_else_can_reach_one() -> None:
    assert all(not TRANSITIONS[status] for status in TERMINAL)
    for start in set(JobStatus) - TERMINAL:
        reached, frontier = {start}, {start}
        while frontier:
            frontier = {t for s in frontier for t in TRANSITIONS[s]} - reached
            reached |= frontier
        assert reached >= TERMINAL


def test_leased_statuses_are_those_with_a_worker() -> None:
    assert set(LEASED) == {JobStatus.RUNNING, JobStatus.PAUSING, JobStatus.CANCELLING}
