"""The simulation of the queue."""

from __future__ import annotations

import pytest

from bench.fairness import GPUS, fair, first_come, jain, report, simulate, workload


def test_every_job_runs_once_and_no_gpu_twice_at_a_time() -> None:
    jobs = workload(seed=3, days=2)
    for order in (first_come, fair):
        done = simulate(jobs, order)
        assert {owner: len(found) for owner, found in done.items()} == {
            owner: sum(job.owner == owner for job in jobs) for owner in done
        }
        posted = {owner: [job.posted for job in jobs if job.owner == owner] for owner in done}
        spans = [
            (at + wait, at + wait + ran)
            for owner, found in done.items()
            for at, (wait, ran) in zip(posted[owner], found, strict=True)
        ]
        assert all(wait >= 0 for found in done.values() for wait, _ in found)
        busiest = max(sum(start <= moment < end - 1e-6 for start, end in spans) for moment, _ in spans)
        assert busiest == GPUS


def test_ours_is_the_fairer_one() -> None:
    table, indices = report(workload(seed=3, days=4))
    assert table.row_count == 8
    assert indices["first come"] < 0.3
    assert indices["ours"] > 0.6


def test_jains_index() -> None:
    assert jain([2, 2, 2]) == pytest.approx(1)
    assert jain([5, 0, 0, 0]) == pytest.approx(0.25)
