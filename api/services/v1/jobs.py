"""Jobs in OpenAI's shape: the same jobs, by the same services, said otherwise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any, Literal

from api.context import Caller, Context
from api.schemas import JobOut
from api.schemas_v1 import (
    CheckpointMetricsV1,
    CheckpointV1,
    EventV1,
    HyperparametersV1,
    JobErrorV1,
    JobV1,
    ListV1,
    MethodV1,
    SupervisedV1,
    seconds,
)
from api.services import jobs
from api.services.jobs import Filters
from api.services.v1.create import HUB, WANDB, in_openai_terms, multiplier, parse_create
from shared.clock import utcnow
from shared.database import Database
from shared.errors import InvalidRequest, NotFound
from shared.lifecycle import FailureCode, JobStatus
from shared.model_names import JOB_PREFIX, tuned_model
from shared.repository import files, logs
from shared.repository import jobs as job_rows
from shared.repository.jobs import Page
from shared.repository.logs import StoredEntry
from shared.spec import FileDataset, HubDataset, JobSpec, WandbSpec
from shared.tables import CheckpointRow

EVENT_ID = re.compile(r"ftevent-([0-9a-z]{24})-([0-9]{1,18})")
# The API doesn't know the worker's environment, and it is nobody's business but the operator's.
WORKERS_PROJECT = "(the worker's)"
CHECKPOINT_ID = re.compile(r"ftckpt-([0-9a-z]{24})-([0-9]{1,9})")
LEVELS: dict[str, Literal["info", "warn", "error"]] = {"warning": "warn", "error": "error"}
# Tuneyard's names of measures, and OpenAI's.
MEASURES = {
    "loss": "train_loss",
    "mean_token_accuracy": "train_mean_token_accuracy",
    "eval_loss": "valid_loss",
    "eval_mean_token_accuracy": "valid_mean_token_accuracy",
}


def create(context: Context, caller: Caller, body: bytes, idempotency_key: str | None) -> JobV1:
    """Queue the job that OpenAI's body asks for.

    Raises:
        MalformedRequest: the body is not JSON.
        InvalidRequest: the job is known to be impossible or not allowed here.
        StateConflict: the idempotency key made another job from another body.
        QuotaExceeded: the owner has as many queued jobs as this server lets one have.
    """
    made = partial(
        jobs.create,
        context.database,
        context.doorbell,
        context.settings,
        context.configs,
        caller,
        body,
        idempotency_key,
        partial(parse_create, rows_of=partial(_rows_of, context.database, caller)),
    )
    return shown(context.database, [in_openai_terms(made)])[0]


def list_page(database: Database, caller: Caller, page: Page, filters: Filters) -> ListV1[JobV1]:
    """
    Raises:
        InvalidRequest: `after` names no job that the caller may see.
    """
    found = jobs.list_page(database, caller, page, filters)
    return ListV1.of(shown(database, found.data), has_more=found.has_more)


def shown(database: Database, found: Sequence[JobOut]) -> list[JobV1]:
    """The jobs in OpenAI's shape."""
    ids = [job.id for job in found]
    with database.read() as session:
        results = files.results_of(session, ids)
        last = logs.last_metrics(session, ids)
    return [_job(job, results[job.id], last.get(job.id, {})) for job in found]


def list_events(
    database: Database, caller: Caller, job_id: str, after: str | None, limit: int
) -> ListV1[EventV1]:
    """The job's log, newest first.

    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: `after` is no event of this job.
    """
    before = _place(EVENT_ID, job_id, after)
    with database.read() as session:
        logs.log_state(session, job_id, caller.scope)
        rows = logs.read_newest(session, job_id, before, limit + 1)
    data = [_event(job_id, row) for row in rows[:limit]]
    return ListV1.of(data, has_more=len(rows) > limit)


def list_checkpoints(
    database: Database, caller: Caller, job_id: str, after: str | None, limit: int
) -> ListV1[CheckpointV1]:
    """The checkpoints that are kept, newest first.

    Raises:
        NotFound: absent or somebody else's.
        InvalidRequest: `after` is no checkpoint of this job.
    """
    before = _place(CHECKPOINT_ID, job_id, after)
    with database.read() as session:
        job = job_rows.get_job(session, job_id, caller.scope)
        rows = logs.read_checkpoints(session, job_id)
        measured = logs.metrics_at(session, job_id, [row.step for row in rows])
    rows = [row for row in reversed(rows) if before is None or row.step < before]
    spec = JobSpec.from_json(job.spec)
    data = [
        _checkpoint(row, tuned_model(spec.model, job.owner, spec.name, job_id, row.step), measured)
        for row in rows[:limit]
    ]
    return ListV1.of(data, has_more=len(rows) > limit)


