"""The benchmark of growth: what it makes, and how much of the disk a log takes."""

from __future__ import annotations

import pytest

from bench.growth import bytes_per_entry, requests
from bench.population import Size, measured, messages, metrics, populate
from shared.database import Database
from shared.repository import jobs, logs
from shared.repository.jobs import Page

ENTRIES = 3000
SIZE = Size(owners=2, queued=4, finished=30, entries=60, spread=90)


@pytest.mark.parametrize(("name", "most"), [("messages", 115), ("metrics", 420)])
def test_a_log_takes_little_more_than_what_it_says(name: str, most: int) -> None:
    entries = list({"messages": messages, "metrics": metrics}[name](ENTRIES))
    assert 50 < bytes_per_entry(entries, 1) < most
    assert bytes_per_entry(entries, 20) < most


def test_a_population_is_what_its_size_says(database: Database) -> None:
    made = populate(database, SIZE)
    with database.read() as session:
        counts = jobs.count_by_status(session, None)
        assert counts["queued"] == SIZE.queued
        assert sum(counts.values()) == SIZE.queued + SIZE.finished + 1
        rare, _ = jobs.list_jobs(session, "owner-0", Page(), metadata={"rare": "r0"})
        assert [job.id for job in rare] == [made.queued[0], made.finished[0]]
        assert logs.log_state(session, made.logged, "owner-0")[1] == SIZE.entries
        assert len(logs.read_entries(session, made.finished[0], 0, 100)) == 5 + SIZE.spread // SIZE.finished
        assert logs.read_metrics(session, made.finished[0])[3] == measured(3)
    names = [name for name, *_ in requests(made, SIZE.entries)]
    assert len(set(names)) == len(names)
