"""Claims and leases against a real database, from several threads at once."""

from __future__ import annotations

import threading
from collections import Counter
from datetime import timedelta

import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.errors import LeaseLost
from shared.events import Entry
from shared.lifecycle import JobStatus
from shared.repository import jobs, leases, logs, queue
from shared.settings import Settings
from tests.samples import make_job

pytestmark = pytest.mark.postgresql


def claim(database: Database, token: str = "t1", seconds: float = 60) -> str | None:
    with database.write() as session:
        for waiting in queue.offer(
            session, Settings(), lambda p, o: iter(queue.read_line(session, p, o, None, 100))
        ):
            job = leases.claim(session, waiting.id, "w", token, utcnow() + timedelta(seconds=seconds))
            if job is not None:
                return job.id
    return None


def test_claims_go_by_priority_then_age(database: Database) -> None:
    low = make_job(database, priority="low")
    first, second = make_job(database), make_job(database)
    high = make_job(database, priority="high")
    assert [claim(database) for _ in range(5)] == [high, first, second, low, None]


def test_a_job_is_claimed_once_however_many_ask(database: Database) -> None:
    made = {make_job(database) for _ in range(20)}
    claimed: list[str] = []
    lock = threading.Lock()

    def claim_all(number: int) -> None:
        while job_id := claim(database, f"token-{number}"):
            with lock:
                claimed.append(job_id)

    threads = [threading.Thread(target=claim_all, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(claimed) == Counter(made)


def test_a_claim_starts_an_attempt_and_says_so_in_the_log(database: Database) -> None:
    job_id = make_job(database)
    claim(database)
    with database.read() as session:
        job = jobs.get_job(session, job_id, "ann")
        entries = logs.read_entries(session, job_id, 0, 10)
    assert (job.status, job.attempt, job.lease_token) == ("running", 1, "t1")
    assert job.started_at is not None
    assert [e.message for e in entries] == ["Accepted.", "Claimed by worker w."]


def test_only_the_holder_of_the_lease_writes(database: Database) -> None:
    job_id = make_job(database)
    claim(database, "mine")
    with database.write() as session:
        assert logs.append_entries(session, job_id, [Entry("mine")], "mine") == 3
    with pytest.raises(LeaseLost), database.write() as session:
        logs.append_entries(session, job_id, [Entry("not mine")], "other")
    with pytest.raises(LeaseLost), database.write() as session:
        leases.owned_job(session, job_id, "other")
    with database.read() as session:
        assert [e.message for e in logs.read_entries(session, job_id, 2, 10)] == ["mine"]


def test_a_lost_job_is_queued_again_and_the_old_token_is_worth_nothing(database: Database) -> None:
    job_id = make_job(database)
    claim(database, "old", seconds=-1)
    with database.write() as session:
        (lost,) = leases.expired_leases(session, utcnow())
        leases.lose(session, lost, "Gone.", max_losses=3)
    assert claim(database, "new") == job_id
    with pytest.raises(LeaseLost), database.write() as session:
        leases.owned_job(session, job_id, "old")
    with database.read() as session:
        assert jobs.get_job(session, job_id, None).attempt == 2


@pytest.mark.parametrize(
    ("of_a_later_version", "advice"),
    [
        ({}, "per_device_train_batch_size 1"),
        ({"unheard_of": 1}, "give the worker's machine more main memory"),
    ],
)
def test_a_job_that_loses_its_worker_too_often_fails_with_what_is_known(
    database: Database, of_a_later_version: dict[str, int], advice: str
) -> None:
    job_id = make_job(database)
    with database.write() as session:
        written = jobs.lock_job(session, job_id, None)
        written.spec = written.spec | of_a_later_version
    for _ in range(3):
        assert claim(database) == job_id
        with database.write() as session:
            leases.lose(session, jobs.lock_job(session, job_id, None), "Killed by signal 9.", max_losses=3)
    with database.read() as session:
        job = jobs.get_job(session, job_id, None)
        *_, last = logs.read_entries(session, job_id, 0, 100)
    assert job.status == JobStatus.FAILED
    assert job.failure is not None
    assert job.failure["code"] == "worker_lost"
    assert advice in job.failure["advice"]
    assert last.message == f"Failed: {job.failure['message']} {job.failure['advice']}"
    assert "signal 9" in job.failure["message"]
    assert "3 times" in job.failure["message"]


def test_handing_back_on_purpose_does_not_count_as_a_loss(database: Database) -> None:
    job_id = make_job(database)
    for _ in range(5):
        assert claim(database) == job_id
        with database.write() as session:
            leases.give_back(session, jobs.lock_job(session, job_id, None), "Stopped.")
    with database.read() as session:
        job = jobs.get_job(session, job_id, None)
    assert (job.status, job.losses, job.lease_token) == ("queued", 0, None)


def test_a_job_that_is_lost_while_cancelling_is_cancelled(database: Database) -> None:
    job_id = make_job(database)
    claim(database)
    with database.write() as session:
        jobs.request_cancel(session, job_id, "ann")
    with database.write() as session:
        leases.lose(session, jobs.lock_job(session, job_id, None), "Gone.", max_losses=3)
    with database.read() as session:
        assert jobs.get_job(session, job_id, None).status == JobStatus.CANCELLED


def test_entries_of_many_writers_are_numbered_without_gaps(database: Database) -> None:
    job_id = make_job(database)

    def write(number: int) -> None:
        for i in range(20):
            with database.write() as session:
                logs.append_entries(session, job_id, [Entry(f"{number}-{i}-a"), Entry(f"{number}-{i}-b")])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as session:
        entries = logs.read_entries(session, job_id, 0, 1000)
    assert [e.seq for e in entries] == list(range(1, 162))
    for number in range(4):
        mine = [e.message for e in entries if e.message.startswith(f"{number}-")]
        assert mine == [f"{number}-{i}-{half}" for i in range(20) for half in "ab"]
