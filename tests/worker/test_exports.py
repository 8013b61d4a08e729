"""Exports of finished jobs, beside the jobs that train: real processes, a fake pipeline."""

from __future__ import annotations

from datetime import timedelta

import psutil

from shared.clock import utcnow
from shared.database import Database
from shared.queue import Doorbell
from shared.repository import exports, files, jobs, keys
from shared.settings import Settings
from shared.storage import Store
from shared.tables import ExportTask, WorkerRow
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import entries, wait_status


def finished(database: Database, doorbell: Doorbell, name: str = "succeed") -> str:
    job_id = make_job(database, name=name)
    doorbell.ring(job_id)
    assert wait_status(database, job_id, "succeeded", "failed").status == "succeeded"
    return job_id


def ask(database: Database, job_id: str, fmt: str = "gguf:q8_0", checkpoint: int | None = None) -> str:
    with database.write() as session:
        return exports.add_export(session, job_id, fmt, checkpoint).id


def read(database: Database, export_id: str) -> ExportTask | None:
    with database.read() as session:
        return session.get(ExportTask, export_id)


def wait_export(database: Database, export_id: str, *wanted: str) -> ExportTask:
    def look() -> ExportTask | None:
        task = read(database, export_id)
        return task if task is not None and task.status in wanted else None

    found = wait_for(look)
    assert found is not None
    return found


def pid_of(database: Database, job_id: str) -> int | None:
    told = [e.data["pid"] for e in entries(database, job_id) if e.message == "exporting" and e.data]
    return int(told[-1]) if told else None


def content(database: Database, settings: Settings, job_id: str, name: str) -> bytes:
    with database.read() as session:
        row = files.get_artifact(session, job_id, name)
    return b"".join(Store(settings.artifacts()).read(row.key, 0, 1000))


def test_exports_of_the_end_and_of_a_checkpoint(
    start: Start, database: Database, doorbell: Doorbell, settings: Settings
) -> None:
    start()
    job_id = finished(database, doorbell)
    before = entries(database, job_id)[-1].seq
    last, third = ask(database, job_id), ask(database, job_id, checkpoint=3)
    for export_id in (last, third):
        task = wait_export(database, export_id, "succeeded", "failed")
        assert (task.status, task.attempt, task.lease_token, task.failure) == ("succeeded", 1, None, None)
    assert content(database, settings, job_id, "model-q8_0.gguf") == b"adapter as gguf:q8_0"
    assert content(database, settings, job_id, "model-q8_0.step-3.gguf") == b"step 3 as gguf:q8_0"
    with database.read() as session:
        assert jobs.get_job(session, job_id, None).status == "succeeded"
    log = entries(database, job_id)
    assert [e.seq for e in log] == list(range(1, len(log) + 1))
    told = [e.message for e in log[before:]]
    assert "Export of gguf:q8_0: done." in told
    assert "Export of gguf:q8_0 of step 3: done." in told
    assert "exporting" in told
    work = settings.root / "work" / job_id
    assert wait_for(lambda: [p.name for p in work.iterdir()] == ["checkpoints"])


def test_an_export_is_made_beside_a_job_that_trains(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start()
    job_id = finished(database, doorbell)
    training = make_job(database, name="forever")
    wait_status(database, training, "running")
    assert wait_export(database, ask(database, job_id), "succeeded", "failed").status == "succeeded"
    assert wait_status(database, training, "running").status == "running"


def test_a_failing_export_says_so_and_changes_nothing_of_its_job(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start(retry_seconds=0.05)
    broken, dying = finished(database, doorbell, "succeed fail"), finished(database, doorbell, "succeed die")
    task = wait_export(database, ask(database, broken), "failed")
    assert task.failure is not None
    assert task.failure["code"] == "internal_error"
    assert "the export broke" in task.failure["message"]
    assert entries(database, broken)[-1].level == "error"
    task = wait_export(database, ask(database, dying), "failed")
    assert task.failure is not None
    assert (task.failure["code"], task.attempt, task.losses) == ("worker_lost", 3, 3)
    for job_id in (broken, dying):
        with database.read() as session:
            job = jobs.get_job(session, job_id, None)
        assert (job.status, job.failure) == ("succeeded", None)


def test_cancelling_and_deleting_end_the_process(
    start: Start, database: Database, doorbell: Doorbell, settings: Settings
) -> None:
    start()
    job_id = finished(database, doorbell, "succeed forever")
    export_id = ask(database, job_id)
    pid = wait_for(lambda: pid_of(database, job_id))
    assert pid is not None
    with database.write() as session:
        jobs.request_cancel(session, job_id, None)
    assert wait_for(lambda: not psutil.pid_exists(pid))
    assert wait_export(database, export_id, "cancelled", "failed").status == "cancelled"

    ask(database, job_id)
    second = wait_for(lambda: (found := pid_of(database, job_id)) != pid and found)
    assert second
    with database.write() as session:
        jobs.delete_job(session, job_id, None)
    assert wait_for(lambda: not psutil.pid_exists(int(second)))
    work = settings.root / "work" / job_id
    assert wait_for(lambda: [p.name for p in work.iterdir()] == ["checkpoints"])


def test_a_stopped_supervisor_gives_its_export_back(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    supervisor = start()
    job_id = finished(database, doorbell, "succeed forever")
    export_id = ask(database, job_id)
    pid = wait_for(lambda: pid_of(database, job_id))
    supervisor.stop()
    task = wait_export(database, export_id, "queued")
    assert (task.losses, task.lease_token) == (0, None)
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))


def test_a_lost_lease_brings_the_export_back(start: Start, database: Database, doorbell: Doorbell) -> None:
    start()
    job_id = finished(database, doorbell)
    export_id = ask(database, job_id)
    with database.write() as session:
        claimed = exports.claim_export(session, "gone", "token", utcnow(), lambda _: True)
    if claimed is None:  # the supervisor was quicker
        assert wait_export(database, export_id, "succeeded").attempt == 1
        return
    assert wait_export(database, export_id, "succeeded").attempt == 2


def test_a_checkpoint_that_no_worker_has_fails_the_export(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start()
    job_id = finished(database, doorbell)
    now = utcnow()
    with database.write() as session:
        keys.put_worker(session, WorkerRow(id="other", hostname="other", slots=[], seen_at=now))
    export_id = ask(database, job_id, checkpoint=99)
    # The other worker might have it, for as long as it is on line.
    assert wait_for(lambda: (task := read(database, export_id)) is not None and task.passed_by)
    with database.write() as session:
        keys.put_worker(
            session, WorkerRow(id="other", hostname="other", slots=[], seen_at=now - timedelta(hours=1))
        )
    task = wait_export(database, export_id, "failed")
    assert task.failure is not None
    assert "no worker" in task.failure["message"]
