"""Fine-tuning jobs, as OpenAI's clients ask for them."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from api.dependencies import (
    BodyDep,
    CallerDep,
    ContextDep,
    DatabaseDep,
    DoorbellDep,
    IdempotencyKey,
    JobId,
    JobPage,
    Limit,
    SettingsDep,
)
from api.routes.jobs import METADATA_FILTER
from api.schemas_v1 import CheckpointV1, EventV1, JobV1, ListV1
from api.services import jobs
from api.services.jobs import Filters
from api.services.v1 import jobs as v1_jobs

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["OpenAI: fine-tuning"])

# The body is parsed strictly by itself: fields of the job spec may stand beside OpenAI's.
CREATE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "training_file"],
                    "properties": {
                        "model": {"type": "string"},
                        "training_file": {"type": "string", "description": "`file-…`, or `hub:OWNER/NAME`."},
                        "validation_file": {"type": "string", "nullable": True},
                        "suffix": {"type": "string", "nullable": True},
                        "seed": {"type": "integer", "nullable": True},
                        "metadata": {"type": "object", "nullable": True},
                        "method": {"type": "object"},
                        "hyperparameters": {"type": "object"},
                        "integrations": {"type": "array", "nullable": True, "items": {"type": "object"}},
                    },
                    "additionalProperties": {"description": "Fields of a job spec."},
                }
            }
        },
    }
}

EventAfter = Annotated[str | None, Query(max_length=100, description="Last id of the page before.")]


async def _filters(request: Request) -> Filters:
    return jobs.parse_filters(None, request.query_params)


@router.post("", openapi_extra=CREATE_BODY)
def create_fine_tuning_job(
    context: ContextDep, caller: CallerDep, body: BodyDep, idempotency_key: IdempotencyKey = None
) -> JobV1:
    """Queue a job, from OpenAI's fields and any of the job spec's."""
    return v1_jobs.create(context, caller, body, idempotency_key)


@router.get("", openapi_extra=METADATA_FILTER)
def list_fine_tuning_jobs(
    database: DatabaseDep, caller: CallerDep, page: JobPage, filters: Annotated[Filters, Depends(_filters)]
) -> ListV1[JobV1]:
    """Your jobs, newest first, wherever they were made."""
    return v1_jobs.list_page(database, caller, page, filters)


@router.get("/{job_id}")
def get_fine_tuning_job(database: DatabaseDep, caller: CallerDep, job_id: JobId) -> JobV1:
    """A job."""
    return v1_jobs.shown(database, [jobs.get(database, caller, job_id)])[0]


@router.post("/{job_id}/cancel")
def cancel_fine_tuning_job(
    database: DatabaseDep, doorbell: DoorbellDep, caller: CallerDep, job_id: JobId
) -> JobV1:
    """Cancel a job."""
    return v1_jobs.shown(database, [jobs.cancel(database, doorbell, caller, job_id)])[0]


@router.post("/{job_id}/pause")
def pause_fine_tuning_job(
    database: DatabaseDep, doorbell: DoorbellDep, caller: CallerDep, job_id: JobId
) -> JobV1:
    """Pause a job."""
    return v1_jobs.shown(database, [jobs.pause(database, doorbell, caller, job_id)])[0]


@router.post("/{job_id}/resume")
def resume_fine_tuning_job(
    database: DatabaseDep, doorbell: DoorbellDep, settings: SettingsDep, caller: CallerDep, job_id: JobId
) -> JobV1:
    """Let a paused job go on."""
    return v1_jobs.shown(database, [jobs.resume(database, doorbell, settings, caller, job_id)])[0]


@router.get("/{job_id}/events")
def list_fine_tuning_events(
    database: DatabaseDep, caller: CallerDep, job_id: JobId, after: EventAfter = None, limit: Limit = 20
) -> ListV1[EventV1]:
    """The job's log, newest first."""
    return v1_jobs.list_events(database, caller, job_id, after, limit)


@router.get("/{job_id}/checkpoints")
def list_fine_tuning_checkpoints(
    database: DatabaseDep, caller: CallerDep, job_id: JobId, after: EventAfter = None, limit: Limit = 10
) -> ListV1[CheckpointV1]:
    """The checkpoints that are kept, newest first."""
    return v1_jobs.list_checkpoints(database, caller, job_id, after, limit)
