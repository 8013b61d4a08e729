"""Owners: what they have used, their quotas, and how they stand in the queue."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import func
from sqlmodel import Session, col, select

from shared.clock import month_of, utcnow
from shared.errors import QuotaExceeded
from shared.fairness import Standing, counted, counted_while_running, faded
from shared.lifecycle import LEASED, JobStatus
from shared.repository import exports
from shared.settings import Settings
from shared.tables import Job, OwnerRow

UNLIMITED = -1
ADVICE = {
    "queued_jobs": "Cancel one, or wait until one starts.",
    "queued_exports": "Wait until one is made.",
    "running_jobs": "The next one starts when one of them has ended.",
    "gpu_hours": "They count from the first of the month (UTC).",
    "stored_bytes": "Delete datasets or finished jobs that you no longer need.",
}


@dataclass(frozen=True)
class Quota:
    """What an owner has used of something, and the most that it may; None: any amount."""

    name: str
    used: float
    limit: float | None

    def check(self, more: float = 0) -> None:
        """
        Raises:
            QuotaExceeded: `more` would be over the limit; with 0 more, nothing is left.
        """
        if self.limit is None:
            return
        if self.used + more <= self.limit if more else self.used < self.limit:
            return
        used, limit = f"{self.used:,.10g}", f"{self.limit:,.10g}"
        asked = f", and this takes {more:,.10g} more" if more > 1 else ""
        raise QuotaExceeded(
            f"Your quota of {self.name.replace('_', ' ')} is used up: {used} of {limit}{asked}. "
            f"{ADVICE[self.name]} The server's operator may raise it.",
            param=f"quotas.{self.name}",
        )


class Running(NamedTuple):
    """A job that holds GPUs now."""

    owner: str
    gpus: int
    since: datetime


def lock_owner(session: Session, owner: str) -> None:
    """Let no other transaction create jobs or count for this owner until this one ends.

    Quotas and idempotency keys are counted first and written then. SQLite's write transaction is alone
    anyway. Rows of jobs and files are locked before their owner, never after.
    """
    _lock(session, owner)


def lock_line(session: Session, owner: str) -> None:
    """Let no other transaction move this owner's jobs: two that lock many rows would wait for each other.

    Taken before the rows of the jobs, so it is none of the lock above.
    """
    _lock(session, f"line of {owner}")


def _lock(session: Session, name: str) -> None:
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtext(name))))


def lock_row(session: Session, owner: str) -> OwnerRow:
    """The owner's row, locked, made where there is none."""
    lock_owner(session, owner)
    row = session.get(OwnerRow, owner, with_for_update=True)
    if row is None:
        row = OwnerRow(name=owner)
        session.add(row)
        session.flush()
    return row


def charge(session: Session, job: Job, now: datetime) -> None:
    """Count the attempt that ends now for the job's owner."""
    if job.attempt_started_at is None:
        return
    row = lock_row(session, job.owner)
    gpus = gpus_of(job)
    ran = (now - job.attempt_started_at).total_seconds()
    ago = (now - row.counted_at).total_seconds()
    row.gpu_seconds = faded(row.gpu_seconds, ago) + counted(gpus, ran)
    row.counted_at = now
    month = month_of(now)
    kept = row.month_gpu_seconds if row.month == month else 0.0
    row.month = month
    row.month_gpu_seconds = kept + _in_month(gpus, job.attempt_started_at, now)


def count_stored(session: Session, owner: str, more: int) -> None:
    """Count bytes that were put into the store, or with a negative number removed from it."""
    lock_row(session, owner).stored_bytes += more


def gpus_of(job: Job) -> int:
    """A job on a CPU counts as one on one GPU: what is shared is the box's slots."""
    return int(job.spec.get("gpus", 1))


def set_quotas(session: Session, owner: str, limits: dict[str, float | None]) -> OwnerRow:
    """Give the owner limits of its own: by quota; None for the settings', UNLIMITED for none."""
    row = lock_row(session, owner)
    for name, limit in limits.items():
        setattr(row, f"max_{name}", limit)
    return row


def quotas(session: Session, settings: Settings, owner: str) -> dict[str, Quota]:
    """The owner's quotas with what it has used of each."""
    now = utcnow()
    row = session.get(OwnerRow, owner) or OwnerRow(name=owner)
    running = [r for r in _running(session) if r.owner == owner]
    statement = select(func.count()).where(Job.owner == owner, Job.status == JobStatus.QUEUED)
    used = {
        "queued_jobs": session.exec(statement).one(),
        "queued_exports": exports.count_queued(session, owner),
        "running_jobs": len(running),
        "gpu_hours": round(_gpu_hours(row, running, now), 4),
        "stored_bytes": row.stored_bytes,
    }
    return {name: Quota(name, amount, _limit(row, settings, name)) for name, amount in used.items()}


def used_lately(session: Session, owner: str) -> float:
    """The GPU-seconds that fair share goes by."""
    row = session.get(OwnerRow, owner) or OwnerRow(name=owner)
    return _used(row, [r for r in _running(session) if r.owner == owner], utcnow())


def standings(session: Session, settings: Settings, owners: Collection[str]) -> dict[str, Standing]:
    """How these owners stand in the queue now. Reads a row an owner and the jobs that run, no history."""
    now = utcnow()
    # Not by IN: there may be more owners than a statement takes parameters.
    rows = {row.name: row for row in session.exec(select(OwnerRow))}
    running: dict[str, list[Running]] = {}
    for job in _running(session):
        running.setdefault(job.owner, []).append(job)
    found = {}
    for owner in owners:
        row = rows.get(owner) or OwnerRow(name=owner)
        jobs = running.get(owner, [])
        standing = Standing(_used(row, jobs, now))
        most = _limit(row, settings, "running_jobs")
        if most is not None:
            standing.room, standing.held_by = max(int(most) - len(jobs), 0), "running_jobs"
        hours = _limit(row, settings, "gpu_hours")
        if hours is not None and _gpu_hours(row, jobs, now) >= hours:
            standing.room, standing.held_by = 0, "gpu_hours"
        found[owner] = standing
    return found


def _running(session: Session) -> list[Running]:
    gpus = col(Job.spec)["gpus"].as_integer()
    statement = select(Job.owner, gpus, Job.attempt_started_at).where(
        col(Job.status).in_(LEASED), col(Job.attempt_started_at).is_not(None)
    )
    return [Running(owner, number or 1, since) for owner, number, since in session.exec(statement) if since]


def _used(row: OwnerRow, running: list[Running], now: datetime) -> float:
    ended = faded(row.gpu_seconds, (now - row.counted_at).total_seconds())
    return ended + sum(counted_while_running(r.gpus, (now - r.since).total_seconds()) for r in running)


def _gpu_hours(row: OwnerRow, running: list[Running], now: datetime) -> float:
    ended = row.month_gpu_seconds if row.month == month_of(now) else 0.0
    return (ended + sum(_in_month(r.gpus, r.since, now) for r in running)) / 3600


def _in_month(gpus: int, since: datetime, now: datetime) -> float:
    """GPU-seconds of a run up to now that fall into this month."""
    return gpus * max((now - max(since, month_of(now))).total_seconds(), 0.0)


def _limit(row: OwnerRow, settings: Settings, name: str) -> float | None:
    name = "queued_jobs" if name == "queued_exports" else name
    own: float | None = getattr(row, f"max_{name}")
    if own is None:
        default: float | None = getattr(settings, f"max_{name}")
        return default
    return None if own == UNLIMITED else own
