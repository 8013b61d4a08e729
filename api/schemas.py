"""The shapes of answers, as the contract has them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, cast
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from shared.clock import isoformat
from shared.exports import artifact_name
from shared.ids import JOB_ID
from shared.lifecycle import ExportStatus, FailureCode, JobStatus, Phase
from shared.plan import Plan
from shared.spec import ExportFormat
from shared.tables import (
    ArtifactRow,
    AuditEntry,
    CheckpointRow,
    DatasetRow,
    ExportTask,
    Job,
    OwnerSecret,
)

Time = Annotated[
    datetime,
    PlainSerializer(isoformat, return_type=str, when_used="json"),
    Field(examples=["2026-01-31T12:00:00.000Z"]),
]
Item = TypeVar("Item")


class ErrorDetail(BaseModel):
    code: str
    message: str
    param: str | None = Field(description="Dotted name of the field at fault, such as `lora.r`.")
    type: str


class ErrorOut(BaseModel):
    """Every error has this shape."""

    error: ErrorDetail


class ListOut(BaseModel, Generic[Item]):
    """One page. `next` is what to give as `after` for the page that follows; null on the last one."""

    data: list[Item]
    has_more: bool = False
    next: str | None = None


class SecretOut(BaseModel):
    """That a secret is set; never what it is."""

    name: str
    updated_at: Time

    @classmethod
    def of(cls, row: OwnerSecret) -> SecretOut:
        return cls(name=row.name, updated_at=row.updated_at)


class AuditOut(BaseModel):
    """Something that somebody did, or tried to do."""

    id: int
    time: Time
    owner: str
    key: int | None = Field(description="The key's number in `tuneyard keys list`.")
    action: str = Field(examples=["POST /jobs/{job_id}/cancel"])
    object: str | None
    result: int = Field(description="The status of the answer; 0 for what was done without a server.")
    address: str | None

    @classmethod
    def of(cls, row: AuditEntry) -> AuditOut:
        return cls(
            id=row.id or 0,
            time=row.time,
            owner=row.owner,
            key=row.key_id,
            action=row.action,
            object=row.object,
            result=row.result,
            address=row.address,
        )


class ArtifactOut(BaseModel):
    """A complete file; `kind` is the export string, or manifest, metrics, modelfile or tensorboard."""

    name: str
    kind: str
    bytes: int
    sha256: str
    created_at: Time
    url: str = Field(description="Path of the download on this server.")

    @classmethod
    def of(cls, row: ArtifactRow) -> ArtifactOut:
        return cls(
            name=row.name,
            kind=row.kind,
            bytes=row.bytes,
            sha256=row.sha256,
            created_at=row.created_at,
            url=f"/jobs/{row.job_id}/artifacts/{quote(row.name, safe='')}",
        )


class ProgressOut(BaseModel):
    step: int
    total_steps: int
    epoch: float
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None


class FailureOut(BaseModel):
    code: FailureCode
    message: str
    advice: str


class ExportIn(BaseModel):
    """A file to be made of a job that has succeeded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: ExportFormat
    checkpoint: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="The step of a checkpoint; null for the adapter that training ended with."
    )


class ExportOut(BaseModel):
    """An export that was asked for after its job had succeeded. `artifact` is there once it is made."""

    id: str = Field(examples=["export-0123456789abcdefghijklmn"])
    format: ExportFormat
    checkpoint: int | None
    status: ExportStatus
    artifact: ArtifactOut | None
    failure: FailureOut | None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None

    @classmethod
    def of(cls, task: ExportTask, artifacts: list[ArtifactRow]) -> ExportOut:
        name = artifact_name(task.format, task.checkpoint)
        made = next((row for row in artifacts if row.name == name), None)
        return cls(
            id=task.id,
            format=cast("ExportFormat", task.format),
            checkpoint=task.checkpoint,
            status=ExportStatus(task.status),
            artifact=ArtifactOut.of(made) if made and task.status == ExportStatus.SUCCEEDED else None,
            failure=FailureOut(**task.failure) if task.failure else None,
            created_at=task.created_at,
            started_at=task.started_at,
            finished_at=task.finished_at,
        )


class JobOut(BaseModel):
    """A job. `spec` shows every default; `plan` is null until it is known what the job will run on."""

    id: str = Field(examples=["ftjob-0123456789abcdefghijklmn"])
    status: JobStatus
    phase: Phase | None
    owner: str
    spec: dict[str, Any]
    plan: dict[str, Any] | None
    plan_history: list[dict[str, Any]]
    data_report: dict[str, Any] | None
    progress: ProgressOut | None
    attempt: int
    failure: FailureOut | None
    created_at: Time
    started_at: Time | None
    finished_at: Time | None
    artifacts: list[ArtifactOut]
    exports: list[ExportOut] = Field(description="Those that were asked for after the job had succeeded.")

    @classmethod
    def of(cls, job: Job, artifacts: list[ArtifactRow], exports: list[ExportTask]) -> JobOut:
        return cls(
            id=job.id,
            status=JobStatus(job.status),
            phase=Phase(job.phase) if job.phase else None,
            owner=job.owner,
            spec=job.spec,
            plan=job.plan,
            plan_history=job.plan_history,
            data_report=job.data_report,
            progress=ProgressOut(**job.progress) if job.progress else None,
            attempt=job.attempt,
            failure=FailureOut(**job.failure) if job.failure else None,
            created_at=job.created_at,
            started_at=job.started_at,
            finished_at=job.finished_at,
            artifacts=[ArtifactOut.of(row) for row in artifacts],
            exports=[ExportOut.of(task, artifacts) for task in exports],
        )


