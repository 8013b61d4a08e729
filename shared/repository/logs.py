"""Log entries, metrics and checkpoints of a job."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ScalarSelect, func, insert, update
from sqlalchemy import select as sa_select
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, delete, select

from shared.errors import LeaseLost, NotFound
from shared.events import Checkpoint, Entry
from shared.lifecycle import LEASED, JobStatus
from shared.repository.upsert import insert_into
from shared.tables import CheckpointRow, Job, LogEntry, Metric


def append_entries(session: Session, job_id: str, entries: Sequence[Entry], token: str | None = None) -> int:
    """Append entries and return the last one's seq; the numbers are allotted in this transaction.

    With a `token`, only while it holds the job's lease.

    Raises:
        LeaseLost: the token holds it no longer.
        NotFound: the job is gone.
    """
    statement = update(Job).where(col(Job.id) == job_id)
    if token is not None:
        statement = statement.where(col(Job.lease_token) == token, col(Job.status).in_(LEASED))
    statement = statement.values(last_seq=col(Job.last_seq) + len(entries))
    found = session.execute(statement.returning(col(Job.last_seq), col(Job.number))).first()
    if found is None:
        if token is not None:
            raise LeaseLost(job_id)
        raise NotFound(f"No job {job_id}.", param="id", code="job_not_found")
    last, number = found
    first = last - len(entries) + 1
    rows = [
        {
            "job_number": number,
            "seq": first + i,
            "time": entry.time,
            "level": entry.level,
            "type": entry.type,
            "message": entry.message,
            "data": entry.data,
        }
        for i, entry in enumerate(entries)
    ]
    session.execute(insert(LogEntry), rows)
    return int(last)


def number_of(job_id: str) -> ScalarSelect[int]:
    """What the rows of this job's log are kept under."""
    return select(Job.number).where(Job.id == job_id).scalar_subquery()


class StoredEntry(NamedTuple):
    """An entry as it is kept."""

    seq: int
    time: datetime
    level: str
    type: str
    message: str
    data: dict[str, Any] | None


def read_entries(session: Session, job_id: str, after: int, limit: int) -> list[StoredEntry]:
    """Up to `limit` entries with seq > `after`, oldest first."""
    # Columns, not objects: logs are read far more often than anything else, and this takes half the time.
    statement = (
        sa_select(*[col(getattr(LogEntry, name)) for name in StoredEntry._fields])
        .where(col(LogEntry.job_number) == number_of(job_id), col(LogEntry.seq) > after)
        .order_by(col(LogEntry.seq))
        .limit(limit)
    )
    return [StoredEntry._make(row) for row in session.execute(statement)]


def read_newest(session: Session, job_id: str, before: int | None, limit: int) -> list[StoredEntry]:
    """Up to `limit` entries with seq < `before` (None: from the end), newest first."""
    statement = sa_select(*[col(getattr(LogEntry, name)) for name in StoredEntry._fields]).where(
        col(LogEntry.job_number) == number_of(job_id)
    )
    if before is not None:
        statement = statement.where(col(LogEntry.seq) < before)
    rows = session.execute(statement.order_by(col(LogEntry.seq).desc()).limit(limit))
    return [StoredEntry._make(row) for row in rows]


def log_state(session: Session, job_id: str, owner: str | None) -> tuple[JobStatus, int]:
    """The job's status and the seq of its newest entry, without the rest of the row.

    Raises:
        NotFound: absent or somebody else's.
    """
    statement = select(Job.status, Job.last_seq).where(Job.id == job_id)
    if owner is not None:
        statement = statement.where(Job.owner == owner)
    found = session.exec(statement).first()
    if found is None:
        raise NotFound(f"No job {job_id}.", param="id", code="job_not_found")
    return JobStatus(found[0]), found[1]


def first_seq(session: Session, job_id: str) -> int:
    """The oldest entry that is kept; 1 while nothing was cut."""
    statement = select(func.min(LogEntry.seq)).where(col(LogEntry.job_number) == number_of(job_id))
    found = session.exec(statement).one()
    return int(found) if found is not None else 1


def put_metrics(session: Session, job_id: str, rows: Sequence[dict[str, Any]]) -> None:
    """Insert rows by their `step`; a step that is there already is replaced."""
    if not rows:
        return
    # A job that is resumed tells all of its rows again: one statement, and the last of a step's rows counts.
    last = {int(row["step"]): row for row in rows}
    number = session.exec(select(Job.number).where(Job.id == job_id)).one()
    statement = insert_into(session, Metric)
    statement = statement.on_conflict_do_update(
        index_elements=["job_number", "step"], set_={"values": statement.excluded["values"]}
    )
    session.execute(statement, [{"job_number": number, "step": s, "values": row} for s, row in last.items()])


def read_metrics(
    session: Session, job_id: str, after: int = -1, limit: int | None = None
) -> list[dict[str, Any]]:
    """One row a step, oldest first: those of steps > `after`, at most `limit`."""
    statement = select(col(Metric.values)).where(
        col(Metric.job_number) == number_of(job_id), col(Metric.step) > after
    )
    return [dict(values) for values in session.exec(statement.order_by(col(Metric.step)).limit(limit))]


def metrics_at(session: Session, job_id: str, steps: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The rows of these steps, by step."""
    statement = select(Metric.step, Metric.values).where(
        col(Metric.job_number) == number_of(job_id), col(Metric.step).in_(steps)
    )
    return {step: dict(values) for step, values in session.exec(statement)}


def last_metrics(session: Session, job_ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each job's row of its last step, by job id."""
    earlier = aliased(Metric)
    last = (
        select(func.max(earlier.step))
        .where(earlier.job_number == Job.number)
        .correlate(Job)
        .scalar_subquery()
    )
    statement = (
        select(Job.id, Metric.values)
        .join(Metric, (col(Metric.job_number) == col(Job.number)) & (col(Metric.step) == last))
        .where(col(Job.id).in_(job_ids))
    )
    return {job_id: dict(values) for job_id, values in session.exec(statement)}


def put_checkpoint(session: Session, job_id: str, checkpoint: Checkpoint, kept: Sequence[int]) -> None:
    """Record a complete checkpoint; those of steps that are not `kept` any more are forgotten."""
    forget_checkpoints(session, job_id, kept)
    session.merge(
        CheckpointRow(
            job_id=job_id,
            step=checkpoint.step,
            created_at=checkpoint.created_at,
            bytes=checkpoint.bytes,
            metrics=checkpoint.metrics,
        )
    )


def forget_checkpoints(session: Session, job_id: str, kept: Sequence[int]) -> None:
    """Forget the checkpoints of all steps but these."""
    session.exec(
        delete(CheckpointRow).where(col(CheckpointRow.job_id) == job_id, col(CheckpointRow.step).not_in(kept))
    )


def read_checkpoints(session: Session, job_id: str) -> list[CheckpointRow]:
    statement = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
    return list(session.exec(statement.order_by(col(CheckpointRow.step))))
