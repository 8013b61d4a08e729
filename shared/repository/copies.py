"""Copies of checkpoints in the store: of a job that is under way at most one, of its newest checkpoint."""

from __future__ import annotations

from sqlmodel import Session, col, select

from shared.lifecycle import TERMINAL
from shared.tables import CheckpointCopy, Job


def find_copy(session: Session, job_id: str) -> CheckpointCopy | None:
    return session.get(CheckpointCopy, job_id)


def put_copy(session: Session, copy: CheckpointCopy) -> str | None:
    """Make it the job's copy; returns the key of the one before, which is nobody's from now on."""
    earlier = session.get(CheckpointCopy, copy.job_id)
    key = earlier.key if earlier else None
    session.merge(copy)
    return key


def copies_of_ended(session: Session) -> list[CheckpointCopy]:
    """Those that nobody will go on from any more."""
    statement = select(CheckpointCopy).join(Job).where(col(Job.status).in_(TERMINAL))
    return list(session.exec(statement.order_by(col(CheckpointCopy.job_id))))


def forget_copy(session: Session, job_id: str) -> str | None:
    """Forget the copy of a job that has ended; its key, None if it is gone already."""
    # Nothing leaves that status, and no attempt of such a job writes.
    copy = session.exec(
        select(CheckpointCopy).where(CheckpointCopy.job_id == job_id).with_for_update()
    ).first()
    if copy is None:
        return None
    session.delete(copy)
    return copy.key
