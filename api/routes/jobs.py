"""Jobs."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from api.dependencies import (
    BodyDep,
    CallerDep,
    ConfigsDep,
    DatabaseDep,
    DoorbellDep,
    IdempotencyKey,
    JobId,
    JobPage,
    QueueDep,
    SettingsDep,
    StoreDep,
)
from api.schemas import EstimateOut, JobDetailOut, JobOut, ListOut, MoveIn
from api.services import jobs, queue
from api.services.jobs import Filters
from shared.lifecycle import JobStatus
from shared.spec import SPEC_EXAMPLE

router = APIRouter(prefix="/jobs", tags=["jobs"])

# The body is parsed strictly by the spec itself, so no parameter declares it.
SPEC_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/JobSpec"},
                "examples": {
                    "bundled": {"summary": "A short job on the bundled model", "value": SPEC_EXAMPLE},
                    "defaults": {"summary": "The defaults are a complete job", "value": {}},
                },
            }
        },
    }
}
METADATA_FILTER: dict[str, Any] = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "style": "deepObject",
            "explode": True,
            "description": "Jobs whose metadata has these values: `metadata[team]=search`; `metadata=null`: "
            "those without any.",
            "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        }
    ]
}


async def _filters(
    request: Request,
    status: Annotated[JobStatus | None, Query()] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,  # noqa: ARG001 - declared for the docs
) -> Filters:
    return jobs.parse_filters(status, request.query_params)


FiltersDep = Annotated[Filters, Depends(_filters)]


@router.post("", status_code=201, openapi_extra=SPEC_BODY)
def create_job(
    database: DatabaseDep,
    doorbell: DoorbellDep,
    settings: SettingsDep,
    configs: ConfigsDep,
    caller: CallerDep,
    body: BodyDep,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobOut:
    """Queue a fine-tuning job. `{}` is a complete spec."""
    job = jobs.create(database, doorbell, settings, configs, caller, body, idempotency_key)
    response.headers["location"] = f"/jobs/{job.id}"
    return job


@router.post("/estimate", openapi_extra=SPEC_BODY)
def estimate_job(
    database: DatabaseDep, settings: SettingsDep, configs: ConfigsDep, caller: CallerDep, body: BodyDep
) -> EstimateOut:
    """What a job would take, without queueing it; null where it can't be known before it runs."""
    return jobs.estimate_job(database, settings, configs, caller, body)


@router.get("", openapi_extra=METADATA_FILTER)
def list_jobs(
    database: DatabaseDep, caller: CallerDep, page: JobPage, filters: FiltersDep
) -> ListOut[JobOut]:
    """Your jobs, newest first; an admin's: everybody's."""
    return jobs.list_page(database, caller, page, filters)


@router.get("/{job_id}")
def get_job(database: DatabaseDep, view: QueueDep, caller: CallerDep, job_id: JobId) -> JobDetailOut:
    """A job with its spec (all defaults written out), progress, artifacts and place in the queue."""
    return queue.show(database, view, caller, job_id)


@router.post("/{job_id}/move")
def move_job(
    database: DatabaseDep, view: QueueDep, caller: CallerDep, job_id: JobId, wanted: MoveIn
) -> JobDetailOut:
    """Move a queued job among those of your own that have its priority; nobody else's place changes."""
    return queue.move(database, view, caller, job_id, wanted)


@router.post("/{job_id}/cancel")
def cancel_job(database: DatabaseDep, doorbell: DoorbellDep, caller: CallerDep, job_id: JobId) -> JobOut:
    """Cancel a job: a queued one at once, a running one at its next step. Doing it again changes nothing."""
    return jobs.cancel(database, doorbell, caller, job_id)


@router.post("/{job_id}/pause")
def pause_job(database: DatabaseDep, doorbell: DoorbellDep, caller: CallerDep, job_id: JobId) -> JobOut:
    """Pause a job: a queued one at once, a running one at the end of its step, with a checkpoint."""
    return jobs.pause(database, doorbell, caller, job_id)


@router.post("/{job_id}/resume")
def resume_job(
    database: DatabaseDep, doorbell: DoorbellDep, settings: SettingsDep, caller: CallerDep, job_id: JobId
) -> JobOut:
    """Put a paused job back into the queue; it goes on from its last checkpoint."""
    return jobs.resume(database, doorbell, settings, caller, job_id)


@router.delete("/{job_id}", status_code=204)
def delete_job(database: DatabaseDep, store: StoreDep, caller: CallerDep, job_id: JobId) -> None:
    """Delete a finished job with its log and files."""
    jobs.delete(database, store, caller, job_id)