def _rows_of(database: Database, caller: Caller, file_id: str) -> int | None:
    with database.read() as session, suppress(NotFound):
        report = files.get_dataset(session, file_id, caller.name).report or {}
        return report.get("rows_used")
    return None


def _job(job: JobOut, results: list[str], last: Mapping[str, Any]) -> JobV1:
    spec = JobSpec.from_json(job.spec)
    done = job.status == JobStatus.SUCCEEDED
    hyperparameters = HyperparametersV1(
        n_epochs=math.ceil(spec.training.num_train_epochs),
        batch_size=spec.training.effective_batch,
        learning_rate_multiplier=multiplier(spec.training.learning_rate),
    )
    return JobV1(
        id=job.id,
        created_at=seconds(job.created_at),
        error=_error(job),
        estimated_finish=_estimated_finish(job),
        fine_tuned_model=tuned_model(spec.model, job.owner, spec.name, job.id) if done else None,
        finished_at=seconds(job.finished_at) if job.finished_at else None,
        hyperparameters=hyperparameters,
        integrations=[_wandb(spec, job.id)] if WANDB in spec.report_to else [],
        metadata=dict(spec.metadata),
        method=MethodV1(supervised=SupervisedV1(hyperparameters=hyperparameters)),
        model=spec.model,
        organization_id=job.owner,
        result_files=results,
        seed=spec.training.seed,
        status=_status(job.status),
        trained_tokens=last.get("tokens") if done else None,
        training_file=_source(spec.dataset),
        user_provided_suffix=spec.name,
        validation_file=_source(spec.validation_dataset) if spec.validation_dataset else None,
        tuneyard=job.model_dump(
            mode="json",
            include={"status", "phase", "spec", "plan", "data_report", "progress", "attempt", "failure"},
        ),
    )


def _wandb(spec: JobSpec, job_id: str) -> dict[str, Any]:
    asked = spec.wandb or WandbSpec()
    shown = {
        "project": asked.project or WORKERS_PROJECT,
        "name": asked.name or spec.name or job_id,
        "entity": asked.entity,
        "tags": list(asked.tags),
    }
    return {"type": WANDB, WANDB: shown}


def _status(status: JobStatus) -> Any:
    # OpenAI's clients take the answer to a cancel for its end, which here is seconds away.
    return "cancelled" if status == JobStatus.CANCELLING else str(status)


def _error(job: JobOut) -> JobErrorV1 | None:
    if job.failure is None:
        return None
    param = "training_file" if job.failure.code == FailureCode.INVALID_DATASET else None
    message = f"{job.failure.message} {job.failure.advice}".strip()
    return JobErrorV1(code=job.failure.code, message=message, param=param)


def _estimated_finish(job: JobOut) -> int | None:
    eta = job.progress.eta_seconds if job.progress and job.status == JobStatus.RUNNING else None
    return seconds(utcnow() + timedelta(seconds=eta)) if eta is not None else None


def _source(dataset: HubDataset | FileDataset) -> str:
    return dataset.file_id if isinstance(dataset, FileDataset) else HUB + dataset.id


def _place(pattern: re.Pattern[str], job_id: str, after: str | None) -> int | None:
    """The seq or step that an id of this job's events or checkpoints ends in."""
    if after is None:
        return None
    found = pattern.fullmatch(after)
    if found is None or JOB_PREFIX + found[1] != job_id:
        raise InvalidRequest("after is no id of this list.", param="after")
    return int(found[2])


def _event(job_id: str, row: StoredEntry) -> EventV1:
    metrics = row.type == "metrics"
    return EventV1(
        id=f"ftevent-{job_id.removeprefix(JOB_PREFIX)}-{row.seq}",
        created_at=seconds(row.time),
        level=LEVELS.get(row.level, "info"),
        message=row.message,
        type="metrics" if metrics else "message",
        data=_renamed(row.data) if metrics and row.data else row.data,
    )


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {MEASURES.get(name, name): value for name, value in row.items()}


def _checkpoint(row: CheckpointRow, model: str, measured: Mapping[int, Mapping[str, Any]]) -> CheckpointV1:
    found = _renamed(measured.get(row.step, {}))
    # Every evaluation is of all held-out rows.
    valid = {f"full_{name}": found.get(name) for name in ("valid_loss", "valid_mean_token_accuracy")}
    metrics = {name: found.get(name) for name in MEASURES.values()} | valid
    return CheckpointV1(
        id=f"ftckpt-{row.job_id.removeprefix(JOB_PREFIX)}-{row.step}",
        created_at=seconds(row.created_at),
        fine_tuned_model_checkpoint=model,
        fine_tuning_job_id=row.job_id,
        metrics=CheckpointMetricsV1(step=row.step, **metrics),
        step_number=row.step,
    )
