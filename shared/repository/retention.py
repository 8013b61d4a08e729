"""What is old enough to be removed, and removing its rows: of jobs that have ended, never while in use."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import exists, func, or_
from sqlmodel import Session, col, delete, select
from sqlmodel.sql.expression import SelectOfScalar

from shared.events import Entry
from shared.lifecycle import TERMINAL, UNDER_WAY
from shared.repository import exports, files, logs
from shared.repository.files import RECORDS
from shared.tables import ArtifactRow, CheckpointCopy, DatasetRow, Job, LogEntry, UploadPartRow


def lock_unused(session: Session, job_id: str) -> Job | None:
    """The job, locked, if it has ended and nothing is being made of it."""
    job = session.exec(select(Job).where(Job.id == job_id).with_for_update()).first()
    if job is None or job.status not in TERMINAL:
        return None
    tasks = exports.exports_of(session, [job_id])[job_id]
    return None if any(task.status in UNDER_WAY for task in tasks) else job


def old_models(session: Session, before: datetime | None, keep: int | None) -> list[str]:
    """Jobs that still have model files, and ended before then or are not among their owner's last `keep`."""
    with_files = select(ArtifactRow.job_id).where(col(ArtifactRow.kind).not_in(RECORDS))
    rank = func.row_number().over(
        partition_by=col(Job.owner), order_by=(col(Job.finished_at).desc(), col(Job.id).desc())
    )
    ended = (
        select(Job.id, Job.finished_at, rank.label("rank"))
        .where(col(Job.status).in_(TERMINAL), col(Job.id).in_(with_files))
        .subquery()
    )
    conditions = []
    if before is not None:
        conditions.append(ended.c.finished_at < before)
    if keep is not None:
        conditions.append(ended.c.rank > keep)
    if not conditions:
        return []
    return list(session.exec(select(ended.c.id).where(or_(*conditions)).order_by(ended.c.finished_at)))


def model_bytes(session: Session, job_id: str) -> int:
    statement = select(func.sum(ArtifactRow.bytes)).where(
        ArtifactRow.job_id == job_id, col(ArtifactRow.kind).not_in(RECORDS)
    )
    return int(session.exec(statement).one() or 0)


def remove_model(session: Session, job_id: str, why: str) -> list[str]:
    """Forget a job's model files and say so in its log; returns their store keys, none if it is in use."""
    if lock_unused(session, job_id) is None:
        return []
    keys = files.forget_model(session, job_id)
    if keys:
        tell(session, job_id, f"The job's {len(keys)} model files were removed: {why}.")
    return keys


def long_logs(session: Session, before: datetime | None, keep: int | None) -> list[tuple[str, int]]:
    """Ended jobs whose logs are to be cut, and how many entries are to be left: of an old job the last."""
    found: dict[str, int] = {}
    if keep is not None:
        found |= dict.fromkeys(session.exec(_longer_than(keep)), keep)
    if before is not None:
        found |= dict.fromkeys(session.exec(_longer_than(1).where(col(Job.finished_at) < before)), 1)
    return list(found.items())


def _longer_than(entries: int) -> SelectOfScalar[str]:
    """Ended jobs with more entries than that: one look into the log's index for each."""
    more = exists().where(
        col(LogEntry.job_number) == col(Job.number), col(LogEntry.seq) <= col(Job.last_seq) - entries
    )
    return select(Job.id).where(col(Job.status).in_(TERMINAL), more)


def cut_log(session: Session, job_id: str, keep: int, why: str) -> int:
    """Cut the front of a log; the entry that says so is one of those that are left. How many were cut."""
    job = lock_unused(session, job_id)
    if job is None:
        return 0
    first, last = logs.first_seq(session, job_id), job.last_seq
    cut = last - (keep - 1)
    if cut < first:
        return 0
    session.exec(delete(LogEntry).where(col(LogEntry.job_number) == job.number, col(LogEntry.seq) <= cut))
    tell(session, job_id, f"{cut - first + 1} entries of this log were removed: {why}.")
    return cut - first + 1


def known_keys(session: Session, keys: Collection[str]) -> set[str]:
    """Those of the store's keys that a row names.

    Found by the ids in them, which have indexes: whoever has a million files has as many rows.
    """
    ids = {key.split("/")[1] for key in keys}
    found: set[str] = set()
    for key, of in (
        (ArtifactRow.key, ArtifactRow.job_id),
        (CheckpointCopy.key, CheckpointCopy.job_id),
        (DatasetRow.key, DatasetRow.id),
        (DatasetRow.key, DatasetRow.job_id),
        (UploadPartRow.key, UploadPartRow.upload_id),
    ):
        found |= set(session.exec(select(key).where(col(of).in_(ids))))
    return found & set(keys)


def tell(session: Session, job_id: str, message: str) -> None:
    logs.append_entries(session, job_id, [Entry(message, level="warning")])
