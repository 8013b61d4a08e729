"""What the checker compares: what clients were told, and what is there at the end."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlmodel import col, select

from shared.database import Database
from shared.repository import logs, tallies
from shared.repository.logs import StoredEntry
from shared.settings import Settings
from shared.storage import Store
from shared.tables import (
    ArtifactRow,
    CheckpointCopy,
    CheckpointRow,
    DatasetRow,
    ExportTask,
    IdempotencyKey,
    Job,
    JobLabel,
    LogEntry,
    Metric,
    OwnerRow,
    UploadPartRow,
)
from tests.chaos.history import Event, read_history

SUBMISSION = "submission"


@dataclass(frozen=True)
class Page:
    """Entries that one answer or one stretch of a stream gave after `after`: seq and what they said."""

    client: str
    job_id: str
    after: int
    entries: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Download:
    job_id: str
    name: str
    listed: str
    got: str


@dataclass
class Seen:
    """All that clients were told. Lists and sets take additions from several threads."""

    # Submission (the idempotency key) and the job that was answered.
    accepted: list[tuple[str, str]] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)
    # Client and job: the statuses in the order in which they came, each once in a row.
    statuses: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    # How streams said that their job had ended.
    endings: list[tuple[str, str]] = field(default_factory=list)
    downloads: list[Download] = field(default_factory=list)
    # File id and hash of what was answered with 201.
    uploads: list[tuple[str, str]] = field(default_factory=list)
    # Jobs that a cancellation was answered for, was asked for; jobs whose deletion was asked for.
    cancelled: set[str] = field(default_factory=set)
    cancel_asked: set[str] = field(default_factory=set)
    delete_asked: set[str] = field(default_factory=set)
    # Answers that no fault excuses.
    surprises: list[str] = field(default_factory=list)

    def status(self, client: str, job_id: str, status: str) -> None:
        told = self.statuses.setdefault((client, job_id), [])
        if not told or told[-1] != status:
            told.append(status)


@dataclass
class Truth:
    """What is in the database, in the store and in the work folders once everything has stopped.

    `stored` are the store's files: bytes and SHA-256 by key. `work` are the work folders' entries, two levels
    deep, as paths, `uploads` what uploads left behind, `checkpoints_on_disk` the steps that any box has, by
    job. `left_rows` are the numbers of rows by table whose job is gone.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    entries: dict[str, list[StoredEntry]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    checkpoints: dict[str, set[int]] = field(default_factory=dict)
    artifacts: list[ArtifactRow] = field(default_factory=list)
    copies: list[CheckpointCopy] = field(default_factory=list)
    files: list[DatasetRow] = field(default_factory=list)
    part_keys: set[str] = field(default_factory=set)
    exports: list[ExportTask] = field(default_factory=list)
    owners: dict[str, OwnerRow] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    history: list[Event] = field(default_factory=list)
    stored: dict[str, tuple[int, str]] = field(default_factory=dict)
    work: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    checkpoints_on_disk: dict[str, set[int]] = field(default_factory=dict)
    left_rows: Counter[str] = field(default_factory=Counter)


def read_truth(database: Database, settings: Settings, boxes: list[Path]) -> Truth:
    """Everything as it is now; nothing may run any more."""
    truth = Truth(history=read_history(database))
    with database.read() as session:
        truth.jobs = {job.id: job for job in session.exec(select(Job))}
        for job_id in truth.jobs:
            truth.entries[job_id] = logs.read_entries(session, job_id, 0, 1_000_000)
            truth.metrics[job_id] = logs.read_metrics(session, job_id)
            truth.checkpoints[job_id] = set()
        for row in session.exec(select(CheckpointRow)):
            truth.checkpoints[row.job_id].add(row.step)
        truth.artifacts = list(session.exec(select(ArtifactRow)))
        truth.copies = list(session.exec(select(CheckpointCopy)))
        truth.files = list(session.exec(select(DatasetRow)))
        truth.part_keys = set(session.exec(select(UploadPartRow.key)))
        truth.exports = list(session.exec(select(ExportTask)))
        ended = tallies.read(session, None, [tallies.JOBS])[tallies.JOBS]
        truth.ended = Counter({status: found.times for status, found in ended.items() if found.times})
        truth.owners = {owner.name: owner for owner in session.exec(select(OwnerRow))}
        for of, known in (
            (LogEntry.job_number, Job.number),
            (Metric.job_number, Job.number),
            (JobLabel.job_id, Job.id),
            (IdempotencyKey.job_id, Job.id),
        ):
            left = select(of).where(col(of).not_in(select(known)))
            truth.left_rows[str(of)] += len(session.exec(left).all())
    store = Store(settings.artifacts())
    for file in store.list_files():
        digest = hashlib.sha256()
        for part in store.read(file.name, 0, file.bytes):
            digest.update(part)
        truth.stored[file.name] = (file.bytes, digest.hexdigest())
    truth.uploads = sorted(path.name for path in (settings.root / "uploads").glob("*"))
    for box in boxes:
        work = box / "work"
        truth.work += sorted(str(path.relative_to(work)) for path in (*work.glob("*"), *work.glob("*/*")))
        for path in work.glob("*/checkpoints/checkpoint-*"):
            step = int(path.name.removeprefix("checkpoint-"))
            truth.checkpoints_on_disk.setdefault(path.parts[-3], set()).add(step)
    return truth


def told(message: str, kind: str, data: Mapping[str, Any] | None) -> str:
    """An entry in short, as it was sent and as it is stored."""
    text = json.dumps([message, kind, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
