"""The shapes of answers under `/v1`: OpenAI's, with its field names. Times are seconds since 1970."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, Field

from shared.repository.uploads import upload_status
from shared.tables import DatasetRow, UploadPartRow, UploadRow, Webhook

Item = TypeVar("Item", bound="Identified")


class Identified(BaseModel):
    id: str


class ListV1(BaseModel, Generic[Item]):
    """One page; the next one begins `after` the last id of this one."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None

    @classmethod
    def of(cls, data: list[Item], *, has_more: bool = False) -> ListV1[Item]:
        ends = {"first_id": data[0].id, "last_id": data[-1].id} if data else {}
        return cls(data=data, has_more=has_more, **ends)


class FileV1(Identified):
    """A file. `status_details` says why one to train on can't be used."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None

    @classmethod
    def of(cls, row: DatasetRow) -> FileV1:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=seconds(row.created_at),
            expires_at=seconds(row.expires_at) if row.expires_at else None,
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            status_details=row.error,
        )


class FileDeletedV1(Identified):
    object: Literal["file"] = "file"
    deleted: bool = True


class UploadV1(Identified):
    """A file that comes in parts; `file` is there once it is complete."""

    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileV1 | None = None

    @classmethod
    def of(cls, row: UploadRow, file: DatasetRow | None = None) -> UploadV1:
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=seconds(row.created_at),
            expires_at=seconds(row.expires_at),
            filename=row.filename,
            purpose=row.purpose,
            status=upload_status(row),
            file=FileV1.of(file) if file else None,
        )


class UploadPartV1(Identified):
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str

    @classmethod
    def of(cls, row: UploadPartRow) -> UploadPartV1:
        return cls(id=row.id, created_at=seconds(row.created_at), upload_id=row.upload_id)


class ModelV1(Identified):
    """A base model of this server, or what a job made."""

    object: Literal["model"] = "model"
    created: int = Field(description="0 where nobody knows: a base model.")
    owned_by: str


class ModelDeletedV1(Identified):
    object: Literal["model"] = "model"
    deleted: bool = True


class JobErrorV1(BaseModel):
    code: str
    message: str
    param: str | None


class HyperparametersV1(BaseModel):
    """Values that a job really has: `auto` is resolved when it is accepted."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float


class SupervisedV1(BaseModel):
    hyperparameters: HyperparametersV1


class MethodV1(BaseModel):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedV1


class JobV1(Identified):
    """A job. `tuneyard` has what OpenAI's shape has no place for."""

    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobErrorV1 | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: HyperparametersV1
    integrations: list[dict[str, Any]]
    metadata: dict[str, str]
    method: MethodV1
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal[
        "validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"
    ]
    trained_tokens: int | None
    training_file: str
    user_provided_suffix: str | None
    validation_file: str | None
    tuneyard: dict[str, Any]


class EventV1(Identified):
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointMetricsV1(BaseModel):
    """Null where the step was not evaluated."""

    step: int
    train_loss: float | None
    train_mean_token_accuracy: float | None
    valid_loss: float | None
    valid_mean_token_accuracy: float | None
    full_valid_loss: float | None
    full_valid_mean_token_accuracy: float | None


class CheckpointV1(Identified):
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetricsV1
    step_number: int


class WebhookV1(Identified):
    """Where events go. `last_error` says why the latest delivery failed, if it did."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    created_at: int
    event_types: list[str]
    name: str
    signing_secret_hint: str
    updated_at: int
    url: str
    last_error: str | None

    @classmethod
    def of(cls, row: Webhook) -> WebhookV1:
        return cls(**_webhook_fields(row))


class WebhookWithSecretV1(WebhookV1):
    """The same with its secret, which is shown when it is made and no more."""

    signing_secret: str

    @classmethod
    def with_secret(cls, row: Webhook, secret: str) -> WebhookWithSecretV1:
        return cls(signing_secret=secret, **_webhook_fields(row))


class WebhookDeletedV1(Identified):
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class WebhookTestV1(BaseModel):
    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int
    success: Literal[True] = True
    webhook_endpoint_id: str


class EventTypesV1(BaseModel):
    object: Literal["list"] = "list"
    data: list[str]


def _webhook_fields(row: Webhook) -> dict[str, Any]:
    return {
        "id": row.id,
        "created_at": seconds(row.created_at),
        "event_types": row.event_types,
        "name": row.name,
        "signing_secret_hint": f"{row.secret_hint}…",
        "updated_at": seconds(row.updated_at),
        "url": row.url,
        "last_error": row.last_error,
    }


def seconds(moment: datetime) -> int:
    """Whole seconds since 1970."""
    return int(moment.timestamp())
