"""The sink of a running job, with a database that breaks at the worst moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from shared.clock import utcnow
from shared.database import Database, Session
from shared.errors import LeaseLost
from shared.events import Artifact, Entry
from shared.lifecycle import JobStatus
from shared.queue import Doorbell
from shared.repository import copies, files, jobs, leases, logs
from shared.settings import Settings
from shared.storage import Store
from shared.tables import CheckpointCopy
from tests.samples import make_job, size_and_hash
from worker.lease import JobLease
from worker.sink import DatabaseSink

pytestmark = pytest.mark.postgresql


class Breaking(Database):
    """Whose connection breaks after a commit, before its answer."""

    breaks = 0
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    @contextmanager
    def write(self) -> Iterator[Session]:
        with super().write() as session:
            yield session
        if self.breaks:
            self.breaks -= 1
            self.meanwhile()
            raise OperationalError("COMMIT", None, Exception("the connection was lost"))


def test_a_commit_whose_answer_is_lost_is_not_made_again(
    database: Database, settings: Settings, doorbell: Doorbell, tmp_path: Path
) -> None:
    job_id = make_job(database)
    with database.write() as session:
        leases.claim(session, job_id, "box-1", "token", utcnow() + timedelta(minutes=1))
    breaking = Breaking(database.url)
    sink = DatabaseSink(
        breaking, Store(settings.artifacts()), doorbell, JobLease(job_id, "token"), 60, lambda: None
    )
    for number in range(3):
        sink.log(Entry(f"entry {number}"))
    sink.metrics({"step": 1, "loss": 0.5})
    file = tmp_path / "manifest.json"
    file.write_text("{}")
    breaking.breaks = 1
    sink.artifact(Artifact("manifest.json", "manifest", file, *size_and_hash(file)))
    sink.finish(JobStatus.SUCCEEDED, Entry("Succeeded."))
    breaking.close()
    with database.read() as session:
        told = [entry.message for entry in logs.read_entries(session, job_id, 0, 100)]
        assert jobs.get_job(session, job_id, None).status == "succeeded"
        assert logs.read_metrics(session, job_id) == [{"step": 1, "loss": 0.5}]
        (artifact,) = files.list_artifacts(session, job_id)
    assert told[2:] == ["entry 0", "entry 1", "entry 2", "manifest.json is ready: 2 bytes.", "Succeeded."]
    assert b"".join(Store(settings.artifacts()).read(artifact.key, 0, 2)) == b"{}"


def test_a_file_whose_row_was_committed_stays_though_the_lease_was_lost_before_the_answer(
    database: Database, settings: Settings, doorbell: Doorbell
) -> None:
    job_id = make_job(database)
    with database.write() as session:
        leases.claim(session, job_id, "box-1", "token", utcnow() + timedelta(minutes=1))

    def lose() -> None:
        with database.write() as session:
            leases.lose(session, leases.owned_job(session, job_id, "token"), "It died.", 9)

    breaking = Breaking(database.url)
    breaking.breaks, breaking.meanwhile = 1, lose
    store = Store(settings.artifacts())
    sink = DatabaseSink(breaking, store, doorbell, JobLease(job_id, "token"), 60, lambda: None)
    for step in (1, 2):
        key = f"jobs/{job_id}/token/checkpoint-{step}.tar"
        with store.writing(key) as file:
            file.write(b"1")
        with pytest.raises(LeaseLost):
            sink.checkpoint_copy(CheckpointCopy(job_id=job_id, step=step, bytes=1, sha256="", key=key))
    breaking.close()
    with database.read() as session:
        copy = copies.find_copy(session, job_id)
    assert copy is not None
    # The other one never got its row.
    assert [file.name for file in store.list_files()] == [copy.key]
    assert copy.step == 1
