"""A job's log, metrics and checkpoints."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from api.dependencies import CallerDep, DatabaseDep, HubDep, JobId
from api.schemas import CheckpointOut, ListOut, LogOut, MetricsOut
from api.services import jobs, logs
from api.streams import EventStream

router = APIRouter(prefix="/jobs/{job_id}", tags=["logs"])

EVENT_STREAM = "text/event-stream"
SEQ = re.compile(r"[0-9]{1,19}")
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
    str | None,
    Header(description="The same, as browsers send it when they reconnect; what is no seq is ignored."),
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
    if accepts(",".join(request.headers.getlist("accept")), EVENT_STREAM):
        await to_thread.run_sync(logs.read_page, database, job_id, caller.scope, 0, 1)
        start = _seq(last_event_id, after)
        return EventStream(partial(logs.follow, hub, database, caller, job_id, start))
    page = await logs.wait_page(hub, database, job_id, caller.scope, after, limit, wait)
    return Response(page.to_json(), media_type="application/json")


@router.get("/metrics", response_model=MetricsOut)
def get_metrics(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> Response:
    """The job's metrics, one row a step, oldest first."""
    pieces = logs.read_metrics(database, caller, job_id)
    return StreamingResponse(pieces, media_type="application/json")


@router.get("/checkpoints")
def get_checkpoints(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> ListOut[CheckpointOut]:
    """The checkpoints that are kept, oldest first."""
    return jobs.list_checkpoints(database, caller, job_id)


def accepts(header: str, media_type: str) -> bool:
    """Whether an Accept header names this type itself, and not with `q=0`; wildcards don't count."""
    for item in header.split(","):
        kind, *parameters = [part.strip().lower() for part in item.split(";")]
        refused = any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
        if kind == media_type and not refused:
            return True
    return False


def _seq(last_event_id: str | None, after: int) -> int:
    if last_event_id is None or not SEQ.fullmatch(last_event_id) or int(last_event_id) > MAX_SEQ:
        return after
    return int(last_event_id)
