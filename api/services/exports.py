"""Exports that are asked for after their job has succeeded."""

from __future__ import annotations

from api.context import Caller
from api.schemas import ExportIn, ExportOut, ListOut
from shared.database import Database, Session
from shared.errors import InvalidRequest, StateConflict
from shared.exports import artifact_name
from shared.lifecycle import UNDER_WAY, ExportStatus, JobStatus
from shared.queue import Doorbell
from shared.repository import exports, files, jobs, logs, owners
from shared.settings import Settings
from shared.tables import ExportTask, Job


def create(
    database: Database, doorbell: Doorbell, settings: Settings, caller: Caller, job_id: str, wanted: ExportIn
) -> tuple[ExportOut, bool]:
    """Queue the export, or find the one that is under way or done; whether it is new.

    Raises:
        NotFound: the job is absent or somebody else's.
        StateConflict: the job has not succeeded, or its adapter was not kept.
        InvalidRequest: the job has no such checkpoint.
        QuotaExceeded: the owner has as many queued exports as it may, or has used up its storage.
    """
    with database.write() as session:
        job = jobs.lock_job(session, job_id, caller.scope)
        task, new = _find_or_queue(session, settings, job, wanted)
        session.flush()
        answer = ExportOut.of(task, files.list_artifacts(session, job_id))
    if new:
        doorbell.ring(job_id)
    doorbell.tell(job_id)
    return answer, new


def list_all(database: Database, caller: Caller, job_id: str) -> ListOut[ExportOut]:
    """Oldest first.

    Raises:
        NotFound: the job is absent or somebody else's.
    """
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
        rows = exports.exports_of(session, [job_id])[job_id]
        artifacts = files.list_artifacts(session, job_id)
    return ListOut(data=[ExportOut.of(row, artifacts) for row in rows])


def _find_or_queue(
    session: Session, settings: Settings, job: Job, wanted: ExportIn
) -> tuple[ExportTask, bool]:
    if job.status != JobStatus.SUCCEEDED:
        raise StateConflict(
            f"The job is {job.status}: exports can be made of jobs that have succeeded.",
            code="job_not_succeeded",
        )
    latest = exports.find_latest(session, job.id, wanted.format, wanted.checkpoint)
    if latest is not None and latest.status in UNDER_WAY:
        return latest, False
    made = files.find_artifact(session, job.id, artifact_name(wanted.format, wanted.checkpoint))
    if made is not None:
        # An adapter that was kept without being asked for is handed out from now on.
        made.listed = True
        if latest is not None and latest.status == ExportStatus.SUCCEEDED:
            return latest, False
        return exports.add_export(session, job.id, wanted.format, wanted.checkpoint, done=True), False
    if wanted.checkpoint is not None:
        steps = [row.step for row in logs.read_checkpoints(session, job.id)]
        if wanted.checkpoint not in steps:
            known = ", ".join(str(step) for step in steps) or "none"
            raise InvalidRequest(
                f"The job has no checkpoint of step {wanted.checkpoint}. It has: {known}.",
                param="checkpoint",
                code="checkpoint_not_found",
            )
    if files.find_artifact(session, job.id, artifact_name("adapter")) is None:
        raise StateConflict("The job's adapter was not kept: train it again.", code="adapter_not_kept")
    quotas = owners.quotas(session, settings, job.owner)
    quotas["queued_exports"].check(1)
    quotas["stored_bytes"].check()
    return exports.add_export(session, job.id, wanted.format, wanted.checkpoint), True
