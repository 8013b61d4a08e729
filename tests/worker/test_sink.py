"""The sink of an attempt that was overtaken."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlmodel import select

from shared.clock import utcnow
from shared.database import Database
from shared.errors import LeaseLost
from shared.events import Entry
from shared.lifecycle import JobStatus
from shared.queue import Doorbell
from shared.repository import leases
from shared.settings import Settings
from shared.storage import Store
from shared.tables import DatasetRow
from tests.samples import make_job, size_and_hash
from worker.lease import JobLease
from worker.sink import DatabaseSink


def test_results_of_an_overtaken_attempt_replace_no_other_ones(
    database: Database,
    settings: Settings,
    doorbell: Doorbell,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store(settings.artifacts())
    job_id = make_job(database)

    def attempt(token: str) -> DatabaseSink:
        lease = JobLease(job_id, token)
        sink = DatabaseSink(database, store, doorbell, lease, 60, on_lost=lambda: None)
        with database.write() as session:
            leases.claim(session, job_id, "box", token, utcnow() + timedelta(minutes=1))
        (tmp_path / token).mkdir()
        return sink

    frozen = attempt("one")
    frozen.metrics({"step": 1, "loss": 0.5})
    # It freezes when it has read its metrics, and is about to put the file of them into the store.
    waiting: list[tuple[Path, str]] = []
    with monkeypatch.context() as frozen_world:
        frozen_world.setattr(store, "publish", lambda source, key: waiting.append((source, key)))
        frozen.results(tmp_path / "one")

    with database.write() as session:
        leases.lose(session, leases.owned_job(session, job_id, "one"), "Lost.", 3)
    second = attempt("two")
    second.metrics({"step": 1, "loss": 0.25})
    second.results(tmp_path / "two")
    second.finish(JobStatus.SUCCEEDED, Entry("Succeeded."))

    for source, key in waiting:
        store.publish(source, key)
    with pytest.raises(LeaseLost):
        frozen.finish(JobStatus.SUCCEEDED, Entry("Succeeded."))
    with database.read() as session:
        (row,) = session.exec(select(DatasetRow)).all()
    assert size_and_hash(store.fetch(row.key, tmp_path / "unused")) == (row.bytes, row.sha256)
