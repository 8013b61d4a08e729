"""Preemption: a job of lower priority makes way for one of higher priority that finds no free GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pydantic import ValidationError

from shared.database import Database
from shared.device import Device
from shared.errors import LeaseLost
from shared.events import Entry
from shared.lifecycle import JobStatus, Phase
from shared.repository import jobs, logs
from shared.tables import Job
from worker.claims import Claims, Wanted, find_match
from worker.launch import Child

# Waiting jobs that are looked at: those behind them come to it when these have started.
LOOK_AT = 20

logger = logging.getLogger(__name__)


def preempt(database: Database, claims: Claims, children: Sequence[Child], free: Sequence[Device]) -> None:
    """Ask children to leave with a checkpoint, as few as the first waiting job that can gain by it needs.

    They go back to the queue, to their old place. One that exports is near its end and is left alone. While
    a child is on its way out nobody else is asked.
    """
    if not children or any(child.asked for child in children):
        return
    waiting = claims.first(LOOK_AT)
    if not waiting:
        return
    with database.read() as session:
        running = {job.id: job for job in jobs.find_jobs(session, [child.job_id for child in children])}
    lowest = max((job.priority for job in running.values()), default=0)
    for job in waiting:
        if job.priority >= lowest:
            return
        victims = _victims(job, children, running, free)
        for child in victims:
            _ask(database, child, job)
        if victims:
            return


def _victims(
    job: Job, children: Sequence[Child], running: dict[str, Job], free: Sequence[Device]
) -> list[Child]:
    """The children whose GPUs the job needs beside the free ones; none if it has what it needs, or can't."""
    try:
        wanted = Wanted.of(job)
    except ValidationError:
        return []  # The next claim refuses it.
    if find_match(wanted, free) is not None:
        return []  # Somebody outside has the memory: no child's end would give it more.
    # The lowest priority first, then the one that loses the least: it began last.
    lower = [
        child
        for child in children
        if (held := running.get(child.job_id)) is not None
        and held.priority > job.priority
        and held.status == JobStatus.RUNNING
        and held.phase != Phase.EXPORTING
    ]
    lower.sort(key=lambda child: (-running[child.job_id].priority, -child.started_at))
    devices, victims = list(free), []
    for child in lower:
        if find_match(wanted, child.devices) is not None:
            return [child]
        devices += child.devices
        victims.append(child)
        match = find_match(wanted, devices)
        if match is not None:
            return [victim for victim in victims if set(match.devices) & set(victim.devices)]
    return []


def _ask(database: Database, child: Child, job: Job) -> None:
    entry = Entry(
        "A job of higher priority takes its place: it leaves at the end of its step, with a checkpoint.",
        level="warning",
    )
    try:
        with database.write() as session:
            logs.append_entries(session, child.job_id, [entry], child.token)
    except LeaseLost:
        return  # It has just ended.
    child.ask_to_leave()
    logger.info("Job %s makes way for job %s", child.job_id, job.id)
