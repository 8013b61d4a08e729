"""A job's log, metrics and checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from pydantic_core import to_json
from starlette.responses import Response

from api.dependencies import CallerDep, DatabaseDep, HubDep, JobId
from api.schemas import CheckpointOut, ListOut, LogOut, MetricsOut
from api.services import jobs, logs
from api.streams import EventStream

router = APIRouter(prefix="/jobs/{job_id}", tags=["logs"])

EVENT_STREAM = "text/event-stream"
MAX_SEQ = 2**63 - 1
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Entries, oldest first; as server-sent events until the job has ended, with `id:` = "
        "seq and a last `event: end` with the job's status.",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    }
}

After = Annotated[int, Query(ge=0, le=MAX_SEQ, description="The last seq that you have.")]
LastEventId = Annotated[
    int | None, Header(ge=0, le=MAX_SEQ, description="The same, as browsers send it when they reconnect.")
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most entries of one answer.")]
Wait = Annotated[float, Query(ge=0, le=30, description="Seconds to wait for the first new entry.")]


@router.get("/logs", response_model=LogOut, responses=CONTENT)
async def get_logs(
    hub: HubDep,
    database: DatabaseDep,
    caller: CallerDep,
    job_id: JobId,
    request: Request,
    after: After = 0,
    limit: Limit = 200,
    wait: Wait = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """The job's log after a seq: a page, a long poll (`wait`), or a stream (`Accept: text/event-stream`)."""
    if EVENT_STREAM in request.headers.get("accept", ""):
        await to_thread.run_sync(logs.read_page, database, job_id, caller.scope, 0, 1)
        start = after if last_event_id is None else last_event_id
        return EventStream(partial(logs.follow, hub, database, caller, job_id, start))
    page = await logs.wait_page(hub, database, job_id, caller.scope, after, limit, wait)
    return Response(page.to_json(), media_type="application/json")


@router.get("/metrics", response_model=MetricsOut)
def get_metrics(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> Response:
    """The job's metrics, one row a step, oldest first."""
    rows = jobs.read_metrics(database, caller, job_id)
    return Response(to_json({"data": rows}, inf_nan_mode="null"), media_type="application/json")


@router.get("/checkpoints")
def get_checkpoints(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> ListOut[CheckpointOut]:
    """The checkpoints that are kept, oldest first."""
    return jobs.list_checkpoints(database, caller, job_id)
