"""Jobs: create, find, page, count and change status."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import delete, exists, func, literal, or_, tuple_
from sqlalchemy.orm import aliased, object_session
from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.columns import UtcDateTime
from shared.errors import InvalidRequest, NotFound, StateConflict
from shared.events import Entry
from shared.lifecycle import LEASED, OPEN, TERMINAL, JobStatus, check_transition
from shared.repository import exports, logs, owners, tallies
from shared.tables import ArtifactRow, DatasetRow, IdempotencyKey, Job, JobLabel, Webhook

IDEMPOTENCY_HOURS = 24


# The order of claims.
PRIORITIES = {"high": 0, "normal": 1, "low": 2}

Row = TypeVar("Row", Job, DatasetRow, Webhook)


@dataclass(frozen=True)
class Page:
    """Which part of a list: up to `limit` rows that come after the row with id `after`, newest first."""

    after: str | None = None
    limit: int = 20
    oldest_first: bool = False


def add_job(session: Session, job: Job, entry: Entry) -> None:
    """Insert the job with the first entry of its log."""
    session.add(job)
    session.flush()
    session.add_all(
        [
            JobLabel(job_id=job.id, key=key, value=value, owner=job.owner, created_at=job.created_at)
            for key, value in job.user_metadata.items()
        ]
    )
    logs.append_entries(session, job.id, [entry])


def get_job(session: Session, job_id: str, owner: str | None) -> Job:
    """The job, if `owner` may see it (None: everybody's).

    Raises:
        NotFound: absent or somebody else's.
    """
    return _visible(session.get(Job, job_id), job_id, owner)


def find_jobs(session: Session, job_ids: Collection[str]) -> list[Job]:
    """Those of the jobs that there are."""
    return list(session.exec(select(Job).where(col(Job.id).in_(job_ids))))


def lock_job(session: Session, job_id: str, owner: str | None) -> Job:
    """The same, locked until the transaction ends.

    Raises:
        NotFound: absent or somebody else's.
    """
    statement = select(Job).where(Job.id == job_id).with_for_update()
    return _visible(session.exec(statement).first(), job_id, owner)


def _visible(job: Job | None, job_id: str, owner: str | None) -> Job:
    if job is None or (owner is not None and job.owner != owner):
        raise NotFound(f"No job {job_id}.", param="id", code="job_not_found")
    return job


def list_jobs(
    session: Session,
    owner: str | None,
    page: Page,
    *,
    status: JobStatus | None = None,
    model: str | None = None,
    metadata: Mapping[str, str] | None = None,
    without_metadata: bool = False,
) -> tuple[list[Job], bool]:
    """One page, newest first, and whether there are more.

    Raises:
        InvalidRequest: `after` names no job that the owner may see.
    """
    statement = select(Job)
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    if status is not None:
        statement = statement.where(Job.status == status)
    if model is not None:
        statement = statement.where(Job.model == model)
    if without_metadata:
        statement = statement.where(~exists().where(col(JobLabel.job_id) == col(Job.id)))
    order: tuple[Any, Any] | None = None
    for key, value in (metadata or {}).items():
        label = aliased(JobLabel)
        statement = statement.join(label, col(label.job_id) == col(Job.id))
        statement = statement.where(label.key == key, label.value == value)
        if order is None:
            # The first of them gives the order, for its index has the jobs in it.
            order = (label.created_at, label.job_id)
            if owner is not None:
                statement = statement.where(label.owner == owner)
    return read_page(session, Job, statement, page, lambda after: get_job(session, after, owner), order)


def read_page(
    session: Session,
    table: type[Row],
    statement: Any,
    page: Page,
    find: Callable[[str], Row],
    order: tuple[Any, Any] | None = None,
) -> tuple[list[Row], bool]:
    """One page of the rows that `statement` selects, in the page's order, and whether there are more.

    Args:
        find: the row of the id that the page comes after, or NotFound.
        order: columns that hold the rows' time and id too, if the page is to be read by them.

    Raises:
        InvalidRequest: that row is not there to be seen.
    """
    made, row_id = order or (col(table.created_at), col(table.id))
    if page.after is not None:
        try:
            start = find(page.after)
        except NotFound as error:
            told = error.message.removesuffix(".")
            raise InvalidRequest(f"{told} to page on after.", param="after") from error
        # One comparison of both, for then an index is entered at the place.
        here, there = tuple_(made, row_id), tuple_(literal(start.created_at, UtcDateTime), literal(start.id))
        statement = statement.where(here > there if page.oldest_first else here < there)
    by = (made, row_id) if page.oldest_first else (made.desc(), row_id.desc())
    rows = list(session.exec(statement.order_by(*by).limit(page.limit + 1)))
    return rows[: page.limit], len(rows) > page.limit


def count_by_status(session: Session, owner: str | None) -> dict[str, int]:
    """How many jobs are in each status. Those that have ended were counted as they did."""
    statement = select(Job.status, func.count()).where(col(Job.status).in_(OPEN)).group_by(Job.status)
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    counts = dict(session.exec(statement).all())
    ended = tallies.read(session, owner, [tallies.JOBS])[tallies.JOBS]
    return counts | {status: found.times for status, found in ended.items() if found.times}


def set_status(job: Job, target: JobStatus, **changes: Any) -> None:
    """Take the job to another status, as the transition table allows.

    A finished job has no phase and no lease; a job given back to the queue has neither. An attempt that ends
    by it is counted for the job's owner.

    Raises:
        StateConflict: the table does not hold this step.
    """
    check_transition(JobStatus(job.status), target)
    job.status = target
    if target in TERMINAL:
        job.finished_at = utcnow()
    if target not in LEASED:
        if job.attempt_started_at is not None:
            now = utcnow()
            job.run_seconds += (now - job.attempt_started_at).total_seconds()
            session = object_session(job)
            if isinstance(session, Session):
                owners.charge(session, job, now)
        job.attempt_started_at = None
        job.phase = None
        job.lease_token = None
        job.lease_expires_at = None
        job.worker = None
    for name, value in changes.items():
        setattr(job, name, value)
    if target in TERMINAL:
        _count_end(job)


def _count_end(job: Job) -> None:
    session = object_session(job)
    if not isinstance(session, Session):
        return
    tallies.count(session, job.owner, tallies.JOBS, job.status)
    if job.started_at is not None:
        tallies.observe(session, job.owner, tallies.RUNNING, job.run_seconds)
    if job.status == JobStatus.FAILED and job.failure:
        tallies.count(session, job.owner, tallies.FAILURES, job.failure["code"])


def request_cancel(session: Session, job_id: str, owner: str | None) -> Job:
    """Cancel at once what no worker holds; ask the worker of a running job to stop. Of a job that has
    succeeded, the exports that are under way are cancelled.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job succeeded or failed before.
    """
    job = lock_job(session, job_id, owner)
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return job
    if job.status == JobStatus.SUCCEEDED and exports.cancel_exports(session, job_id):
        return job
    if job.status in TERMINAL:
        raise StateConflict(f"The job {_where(job)}: there is nothing to cancel.")
    if job.status in (JobStatus.QUEUED, JobStatus.PAUSED):
        set_status(job, JobStatus.CANCELLED)
        logs.append_entries(session, job_id, [Entry("Cancelled before it ran.")])
    else:
        set_status(job, JobStatus.CANCELLING)
        logs.append_entries(session, job_id, [Entry("Cancelling: the job ends at its next step.")])
    return job


def request_pause(session: Session, job_id: str, owner: str | None) -> Job:
    """Pause at once what no worker holds; ask the worker of a running job to leave with a checkpoint.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job has ended or is being cancelled.
    """
    job = lock_job(session, job_id, owner)
    if job.status in (JobStatus.PAUSING, JobStatus.PAUSED):
        return job
    if job.status == JobStatus.QUEUED:
        set_status(job, JobStatus.PAUSED)
        logs.append_entries(session, job_id, [Entry("Paused while it waited.")])
    elif job.status == JobStatus.RUNNING:
        set_status(job, JobStatus.PAUSING)
        logs.append_entries(
            session, job_id, [Entry("Pausing: the job leaves at the end of its step, with a checkpoint.")]
        )
    else:
        raise StateConflict(f"The job {_where(job)}: there is nothing to pause.")
    return job


def request_resume(session: Session, job_id: str, owner: str | None) -> Job:
    """Put a paused job back into the queue; one that waits or runs already stays as it is.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job has ended, is being cancelled, or is not paused yet.
    """
    job = lock_job(session, job_id, owner)
    if job.status in (JobStatus.QUEUED, JobStatus.RUNNING):
        return job
    if job.status == JobStatus.PAUSING:
        raise StateConflict("The job is still pausing: resume it once it is paused.")
    if job.status != JobStatus.PAUSED:
        raise StateConflict(f"The job {_where(job)}: there is nothing to resume.")
    set_status(job, JobStatus.QUEUED)
    logs.append_entries(session, job_id, [Entry("Resumed: the job is back in the queue.")])
    return job


def _where(job: Job) -> str:
    return f"has already {job.status}" if job.status in TERMINAL else f"is {job.status}"


def delete_job(session: Session, job_id: str, owner: str | None) -> None:
    """Delete a finished job with its log, metrics and artifact rows.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: the job has not ended.
    """
    job = lock_job(session, job_id, owner)
    if job.status not in TERMINAL:
        raise StateConflict(f"The job is {job.status}: cancel it first, then delete it.")
    stored = select(func.sum(ArtifactRow.bytes)).where(ArtifactRow.job_id == job_id)
    owners.count_stored(session, job.owner, -int(session.exec(stored).one() or 0))
    tallies.count(session, job.owner, tallies.JOBS, job.status, -1)
    session.delete(job)


def find_idempotent(session: Session, owner: str, key: str) -> IdempotencyKey | None:
    """What this owner made with this key in the last 24 hours."""
    oldest = utcnow() - timedelta(hours=IDEMPOTENCY_HOURS)
    statement = select(IdempotencyKey).where(IdempotencyKey.owner == owner, IdempotencyKey.key == key)
    return session.exec(statement.where(col(IdempotencyKey.created_at) >= oldest)).first()


def put_idempotent(session: Session, owner: str, key: str, body_hash: str, job_id: str) -> None:
    """Remember what this owner made with this key; keys of yesterday are forgotten."""
    oldest = utcnow() - timedelta(hours=IDEMPOTENCY_HOURS)
    session.exec(delete(IdempotencyKey).where(col(IdempotencyKey.created_at) < oldest))
    session.add(IdempotencyKey(owner=owner, key=key, body_hash=body_hash, job_id=job_id))


def leased_jobs(session: Session, owner: str | None) -> list[tuple[str, str]]:
    """Worker and job id of every job that a worker holds and the owner may see."""
    statement = select(Job.worker, Job.id).where(col(Job.status).in_(LEASED), col(Job.worker).is_not(None))
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    return [(str(worker), job_id) for worker, job_id in session.exec(statement.order_by(col(Job.id)))]


def tokens_per_second(session: Session, owner: str | None) -> float:
    """What the jobs that train now do together, of those that the owner may see."""
    statement = select(Job.progress).where(Job.status == JobStatus.RUNNING)
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    return sum((progress or {}).get("tokens_per_second") or 0.0 for progress in session.exec(statement))


class HeldSlots(NamedTuple):
    """A job on a worker's slots, and what is known of its end."""

    worker: str
    gpus: int
    since: datetime
    # Of this attempt, by the estimate from when the job was posted.
    expected_seconds: float | None
    # From now on, by its own speed.
    eta_seconds: float | None


def held_slots(session: Session) -> list[HeldSlots]:
    """What every worker's slots are taken by."""
    statement = select(Job).where(col(Job.status).in_(LEASED), col(Job.worker).is_not(None))
    return [
        HeldSlots(
            str(job.worker),
            owners.gpus_of(job),
            job.attempt_started_at or utcnow(),
            job.expected_seconds - job.run_seconds if job.expected_seconds is not None else None,
            (job.progress or {}).get("eta_seconds"),
        )
        for job in session.exec(statement)
    ]


def uses_dataset(session: Session, dataset_id: str) -> bool:
    """Whether a job that has not ended needs the uploaded file."""
    spec = col(Job.spec)
    statement = select(Job.id).where(
        col(Job.status).in_(OPEN),
        or_(
            spec["dataset"]["file_id"].as_string() == dataset_id,
            spec["validation_dataset"]["file_id"].as_string() == dataset_id,
        ),
    )
    return session.exec(statement.limit(1)).first() is not None


def oldest_queued(session: Session, owner: str | None) -> datetime | None:
    """When the longest waiting job was created, of those that the owner may see."""
    statement = select(func.min(Job.created_at)).where(Job.status == JobStatus.QUEUED)
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    return session.exec(statement).one()
