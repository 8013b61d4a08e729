"""Files made after their job: asked for, claimed, made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

from sqlalchemy import func
from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.errors import LeaseLost
from shared.events import Entry
from shared.exports import export_words
from shared.ids import new_export_id
from shared.lifecycle import UNDER_WAY, ExportStatus, FailureCode
from shared.repository import logs
from shared.tables import ExportTask, Job


def find_latest(session: Session, job_id: str, fmt: str, checkpoint: int | None) -> ExportTask | None:
    """The newest task for this file."""
    statement = select(ExportTask).where(ExportTask.job_id == job_id, ExportTask.format == fmt)
    statement = statement.where(
        col(ExportTask.checkpoint).is_(None) if checkpoint is None else ExportTask.checkpoint == checkpoint
    )
    return session.exec(statement.order_by(col(ExportTask.created_at).desc()).limit(1)).first()


def add_export(
    session: Session, job_id: str, fmt: str, checkpoint: int | None, *, done: bool = False
) -> ExportTask:
    """Queue a task; `done` for a file that is there already."""
    task = ExportTask(
        id=new_export_id(),
        job_id=job_id,
        format=fmt,
        checkpoint=checkpoint,
        status=ExportStatus.SUCCEEDED if done else ExportStatus.QUEUED,
        finished_at=utcnow() if done else None,
    )
    session.add(task)
    if not done:
        words = export_words(fmt, checkpoint)
        logs.append_entries(session, job_id, [Entry(f"Export of {words} was asked for.", data=_about(task))])
    return task


def count_queued(session: Session, owner: str) -> int:
    statement = select(func.count()).select_from(ExportTask).join(Job)
    return session.exec(statement.where(Job.owner == owner, ExportTask.status == ExportStatus.QUEUED)).one()


def exports_of(session: Session, job_ids: Collection[str]) -> dict[str, list[ExportTask]]:
    """The tasks of several jobs by job id, oldest first."""
    found: dict[str, list[ExportTask]] = {job_id: [] for job_id in job_ids}
    statement = select(ExportTask).where(col(ExportTask.job_id).in_(job_ids))
    for task in session.exec(statement.order_by(col(ExportTask.created_at), col(ExportTask.id))):
        found[task.job_id].append(task)
    return found


def claim_export(
    session: Session,
    worker: str,
    token: str,
    expires_at: datetime,
    can_make: Callable[[ExportTask], bool],
    put_off: Collection[str] = (),
) -> ExportTask | None:
    """Take the next task that this worker can make, by its job's priority, then by age; None if none is left.

    One that it can't make is passed by, which the task remembers; those that are `put_off` (ids) wait.
    """
    statement = (
        select(ExportTask)
        .join(Job)
        .where(ExportTask.status == ExportStatus.QUEUED)
        .order_by(col(Job.priority), col(ExportTask.created_at), col(ExportTask.id))
        .with_for_update(skip_locked=True)
    )
    for task in session.exec(statement):
        if worker in task.passed_by or task.id in put_off:
            continue
        if not can_make(task):
            task.passed_by = [*task.passed_by, worker]
            continue
        task.status = ExportStatus.RUNNING
        task.worker = worker
        task.lease_token = token
        task.lease_expires_at = expires_at
        task.attempt += 1
        task.started_at = task.started_at or utcnow()
        words = export_words(task.format, task.checkpoint)
        entry = Entry(f"Export of {words}: claimed by worker {worker}.", data=_about(task))
        logs.append_entries(session, task.job_id, [entry])
        return task
    return None


def fail_unmakeable(session: Session, live_workers: Collection[str]) -> None:
    """Fail the queued tasks that every worker on line has passed by."""
    statement = select(ExportTask).join(Job).where(ExportTask.status == ExportStatus.QUEUED)
    for task in session.exec(statement.with_for_update(skip_locked=True)):
        if live_workers and set(live_workers) <= set(task.passed_by):
            message = f"The checkpoint of step {task.checkpoint} is on no worker that is on line."
            fail(session, task, FailureCode.EXPORT_FAILED, message, "Start the worker that trained the job.")


def owned_export(session: Session, job_id: str, task_id: str, token: str) -> ExportTask:
    """The task, locked with its job, if this token still holds its lease.

    Raises:
        LeaseLost: another attempt has it, it was cancelled, or its job was deleted.
    """
    # The job first, as whoever cancels or deletes does: two that lock in another order wait for each other.
    session.exec(select(Job.id).where(Job.id == job_id).with_for_update()).first()
    statement = select(ExportTask).where(ExportTask.id == task_id, ExportTask.lease_token == token)
    task = session.exec(statement.with_for_update()).first()
    if task is None:
        raise LeaseLost(task_id)
    return task


def still_queued(session: Session, task_ids: Collection[str]) -> set[str]:
    """Those of the tasks that are queued."""
    statement = select(ExportTask.id).where(ExportTask.status == ExportStatus.QUEUED)
    return set(session.exec(statement.where(col(ExportTask.id).in_(task_ids))))


def expired_exports(session: Session, now: datetime) -> list[ExportTask]:
    """Tasks whose worker has not been heard of in time, locked."""
    statement = (
        select(ExportTask)
        .join(Job)
        .where(ExportTask.status == ExportStatus.RUNNING, col(ExportTask.lease_expires_at) < now)
    )
    return list(session.exec(statement.with_for_update(skip_locked=True)))


def any_under_way(session: Session) -> bool:
    statement = select(ExportTask.id).where(col(ExportTask.status).in_(UNDER_WAY))
    return session.exec(statement.limit(1)).first() is not None


def live_tokens(session: Session) -> set[str]:
    """The lease tokens of all attempts that run."""
    statement = select(ExportTask.lease_token).where(ExportTask.status == ExportStatus.RUNNING)
    return {str(token) for token in session.exec(statement)}


def give_back(session: Session, task: ExportTask, why: str) -> None:
    """End an attempt that was stopped: the task is queued again."""
    _release(task, ExportStatus.QUEUED)
    words = export_words(task.format, task.checkpoint)
    entry = Entry(f"Export of {words}: {why} It is queued again.", level="warning", data=_about(task))
    logs.append_entries(session, task.job_id, [entry])


def lose(session: Session, task: ExportTask, why: str, max_losses: int) -> None:
    """End an attempt whose process died: as `give_back`, but failed when that has happened too often."""
    task.losses += 1
    if task.losses < max_losses:
        give_back(session, task, why)
        return
    message = f"{why} That has now happened {task.losses} times."
    fail(
        session,
        task,
        FailureCode.WORKER_LOST,
        message,
        "Look at the log's last entries, then ask for it again.",
    )


def succeed(session: Session, task: ExportTask) -> None:
    _release(task, ExportStatus.SUCCEEDED)
    entry = Entry(f"Export of {export_words(task.format, task.checkpoint)}: done.", data=_about(task))
    logs.append_entries(session, task.job_id, [entry])


def fail(session: Session, task: ExportTask, code: FailureCode, message: str, advice: str) -> None:
    """End the task; its job stays as it is."""
    _release(task, ExportStatus.FAILED)
    task.failure = {"code": code, "message": message, "advice": advice}
    text = f"Export of {export_words(task.format, task.checkpoint)} failed: {message} {advice}".strip()
    entry = Entry(text, level="error", data=_about(task) | task.failure)
    logs.append_entries(session, task.job_id, [entry])


def cancel_exports(session: Session, job_id: str) -> bool:
    """Cancel the job's exports that are under way; whether there were any. Their processes find out."""
    statement = select(ExportTask).where(ExportTask.job_id == job_id, col(ExportTask.status).in_(UNDER_WAY))
    tasks = list(session.exec(statement.with_for_update()))
    for task in tasks:
        _release(task, ExportStatus.CANCELLED)
        words = export_words(task.format, task.checkpoint)
        logs.append_entries(session, job_id, [Entry(f"Export of {words}: cancelled.", data=_about(task))])
    return bool(tasks)


def _release(task: ExportTask, status: ExportStatus) -> None:
    task.status = status
    task.worker = task.lease_token = task.lease_expires_at = None
    task.finished_at = None if status == ExportStatus.QUEUED else utcnow()


def _about(task: ExportTask) -> dict[str, Any]:
    return {"export": task.id, "format": task.format, "checkpoint": task.checkpoint}
