"""The tables. Times are UTC; JSON columns hold plain JSON types."""

from __future__ import annotations

import secrets
import time
from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Column, ForeignKey, Index, String, UniqueConstraint
from sqlmodel import Field, SQLModel

from shared.clock import month_of, utcnow
from shared.columns import BIG_ID, Microseconds, UtcDateTime, Word

# Kept by their places: new ones go to the end.
LEVELS = ("info", "debug", "warning", "error")
ENTRY_TYPES = ("message", "metrics", "phase")
# The purpose of a file to train on.
FINE_TUNE = "fine-tune"
RESULTS = "fine-tune-results"


def _key_of(table: str, **options: Any) -> Any:
    key = ForeignKey(f"{table}.id", ondelete="CASCADE")
    return Field(sa_column=Column(String, key, nullable=False, **options))


def _number_key() -> Any:
    key = ForeignKey("job.number", ondelete="CASCADE")
    return Field(sa_column=Column(BigInteger, key, primary_key=True, autoincrement=False))


class ApiKey(SQLModel, table=True):
    """A key, stored as its hash; `name` is the owner of all that is made with it."""

    __tablename__ = "api_key"

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True)
    key_hash: str = Field(unique=True)
    hint: str
    admin: bool = False
    # May post jobs of high priority; an admin key may in any case.
    high: bool = False
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class OwnerRow(SQLModel, table=True):
    """What an owner has used, and the quotas that are its own (None: the settings', -1: none at all).

    Only ended attempts are counted here; those that run are added when it is read.
    """

    __tablename__ = "owner"

    name: str = Field(primary_key=True)
    # GPU-seconds, fading away with their half-life, as they stood at `counted_at`.
    gpu_seconds: float = 0
    counted_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    # The first instant of the month (UTC) that `month_gpu_seconds` belong to.
    month: datetime = Field(default_factory=lambda: month_of(utcnow()), sa_type=UtcDateTime)
    month_gpu_seconds: float = 0
    stored_bytes: int = Field(default=0, sa_type=BigInteger)
    max_queued_jobs: int | None = None
    max_running_jobs: int | None = None
    max_gpu_hours: float | None = None
    max_stored_bytes: int | None = Field(default=None, sa_type=BigInteger)


class Job(SQLModel, table=True):
    """A fine-tuning job. `last_seq` is the number of its newest log entry."""

    __tablename__ = "job"
    __table_args__ = (
        # Every page is read from an index in its order: an owner's jobs or all, with one filter at most.
        Index("ix_job_page", "created_at", "id"),
        Index("ix_job_owner_page", "owner", "created_at", "id"),
        Index("ix_job_status_page", "status", "created_at", "id"),
        Index("ix_job_owner_status_page", "owner", "status", "created_at", "id"),
        Index("ix_job_model_page", "model", "created_at", "id"),
        Index("ix_job_owner_model_page", "owner", "model", "created_at", "id"),
        Index("ix_job_claim", "status", "priority", "owner", "place", "id"),
        Index("ix_job_news", "announced", "status"),
    )

    id: str = Field(primary_key=True)
    # What its log's rows are kept under, for the id is long: random, so that nobody has to allot it.
    number: int = Field(
        default_factory=lambda: secrets.randbits(63), sa_type=BigInteger, unique=True, index=True
    )
    owner: str
    status: str
    phase: str | None = None
    model: str
    # 0 high, 1 normal, 2 low: the order in which they are claimed.
    priority: int
    # Its place among its owner's jobs of one priority: when it was made, in nanoseconds, until it is moved.
    place: int = Field(default_factory=time.time_ns, sa_type=BigInteger)
    # What training alone was estimated to take when the job was posted.
    expected_seconds: float | None = None
    spec: dict[str, Any] = Field(sa_type=JSON)
    user_metadata: dict[str, str] = Field(sa_type=JSON)
    # What is known of the model's layers, so that planning needs neither its files nor the hub.
    model_shape: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    plan: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    plan_history: list[dict[str, Any]] = Field(default_factory=list, sa_type=JSON)
    data_report: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    progress: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    failure: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    attempt: int = 0
    # Attempts that ended because the process running them died.
    losses: int = 0
    last_seq: int = Field(default=0, sa_type=BigInteger)
    worker: str | None = None
    lease_token: str | None = None
    lease_expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    # Seconds that ended attempts ran for, and when the one that runs now began.
    run_seconds: float = 0
    attempt_started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    # Whether its owner's webhooks have been given the news of its end.
    announced: bool = False


