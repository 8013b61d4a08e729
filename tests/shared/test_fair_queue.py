"""The queue in the database: its order, what is read of it, and moving one's own jobs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import insert
from sqlmodel import select

from shared.clock import utcnow
from shared.database import Database
from shared.errors import InvalidRequest, NotFound, StateConflict
from shared.fairness import LEAST_CHARGE_SECONDS
from shared.lifecycle import JobStatus
from shared.repository import jobs, logs, owners, queue
from shared.repository.queue import Place
from shared.settings import Settings
from shared.spec import JobSpec
from shared.tables import Job
from tests.samples import make_job

pytestmark = pytest.mark.postgresql


def order(database: Database, settings: Settings, limit: int = 100) -> list[str]:
    found: list[str] = []
    with database.read() as session:
        fair = queue.offer(session, settings, lambda p, o: iter(queue.read_line(session, p, o, None, limit)))
        for job in fair:
            found.append(job.id)
            fair.take(LEAST_CHARGE_SECONDS)
    return found


def move(
    database: Database, job_id: str, owner: str = "ann", *, before: str | None = None, first: bool = False
) -> None:
    with database.write() as session:
        queue.move(session, job_id, owner, Place(before, first=first))


def test_owners_take_turns_and_who_has_used_more_comes_later(database: Database, settings: Settings) -> None:
    a1, a2 = make_job(database), make_job(database)
    b1, b2 = make_job(database, owner="bob"), make_job(database, owner="bob")
    high = make_job(database, priority="high")
    low = make_job(database, owner="bob", priority="low")
    assert order(database, settings) == [high, b1, a1, b2, a2, low]
    with database.write() as session:
        owners.lock_row(session, "bob").gpu_seconds = 1e5
    assert order(database, settings) == [high, a1, a2, b1, b2, low]


def test_a_line_is_read_in_pieces(database: Database) -> None:
    made = [make_job(database) for _ in range(5)]
    with database.read() as session:
        one = queue.read_line(session, 1, "ann", None, 2)
        two = queue.read_line(session, 1, "ann", one[-1], 2)
        assert [job.id for job in one + two] == made[:4]
        assert queue.read_line(session, 0, "ann", None, 2) == []


def test_moving_a_job_changes_only_which_of_the_owners_places_it_has(
    database: Database, settings: Settings
) -> None:
    a1, a2, a3, a4 = (make_job(database) for _ in range(4))
    b1, b2 = make_job(database, owner="bob"), make_job(database, owner="bob")
    low = make_job(database, priority="low")
    assert order(database, settings) == [a1, b1, a2, b2, a3, a4, low]
    move(database, a4, first=True)
    assert order(database, settings) == [a4, b1, a1, b2, a2, a3, low]
    move(database, a4, before=a3)
    assert order(database, settings) == [a1, b1, a2, b2, a4, a3, low]
    move(database, a1)
    assert order(database, settings) == [a2, b1, a4, b2, a3, a1, low]
    move(database, a1)
    assert order(database, settings) == [a2, b1, a4, b2, a3, a1, low]
    with database.read() as session:
        entries = logs.read_entries(session, a1, 0, 10)
        places = session.exec(select(Job.place).where(Job.owner == "ann", Job.priority == 1)).all()
    assert [entry.message for entry in entries] == [
        "Accepted.", "Moved to place 4 of 4 of its owner's queued jobs.",
    ]  # fmt: skip
    assert len(set(places)) == 4


def test_a_job_is_moved_among_ones_own_queued_ones_alone(database: Database) -> None:
    mine, other, low = make_job(database), make_job(database, owner="bob"), make_job(database, priority="low")
    running = make_job(database)
    with database.write() as session:
        jobs.set_status(jobs.lock_job(session, running, None), JobStatus.RUNNING)
    for before in (other, low, running, mine):
        with pytest.raises(InvalidRequest, match="no other queued job"):
            move(database, mine, before=before)
    with pytest.raises(NotFound):
        move(database, other, before=mine)
    with pytest.raises(StateConflict, match="only a queued one"):
        move(database, running, first=True)


def test_a_job_that_comes_back_has_its_old_place(database: Database, settings: Settings) -> None:
    first, second = make_job(database), make_job(database)
    with database.write() as session:
        jobs.request_pause(session, first, "ann")
    with database.write() as session:
        jobs.request_resume(session, first, "ann")
    assert order(database, settings) == [first, second]


def test_a_claim_reads_few_of_ten_thousand_jobs_and_by_the_index(
    database: Database, settings: Settings
) -> None:
    spec = JobSpec().to_json()
    columns = {
        "status": JobStatus.QUEUED, "model": "m", "priority": 1, "spec": spec, "user_metadata": {},
        "plan_history": [], "attempt": 0, "losses": 0, "last_seq": 0, "run_seconds": 0.0,
        "created_at": utcnow(),
    }  # fmt: skip
    many = [columns | {"id": f"ftjob-{n:024}", "owner": f"o{n % 100}", "place": n} for n in range(10_000)]
    with database.write() as session:
        session.execute(insert(Job), many)
    read: list[int] = []
    with database.read() as session:

        def line(priority: int, owner: str) -> Iterator[Job]:
            found = queue.read_line(session, priority, owner, None, 10)
            read.append(len(found))
            yield from found

        fair = queue.offer(session, settings, line)
        taken = []
        for job in fair:
            taken.append(job.owner)
            fair.take(LEAST_CHARGE_SECONDS)
            if len(taken) == 3:
                break
        assert taken == ["o0", "o1", "o2"]
        assert read == [10, 10, 10]
        assert len(queue.waiting(session)) == 10_000
        if session.get_bind().dialect.name == "sqlite":
            (plan,) = session.connection().exec_driver_sql(
                "EXPLAIN QUERY PLAN SELECT priority, owner, min(place) FROM job WHERE status = 'queued' "
                "GROUP BY priority, owner"
            )
            assert "USING COVERING INDEX ix_job_claim" in plan[-1]
