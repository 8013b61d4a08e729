"""The queue: the waiting jobs in the order in which they are to start, and moving one's own in it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func, literal, tuple_, update
from sqlalchemy import select as sa_select
from sqlmodel import Session, col, select

from shared.errors import InvalidRequest, StateConflict
from shared.events import Entry
from shared.fairness import FairQueue, Line
from shared.lifecycle import JobStatus
from shared.repository import logs, owners
from shared.repository.jobs import get_job
from shared.settings import Settings
from shared.tables import Job

Reader = Callable[[int, str], Iterator[Job]]


class Waiting(NamedTuple):
    """A queued job, as far as the queue is concerned."""

    id: str
    owner: str
    priority: int
    place: int
    created_at: datetime
    gpus: int
    # What training is expected to take from now on; None where nothing is known.
    seconds: float | None


@dataclass(frozen=True)
class Place:
    """Where to move a job: before another one, or to one end."""

    before: str | None = None
    first: bool = False


def offer(session: Session, settings: Settings, read: Reader) -> FairQueue[Job]:
    """The queue as it is now. Only the jobs that are come to are read, whoever else has thousands.

    Args:
        read: an owner's jobs of one priority in their order; called once and iterated later.
    """
    statement = (
        select(Job.priority, Job.owner, func.min(Job.place))
        .where(Job.status == JobStatus.QUEUED)
        .group_by(col(Job.priority), col(Job.owner))
    )
    lines = {
        (priority, owner): Line(place, read(priority, owner))
        for priority, owner, place in session.exec(statement)
    }
    standings = owners.standings(session, settings, {owner for _, owner in lines})
    return FairQueue(lines, standings, lambda job: job.place)


def read_line(session: Session, priority: int, owner: str, after: Job | None, limit: int) -> list[Job]:
    """The owner's next jobs of one priority, in their order, behind the job `after`."""
    place, job_id = col(Job.place), col(Job.id)
    statement = select(Job).where(
        Job.status == JobStatus.QUEUED, Job.priority == priority, Job.owner == owner
    )
    if after is not None:
        statement = statement.where(tuple_(place, job_id) > tuple_(literal(after.place), literal(after.id)))
    return list(session.exec(statement.order_by(place, job_id).limit(limit)))


def waiting(session: Session) -> list[Waiting]:
    """All queued jobs; each owner's in their order."""
    gpus = col(Job.spec)["gpus"].as_integer()
    columns = (Job.id, Job.owner, Job.priority, Job.place, Job.created_at, gpus, Job.expected_seconds)
    statement = (
        sa_select(*columns, Job.run_seconds)  # type: ignore[call-overload]
        .where(col(Job.status) == JobStatus.QUEUED)
        .order_by(col(Job.place), col(Job.id))
    )
    found = []
    for job_id, owner, priority, place, created_at, number, expected, ran in session.execute(statement):
        seconds = None if expected is None else max(expected - ran, 0.0)
        found.append(Waiting(job_id, owner, priority, place, created_at, number or 1, seconds))
    return found


def still_queued(session: Session, job_ids: Collection[str]) -> set[str]:
    """Those of the jobs that are queued."""
    statement = select(Job.id).where(Job.status == JobStatus.QUEUED, col(Job.id).in_(job_ids))
    return set(session.exec(statement))


def move(session: Session, job_id: str, owner: str | None, to: Place) -> Job:
    """Give a queued job another place among the queued jobs of its owner and priority.

    The jobs in between move up or down by one: the owner's places stay what they are, only who has which
    changes, so that nobody else's job waits longer or shorter for it.

    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: the job to put it before is no queued one of the same owner and priority.
        StateConflict: the job is not queued.
    """
    job = get_job(session, job_id, owner)
    owners.lock_line(session, job.owner)
    statement = select(Job.id, Job.place).where(
        Job.status == JobStatus.QUEUED, Job.priority == job.priority, Job.owner == job.owner
    )
    line = session.exec(statement.order_by(col(Job.place), col(Job.id)).with_for_update()).all()
    moved = [other for other, _ in line if other != job_id]
    if len(moved) == len(line):
        raise StateConflict(f"The job is {job.status}: only a queued one can be moved.")
    moved.insert(_index(moved, to), job_id)
    changed = [
        {"id": other, "place": place}
        for other, (before, place) in zip(moved, line, strict=True)
        if other != before
    ]
    if changed:
        session.execute(update(Job), changed)
        message = f"Moved to place {moved.index(job_id) + 1} of {len(moved)} of its owner's queued jobs."
        logs.append_entries(session, job_id, [Entry(message)])
    return job


def _index(line: list[str], to: Place) -> int:
    if to.before is None:
        return 0 if to.first else len(line)
    if to.before not in line:
        raise InvalidRequest(
            f"{to.before[:100]} is no other queued job of the same owner and priority.", param="before"
        )
    return line.index(to.before)
