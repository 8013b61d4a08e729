"""A job with its place in the queue, and moving it among one's own."""

from __future__ import annotations

from api.context import Caller
from api.queue_view import QueueView
from api.schemas import JobDetailOut, MoveIn
from api.services import jobs
from shared.database import Database
from shared.lifecycle import JobStatus
from shared.repository import queue
from shared.repository.queue import Place


def show(database: Database, view: QueueView, caller: Caller, job_id: str) -> JobDetailOut:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    job = jobs.get(database, caller, job_id)
    place = view.place(job_id) if job.status == JobStatus.QUEUED else None
    return JobDetailOut(**dict(job), queue=place)


def move(database: Database, view: QueueView, caller: Caller, job_id: str, wanted: MoveIn) -> JobDetailOut:
    """Give a queued job another place among its owner's of the same priority.

    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: the job to put it before is no queued one of the same owner and priority.
        StateConflict: the job is not queued.
    """
    with database.write() as session:
        queue.move(session, job_id, caller.scope, Place(wanted.before, first=wanted.to == "first"))
    view.forget()
    return show(database, view, caller, job_id)
