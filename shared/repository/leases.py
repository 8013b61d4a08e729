"""Claims and leases: who may run and write for a job."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import ValidationError
from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.device import DeviceKind
from shared.errors import LeaseLost
from shared.events import Entry
from shared.lifecycle import LEASED, FailureCode, JobStatus, Phase
from shared.repository import logs, tallies
from shared.repository.jobs import set_status
from shared.savings import EXPORT_MEMORY_ADVICE, MACHINE_MEMORY_ADVICE, lost_advice, memory_advice
from shared.spec import JobSpec
from shared.tables import Job

# How often a job that ran out of memory is tried under a cheaper plan.
MEMORY_RETRIES = 4
OUT_OF_MEMORY = "out of memory"


def claim(session: Session, job_id: str, worker: str, token: str, expires_at: datetime) -> Job | None:
    """Take a queued job under a new lease; None if it is queued no longer.

    Two claimers never get the same job: SQLite's write transaction is alone, PostgreSQL skips locked rows.
    """
    job = lock_queued(session, job_id)
    if job is None:
        return None
    now = utcnow()
    if job.started_at is None:
        tallies.observe(session, job.owner, tallies.WAITING, (now - job.created_at).total_seconds())
    set_status(
        job,
        JobStatus.RUNNING,
        worker=worker,
        lease_token=token,
        lease_expires_at=expires_at,
        attempt=job.attempt + 1,
        started_at=job.started_at or now,
        attempt_started_at=now,
        progress=None,
    )
    entry = Entry(f"Claimed by worker {worker}.", data={"attempt": job.attempt, "worker": worker})
    logs.append_entries(session, job.id, [entry])
    return job


def lock_queued(session: Session, job_id: str) -> Job | None:
    """The job, locked, if it is queued and nobody else is just claiming it."""
    statement = (
        select(Job).where(Job.id == job_id, Job.status == JobStatus.QUEUED).with_for_update(skip_locked=True)
    )
    return session.exec(statement).first()


def owned_job(session: Session, job_id: str, token: str) -> Job:
    """The job, locked, if this token still holds its lease: what every write of a child starts with.

    Raises:
        LeaseLost: another attempt has the job, or it has ended.
    """
    statement = select(Job).where(Job.id == job_id, Job.lease_token == token).with_for_update()
    job = session.exec(statement).first()
    if job is None or job.status not in LEASED:
        raise LeaseLost(job_id)
    return job


def renew(session: Session, job_id: str, token: str, expires_at: datetime) -> JobStatus:
    """Extend the lease and tell the job's status, so that a request to stop is noticed.

    Raises:
        LeaseLost: this token holds it no longer.
    """
    job = owned_job(session, job_id, token)
    job.lease_expires_at = expires_at
    return JobStatus(job.status)


def expired_leases(session: Session, now: datetime) -> list[Job]:
    """Jobs whose worker has not been heard of in time, locked; by owner, for ending them locks owners too."""
    statement = (
        select(Job)
        .where(col(Job.status).in_(LEASED), col(Job.lease_expires_at) < now)
        .order_by(col(Job.owner))
        .with_for_update(skip_locked=True)
    )
    return list(session.exec(statement))


def give_back(session: Session, job: Job, why: str) -> None:
    """End an attempt that was stopped on purpose: cancelled or paused if that was asked for, else queued."""
    if job.status == JobStatus.CANCELLING:
        set_status(job, JobStatus.CANCELLED)
        entry = Entry("Cancelled.")
    elif job.status == JobStatus.PAUSING:
        set_status(job, JobStatus.PAUSED)
        step = job.progress["step"] if job.progress else None
        entry = Entry(f"Paused after step {step}." if step else "Paused.", data={"step": step})
    else:
        set_status(job, JobStatus.QUEUED)
        entry = Entry(f"{why} The job goes back to the queue.", level="warning")
    logs.append_entries(session, job.id, [entry])


def fail(session: Session, job: Job, code: FailureCode, message: str, advice: str) -> None:
    """End the job, and say in its log what went wrong and what to do about it."""
    failure = {"code": code, "message": message, "advice": advice}
    set_status(job, JobStatus.FAILED, failure=failure)
    logs.append_entries(session, job.id, [Entry(f"Failed: {message} {advice}", level="error", data=failure)])


def lose(session: Session, job: Job, why: str, max_losses: int) -> None:
    """End an attempt whose process died: as `give_back`, but failed when that has happened too often."""
    job.losses += 1
    if job.status in (JobStatus.CANCELLING, JobStatus.PAUSING) or job.losses < max_losses:
        give_back(session, job, why)
        return
    message = f"{why} That has now happened {job.losses} times."
    fail(session, job, FailureCode.WORKER_LOST, message, lost_advice(_spec_of(job), _kind_of(job)))


def run_out_of_memory(session: Session, job: Job, message: str, *, of_machine: bool) -> None:
    """End an attempt that ran out of memory: queued again for a cheaper plan, or failed with what to change.

    `plan_history` says of the attempt's plan that it ran out of memory, and after which step.

    Args:
        of_machine: it was main memory: no plan for a GPU changes that, nor one for the CPU while data is
            prepared.
    """
    kind = _kind_of(job)
    if job.phase == Phase.EXPORTING:
        advice = EXPORT_MEMORY_ADVICE
    elif of_machine and (kind == "cuda" or job.phase == Phase.PREPARING_DATA):
        advice = MACHINE_MEMORY_ADVICE
    else:
        step = job.progress["step"] if job.progress else 0
        if job.plan_history:
            last = job.plan_history[-1] | {"reason": OUT_OF_MEMORY, "step": step}
            job.plan_history = [*job.plan_history[:-1], last]
            if len(plans_too_large(job)) <= MEMORY_RETRIES:
                when = f"after step {step}" if step else "before this attempt's first step"
                give_back(session, job, f"{message} That was {when}.")
                return
        advice = memory_advice(JobSpec.from_json(job.spec), kind)
    fail(session, job, FailureCode.OUT_OF_MEMORY, message, advice)


def _kind_of(job: Job) -> DeviceKind:
    kind: DeviceKind = job.plan["device"] if job.plan else "cpu"
    return kind


def _spec_of(job: Job) -> JobSpec | None:
    """None if this version does not understand it: whoever recovers a job need not be who ran it."""
    try:
        return JobSpec.from_json(job.spec)
    except ValidationError:
        return None


def plans_too_large(job: Job) -> list[dict[str, Any]]:
    """The plans under which the job has run out of memory."""
    return [entry["plan"] for entry in job.plan_history if entry.get("reason") == OUT_OF_MEMORY]


class Holder(NamedTuple):
    """Where a job is and whose: `token` is None while it is nobody's."""

    status: JobStatus
    token: str | None
    phase: Phase | None


def holders(session: Session, job_ids: Sequence[str]) -> dict[str, Holder]:
    """Who holds each of these jobs that there is."""
    statement = select(Job.id, Job.status, Job.lease_token, Job.phase).where(col(Job.id).in_(job_ids))
    return {
        job_id: Holder(JobStatus(status), token, Phase(phase) if phase else None)
        for job_id, status, token, phase in session.exec(statement)
    }