class JobLabel(SQLModel, table=True):
    """One of a job's metadata, with what a page of the jobs that have it goes by."""

    __tablename__ = "job_label"
    __table_args__ = (
        Index("ix_job_label_owner_page", "owner", "key", "value", "created_at", "job_id"),
        Index("ix_job_label_page", "key", "value", "created_at", "job_id"),
    )

    job_id: str = _key_of("job", primary_key=True)
    key: str = Field(primary_key=True)
    value: str
    owner: str
    created_at: datetime = Field(sa_type=UtcDateTime)


class Tally(SQLModel, table=True):
    """How often something has happened to an owner's jobs, so that nobody has to count the jobs of years."""

    __tablename__ = "tally"

    owner: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    label: str = Field(primary_key=True)
    count: int = Field(default=0, sa_type=BigInteger)
    total: float = 0


class LogEntry(SQLModel, table=True):
    """One entry of a job's log; `seq` counts from 1 without gaps.

    A row is its key and little else: there are a million of them.
    """

    __tablename__ = "log_entry"
    __table_args__ = {"sqlite_with_rowid": False}

    job_number: int = _number_key()
    seq: int = Field(primary_key=True, sa_type=BigInteger)
    time: datetime = Field(sa_type=Microseconds)
    level: str = Field(sa_type=Word(*LEVELS))
    type: str = Field(sa_type=Word(*ENTRY_TYPES))
    message: str
    data: dict[str, Any] | None = Field(default=None, sa_type=JSON)


class Metric(SQLModel, table=True):
    """One row a step; a step that a later attempt runs again replaces the earlier row."""

    __tablename__ = "metric"
    __table_args__ = {"sqlite_with_rowid": False}

    job_number: int = _number_key()
    step: int = Field(primary_key=True)
    values: dict[str, Any] = Field(sa_type=JSON)


class CheckpointRow(SQLModel, table=True):
    __tablename__ = "checkpoint"

    job_id: str = _key_of("job", primary_key=True)
    step: int = Field(primary_key=True)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    bytes: int = Field(sa_type=BigInteger)
    metrics: dict[str, Any] = Field(sa_type=JSON)


class CheckpointCopy(SQLModel, table=True):
    """The newest checkpoint of a job that is under way, as a tar in the store under `key`."""

    __tablename__ = "checkpoint_copy"

    job_id: str = _key_of("job", primary_key=True)
    step: int
    bytes: int = Field(sa_type=BigInteger)
    sha256: str
    key: str


class ArtifactRow(SQLModel, table=True):
    """A complete file in the store under `key`."""

    __tablename__ = "artifact"
    __table_args__ = (UniqueConstraint("job_id", "name"),)

    id: int | None = Field(default=None, primary_key=True)
    job_id: str = _key_of("job")
    name: str
    kind: str
    bytes: int = Field(sa_type=BigInteger)
    sha256: str
    key: str
    # The adapter of a job that did not ask for it is kept for later exports, and shown to nobody.
    listed: bool = True
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class ExportTask(SQLModel, table=True):
    """A file to be made after a job has succeeded: from its last adapter, or from a checkpoint's."""

    __tablename__ = "export_task"
    __table_args__ = (Index("ix_export_task_claim", "status", "created_at"),)

    id: str = Field(primary_key=True)
    job_id: str = _key_of("job", index=True)
    format: str
    checkpoint: int | None = None
    status: str
    failure: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    attempt: int = 0
    losses: int = 0
    worker: str | None = None
    # Workers that have looked for the checkpoint and don't have it.
    passed_by: list[str] = Field(default_factory=list, sa_type=JSON)
    lease_token: str | None = None
    lease_expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class DatasetRow(SQLModel, table=True):
    """A file in the store under `key`: uploaded, or a job's results. Those to train on are datasets.

    `job_id` is of the job whose results it holds; the file outlives the job.
    """

    __tablename__ = "dataset"
    __table_args__ = (
        Index("ix_dataset_page", "created_at", "id"),
        Index("ix_dataset_owner_page", "owner", "created_at", "id"),
        Index("ix_dataset_purpose_page", "purpose", "created_at", "id"),
        Index("ix_dataset_owner_purpose_page", "owner", "purpose", "created_at", "id"),
    )

    id: str = Field(primary_key=True)
    owner: str
    filename: str
    bytes: int = Field(sa_type=BigInteger)
    sha256: str
    status: str
    format: str
    report: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    error: str | None = None
    key: str
    purpose: str = FINE_TUNE
    job_id: str | None = Field(default=None, index=True)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)


