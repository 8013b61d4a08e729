"""What an owner has used, against a real database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared.clock import month_of, utcnow
from shared.database import Database
from shared.errors import QuotaExceeded
from shared.fairness import LEAST_CHARGE_SECONDS, counted, faded
from shared.lifecycle import JobStatus
from shared.repository import files, jobs, owners
from shared.repository.owners import Quota
from shared.settings import Settings
from shared.tables import ArtifactRow
from tests.samples import add_dataset, make_job

pytestmark = pytest.mark.postgresql


def start(database: Database, seconds_ago: float, owner: str = "ann", gpus: int = 1) -> str:
    """A job that has run for so long."""
    job_id = make_job(database, owner=owner)
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        job.spec = job.spec | {"gpus": gpus}
        since = utcnow() - timedelta(seconds=seconds_ago)
        jobs.set_status(job, JobStatus.RUNNING, worker="w", lease_token="t", attempt_started_at=since)
    return job_id


def end(database: Database, job_id: str, status: JobStatus = JobStatus.SUCCEEDED) -> None:
    with database.write() as session:
        jobs.set_status(jobs.lock_job(session, job_id, None), status)


def used(database: Database, owner: str = "ann") -> float:
    with database.read() as session:
        return owners.used_lately(session, owner)


def quota(database: Database, name: str, settings: Settings, owner: str = "ann") -> Quota:
    with database.read() as session:
        return owners.quotas(session, settings, owner)[name]


def test_a_running_job_counts_and_goes_on_counting_when_it_has_ended(database: Database) -> None:
    job_id = start(database, 7200, gpus=2)
    running = used(database)
    assert running == pytest.approx(counted(2, 7200), rel=1e-3)
    end(database, job_id)
    assert used(database) == pytest.approx(running, rel=1e-3)
    assert used(database, "bob") == 0


def test_every_end_of_an_attempt_is_counted_once(database: Database) -> None:
    for status in (JobStatus.FAILED, JobStatus.QUEUED, JobStatus.SUCCEEDED):
        end(database, start(database, 3600), status)
    assert used(database) == pytest.approx(3 * counted(1, 3600), rel=1e-3)
    with database.write() as session:
        cancelled = jobs.request_cancel(session, make_job_id(database), None)
        assert cancelled.status == JobStatus.CANCELLED
    assert used(database) == pytest.approx(3 * counted(1, 3600), rel=1e-3)


def make_job_id(database: Database) -> str:
    with database.read() as session:
        (job_id,) = [job.id for job in jobs.list_jobs(session, None, jobs.Page(), status=JobStatus.QUEUED)[0]]
    return job_id


def test_what_was_used_fades(database: Database) -> None:
    end(database, start(database, 3600))
    with database.write() as session:
        owners.lock_row(session, "ann").counted_at = utcnow() - timedelta(days=2)
    assert used(database) == pytest.approx(faded(counted(1, 3600), 172_800), rel=1e-3)


def test_a_job_that_has_just_started_counts_for_some_minutes(database: Database) -> None:
    start(database, 1)
    assert used(database) == LEAST_CHARGE_SECONDS


def test_gpu_hours_are_those_of_this_month(database: Database, settings: Settings) -> None:
    into_month = (utcnow() - month_of(utcnow())).total_seconds()
    # Begun in the month before: what was used then counts there.
    end(database, start(database, into_month + 7200))
    assert quota(database, "gpu_hours", settings).used == pytest.approx(into_month / 3600, rel=1e-2, abs=1e-2)
    start(database, into_month + 7200, gpus=2)
    assert quota(database, "gpu_hours", settings).used == pytest.approx(
        3 * into_month / 3600, rel=1e-2, abs=1e-2
    )
    with database.write() as session:
        owners.lock_row(session, "ann").month = datetime(2020, 1, 1, tzinfo=UTC)
    assert quota(database, "gpu_hours", settings).used == pytest.approx(
        2 * into_month / 3600, rel=1e-2, abs=1e-2
    )


def test_bytes_in_the_store_are_counted_as_they_come_and_go(
    database: Database, settings: Settings, tmp_path: Path
) -> None:
    job_id = make_job(database)

    def put(size: int) -> None:
        row = ArtifactRow(job_id=job_id, name="a", kind="adapter", bytes=size, sha256="0", key=f"k{size}")
        with database.write() as session:
            files.put_artifact(session, row)

    def stored() -> float:
        return quota(database, "stored_bytes", settings).used

    put(100)
    put(70)
    assert stored() == 70
    upload = tmp_path / "rows"
    upload.write_bytes(b"x" * 30)
    dataset_id = add_dataset(database, settings, upload)
    assert stored() == 100
    with database.write() as session:
        files.delete_file(session, files.get_file(session, dataset_id, "ann", lock=True))
    assert stored() == 70
    end(database, job_id, JobStatus.CANCELLED)
    with database.write() as session:
        jobs.delete_job(session, job_id, "ann")
    assert stored() == 0


def test_an_owners_own_limit_wins_over_the_settings(database: Database, settings: Settings) -> None:
    strict = settings.model_copy(update={"max_running_jobs": 2})
    assert quota(database, "running_jobs", strict).limit == 2
    for own, seen in ((7, 7), (owners.UNLIMITED, None), (None, 2)):
        with database.write() as session:
            owners.set_quotas(session, "ann", {"running_jobs": own})
        assert quota(database, "running_jobs", strict).limit == seen


def test_a_quota_lets_its_last_piece_through() -> None:
    Quota("queued_jobs", 4, 5).check(1)
    Quota("gpu_hours", 4.9, 5).check()
    Quota("gpu_hours", 1e9, None).check()
    for over, more in ((Quota("queued_jobs", 5, 5), 1), (Quota("gpu_hours", 5, 5), 0)):
        with pytest.raises(QuotaExceeded, match="5 of 5") as caught:
            over.check(more)
        assert caught.value.param == f"quotas.{over.name}"


def test_standings(database: Database, settings: Settings) -> None:
    end(database, start(database, 3600, owner="bob"))
    start(database, 7200, owner="cem")
    limited = settings.model_copy(update={"max_running_jobs": 1, "max_gpu_hours": 0.5})
    with database.read() as session:
        found = owners.standings(session, limited, ["ann", "bob", "cem"])
    assert (found["ann"].used, found["ann"].room) == (0, 1)
    assert (found["bob"].room, found["bob"].held_by) == (0, "gpu_hours")
    assert found["cem"].used > found["bob"].used > 0