class QueuePlaceOut(BaseModel):
    """Where a queued job stands. A job that one of its owner's quotas holds back has no place."""

    position: int | None = Field(description="1 for the next to start.")
    of: int = Field(description="Queued jobs of all owners.")
    expected_start: Time | None = Field(description="An estimate; null where nothing is known.")
    held_by: str | None = Field(description="The quota that the job waits for.")


class JobDetailOut(JobOut):
    """A job by itself: what a list does not tell."""

    queue: QueuePlaceOut | None = Field(description="Null unless the job is queued.")


class MoveIn(BaseModel):
    """Where to move a queued job: either to one end of your own, or before another one of them."""

    model_config = ConfigDict(extra="forbid")

    to: Literal["first", "last"] | None = None
    before: Annotated[str, Field(pattern=f"^{JOB_ID.pattern}$")] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.to is None) == (self.before is None):
            raise ValueError("give one of `to` and `before`")
        return self


class EstimateOut(BaseModel):
    """What a job would take; null where it can't be known before it runs."""

    plan: Plan | None = Field(description="What the job would run as on the best device on line.")
    alternatives: list[Plan] = Field(description="Plans that lost, the nearest first; `reason` says why.")
    tokens: int | None = Field(description="Tokens of one epoch.")
    steps: int | None = Field(description="Optimiser steps of the whole job.")
    seconds: float | None = Field(description="Of training alone.")
    peak_memory_bytes: int | None = Field(description="Of one GPU.")
    disk_bytes: int | None = Field(description="Exports, checkpoints, and room to merge in.")


class EntryOut(BaseModel):
    """A log entry. `seq` counts from 1 without gaps."""

    seq: int
    time: Time
    level: Literal["debug", "info", "warning", "error"]
    type: Literal["message", "metrics", "phase"]
    message: str
    data: dict[str, Any] | None


class LogOut(BaseModel):
    """Part of a log, oldest first. `next` is what to give as `after` the next time."""

    data: list[EntryOut]
    next: int
    first_seq: int = Field(description="The oldest entry that is kept.")
    has_more: bool = Field(description="Whether there are more entries right now.")
    status: JobStatus


class MetricsOut(BaseModel):
    """One row a step, oldest first: step and any of epoch, loss, learning_rate, grad_norm, …"""

    data: list[dict[str, Any]]


class CheckpointOut(BaseModel):
    step: int
    created_at: Time
    bytes: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: CheckpointRow) -> CheckpointOut:
        return cls(step=row.step, created_at=row.created_at, bytes=row.bytes, metrics=row.metrics)


class DatasetOut(BaseModel):
    """An uploaded file. `report` says what was found in it, `error` why it can't be used."""

    id: str = Field(examples=["file-0123456789abcdefghijklmn"])
    filename: str
    bytes: int
    sha256: str
    status: Literal["uploaded", "processed", "error"]
    format: str
    report: dict[str, Any] | None
    error: str | None
    created_at: Time

    @classmethod
    def of(cls, row: DatasetRow) -> DatasetOut:
        return cls.model_validate(row, from_attributes=True)


class ModelOut(BaseModel):
    """A model on this machine; null where only loading it would tell."""

    id: str
    source: Literal["bundled", "local", "hub"]
    context_length: int | None
    parameters: int | None
    modules: list[str] | None


class SlotOut(BaseModel):
    kind: Literal["cpu", "cuda"]
    index: int
    name: str
    memory_bytes: int
    engines: list[str]


class GpuOut(SlotOut):
    worker: str


class WorkerOut(BaseModel):
    """A supervisor that has lately been alive, and those of its jobs that the caller may see."""

    id: str
    hostname: str
    slots: list[SlotOut]
    jobs: list[str]
    started_at: Time
    seen_at: Time


class QueueOut(BaseModel):
    """The caller's own jobs; an admin's: everybody's."""

    queued: int
    running: int
    oldest_queued_at: Time | None


class QuotaOut(BaseModel):
    """What the caller has used of something, and the most that it may; null for any amount."""

    used: float
    limit: float | None


class QuotasOut(BaseModel):
    """The caller's quotas. `gpu_hours` count from the first of the month (UTC)."""

    queued_jobs: QuotaOut
    queued_exports: QuotaOut
    running_jobs: QuotaOut
    gpu_hours: QuotaOut
    stored_bytes: QuotaOut


class SystemOut(BaseModel):
    version: str
    gpus: list[GpuOut]
    workers: list[WorkerOut]
    queue: QueueOut
    quotas: QuotasOut
    gpu_seconds_lately: float = Field(
        description="What the caller has used, with a half-life of a day: who has used least is next."
    )
    redis: bool = Field(description="Without Redis everything works, a little later.")
    free_bytes: int | None = Field(description="Free space of the artifact store, where it has a limit.")


class HealthOut(BaseModel):
    status: Literal["ok"]


class ReadyOut(BaseModel):
    """Ready to take jobs. Redis being away is told and no reason not to be: jobs are still accepted."""

    status: Literal["ready"]
    database: bool
    store: bool
    redis: bool