class UploadRow(SQLModel, table=True):
    """A file that comes in parts. `bytes` is what its parts must add up to."""

    __tablename__ = "upload"
    __table_args__ = (Index("ix_upload_owner_status", "owner", "status"),)

    id: str = Field(primary_key=True)
    owner: str
    filename: str
    bytes: int = Field(sa_type=BigInteger)
    mime_type: str
    purpose: str
    # pending, completing (shown as pending), completed or cancelled; one that is over its time has expired.
    status: str
    # How long the file made of it is to live.
    file_seconds: int | None = None
    file_id: str | None = None
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    expires_at: datetime = Field(sa_type=UtcDateTime)


class UploadPartRow(SQLModel, table=True):
    """A complete part of an upload, in the store under `key`."""

    __tablename__ = "upload_part"

    id: str = Field(primary_key=True)
    upload_id: str = _key_of("upload", index=True)
    bytes: int = Field(sa_type=BigInteger)
    key: str
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class IdempotencyKey(SQLModel, table=True):
    """What a POST /jobs with this key made, for 24 hours."""

    __tablename__ = "idempotency_key"

    owner: str = Field(primary_key=True)
    key: str = Field(primary_key=True)
    body_hash: str
    job_id: str = _key_of("job", index=True)
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class Webhook(SQLModel, table=True):
    """Where an owner's events go. The secret signs them, so it can't be kept as a hash: it is sealed.

    `secret_hint` is how it begins. `old_secret` signs too until `old_secret_until`; `last_error` is of the
    latest delivery, if it failed.
    """

    __tablename__ = "webhook"

    id: str = Field(primary_key=True)
    owner: str = Field(index=True)
    name: str
    url: str
    event_types: list[str] = Field(sa_type=JSON)
    secret: str
    secret_hint: str
    old_secret: str | None = None
    old_secret_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    last_error: str | None = None
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    updated_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class Delivery(SQLModel, table=True):
    """An event that a webhook has not taken yet; `due_at` is when it is tried (again)."""

    __tablename__ = "delivery"
    __table_args__ = (Index("ix_delivery_webhook_due", "webhook_id", "due_at"),)

    id: int | None = Field(default=None, primary_key=True)
    webhook_id: str = _key_of("webhook")
    event_id: str
    body: str
    attempts: int = 0
    created_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    due_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime, index=True)


class WorkerRow(SQLModel, table=True):
    """A supervisor that has lately been alive."""

    __tablename__ = "worker"

    id: str = Field(primary_key=True)
    hostname: str
    slots: list[dict[str, Any]] = Field(sa_type=JSON)
    # What its GPUs do: `{"index", "name", "memory_bytes", "used_bytes", "utilization"}` each.
    gpus: list[dict[str, Any]] = Field(default_factory=list, sa_type=JSON)
    started_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)
    seen_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class OwnerSecret(SQLModel, table=True):
    """A secret for an owner's jobs, encrypted under a key that is not in the database."""

    __tablename__ = "owner_secret"

    owner: str = Field(primary_key=True)
    name: str = Field(primary_key=True)
    sealed: str
    updated_at: datetime = Field(default_factory=utcnow, sa_type=UtcDateTime)


class AuditEntry(SQLModel, table=True):
    """Who did what. Rows are added, and removed when they are old; none is changed."""

    __tablename__ = "audit_entry"

    id: int | None = Field(default=None, sa_column=Column(BIG_ID, primary_key=True, autoincrement=True))
    time: datetime = Field(sa_column=Column(UtcDateTime, nullable=False, index=True))
    owner: str = Field(index=True)
    key_id: int | None = None
    action: str
    object: str | None = None
    result: int
    address: str | None = None
