"""Taking the next job for a free slot."""

from __future__ import annotations

import logging
from datetime import timedelta

from pydantic import ValidationError

from shared.clock import utcnow
from shared.database import Database, Session
from shared.events import Entry
from shared.ids import new_token
from shared.lifecycle import FailureCode, JobStatus
from shared.planner import Device, make_plan
from shared.repository import leases, logs
from shared.repository.jobs import set_status
from shared.spec import JobSpec
from shared.tables import Job

logger = logging.getLogger(__name__)


def claim_for(database: Database, worker: str, lease_seconds: float, device: Device) -> Job | None:
    """The next job that this worker can read, under a new lease and with its plan; None if none waits."""
    while True:
        expires_at = utcnow() + timedelta(seconds=lease_seconds)
        with database.write() as session:
            job = leases.claim_next(session, worker, new_token(), expires_at)
            if job is None:
                return None
            try:
                plan = make_plan(JobSpec.from_json(job.spec), [device])
            except ValidationError as error:
                _refuse(session, job, error)
                continue
            job.plan = plan.model_dump() if plan else None
            job.plan_history = [*job.plan_history, {"attempt": job.attempt, "plan": job.plan}]
        return job


def _refuse(session: Session, job: Job, error: ValidationError) -> None:
    """Fail a job whose spec this version does not understand, rather than meet it again for ever."""
    failure = {
        "code": FailureCode.INTERNAL_ERROR,
        "message": f"This worker can't read the job's spec ({error.error_count()} fields).",
        "advice": "API and worker are of different versions: upgrade both and submit it again.",
    }
    set_status(job, JobStatus.FAILED, failure=failure)
    logs.append_entries(session, job.id, [Entry(failure["message"], level="error", data=failure)])
    logger.error("Job %s: %s", job.id, error)
