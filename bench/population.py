"""A database with history: owners, queued and finished jobs, logs; written in bulk."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert

from shared.clock import utcnow
from shared.database import Database, Session
from shared.events import Entry
from shared.ids import new_dataset_id, new_export_id, new_job_id
from shared.lifecycle import ExportStatus, JobStatus
from shared.plan import Plan
from shared.repository import keys, logs, tallies
from shared.spec import BUNDLED_MODEL, JobSpec
from shared.tables import (
    RESULTS,
    ArtifactRow,
    AuditEntry,
    CheckpointRow,
    DatasetRow,
    ExportTask,
    Job,
    JobLabel,
    LogEntry,
    Metric,
    OwnerRow,
)

AT_A_TIME = 5000
ENTRIES_OF_A_JOB = 5
STEPS_OF_A_JOB = 20
# One job in so many is labelled with this.
RARE = 500
FILES = (("adapter.tar", "adapter"), ("manifest.json", "manifest"), ("metrics.csv", "metrics"))
PLAN = Plan(
    engine="compiled", device="cuda", quantization="none", precision="bf16", micro_batch=2, accumulation=4,
    gradient_checkpointing="none", peak_memory_bytes=32 << 30, tokens_per_second=22_000,
    reason="the fastest that fits: 32.0 of 79.1 GiB",
)  # fmt: skip
SPEC = JobSpec.from_json({"model": BUNDLED_MODEL, "max_seq_length": 512}).to_json()
REPORT = {
    "rows": 112_960, "used": 112_841, "dropped": {"too_long": 119}, "tokens": 37_485_744,
    "trained_tokens": 19_114_302, "packed_rows": 9_400, "fill": 0.967,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much there is of everything. `entries` are one job's, `spread` belong to many."""

    owners: int = 10
    queued: int = 100
    finished: int = 1000
    entries: int = 1000
    spread: int = 0


@dataclass(frozen=True)
class Population:
    """What was made, as far as probes need to name it. The jobs are the first owner's, oldest first."""

    key: str
    queued: list[str]
    finished: list[str]
    logged: str


def populate(database: Database, size: Size) -> Population:
    """Fill an empty database."""
    owners = [f"owner-{n}" for n in range(size.owners)]
    rng = random.Random(7)
    now = utcnow()
    with database.write() as session:
        key = keys.create_key(session, owners[0], admin=False)
        session.add_all([OwnerRow(name=owner, gpu_seconds=rng.random() * 1e5) for owner in owners])
        logged = _job(owners[0], now, JobStatus.SUCCEEDED, 1) | {"last_seq": 0}
        finished = [
            _job(owners[n % size.owners], now - timedelta(minutes=size.finished - n), _end(n), n)
            for n in range(size.finished)
        ]
        queued = [
            _job(owners[n % size.owners], now - timedelta(seconds=size.queued - n), JobStatus.QUEUED, n)
            for n in range(size.queued)
        ]
        for part in _parts([*finished, *queued, logged]):
            session.execute(insert(Job), part)
            session.execute(insert(JobLabel), _label_rows(part))
        _add_records(session, [*finished, logged])
    for part in _parts(finished):
        with database.write() as session:
            session.execute(insert(LogEntry), [row for job in part for row in _log_rows(job)])
            session.execute(insert(Metric), [row for job in part for row in _metric_rows(job)])
    _write_log(database, [logged["id"]], size.entries)
    _write_log(database, [job["id"] for job in finished], size.spread)
    return Population(key, *[[j["id"] for j in p if j["owner"] == owners[0]] for p in (queued, finished)],
                      logged["id"])  # fmt: skip


def messages(count: int) -> Iterator[Entry]:
    """What a job says beside its measures."""
    for n in range(count):
        yield Entry(f"Preparing data: {n * 1000:,} rows read, {n * 998:,} used.")


def metrics(count: int) -> Iterator[Entry]:
    """What a job says every few steps, as the trainer's callback writes it."""
    for step in range(count):
        row = measured(step)
        text = (
            f"step {step}/{count} loss {row['loss']:.4f} lr {row['learning_rate']:.3g} "
            f"epoch {row['epoch']:.2f} grad norm {row['grad_norm']:.3f} "
            f"{row['tokens_per_second']:.0f} tokens/s ETA {count - step} s"
        )
        data = {**row, "total_steps": count, "eta_seconds": (count - step) * 1.23}
        yield Entry(text, type="metrics", data=data)


def measured(step: int) -> dict[str, Any]:
    """One step's row."""
    return {
        "step": step,
        "epoch": round(step * 0.000713, 6),
        "loss": 1.234567 + step % 97 / 1013,
        "learning_rate": 0.0002 - step * 1.7e-9,
        "grad_norm": 0.4321987 + step % 89 / 997,
        "tokens_per_second": 22113.27,
        "mean_token_accuracy": 0.781234,
        "tokens": step * 32_768,
    }


def _job(owner: str, made: datetime, status: JobStatus, n: int = 0) -> dict[str, Any]:
    labels = {"team": f"team-{n % 7}", "rare": f"r{n // RARE}" if n % RARE == 0 else "no"}
    ended = status != JobStatus.QUEUED
    return {
        **Job(
            id=new_job_id(),
            owner=owner,
            status=status,
            model=BUNDLED_MODEL if n % 2 else f"local/model-{n % 50}",
            priority=n % 3,
            place=int(made.timestamp() * 1e9),
            expected_seconds=3600,
            spec=SPEC,
            user_metadata=labels,
            plan=PLAN.model_dump() if ended else None,
            plan_history=[{"attempt": 1, "plan": PLAN.model_dump()}] if ended else [],
            data_report=REPORT if ended else None,
            progress={"step": 500, "total_steps": 500, "epoch": 3.0, "loss": 0.7} if ended else None,
            attempt=1 if ended else 0,
            created_at=made,
            started_at=made if ended else None,
            finished_at=made + timedelta(minutes=1) if ended else None,
            run_seconds=60 if ended else 0,
            last_seq=ENTRIES_OF_A_JOB if ended else 0,
            announced=ended,
        ).model_dump(),
    }


def _end(n: int) -> JobStatus:
    return (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED)[n % 4]


def _add_records(session: Session, finished: list[dict[str, Any]]) -> None:
    """What has happened to the jobs, and of those that succeeded files, checkpoints and an export."""
    for (owner, status), count in Counter((job["owner"], job["status"]) for job in finished).items():
        tallies.count(session, owner, tallies.JOBS, status, count)
    did = [{"time": j["created_at"], "owner": j["owner"], "action": "POST", "result": 201} for j in finished]
    session.execute(insert(AuditEntry), did)
    succeeded = [job for job in finished if job["status"] == JobStatus.SUCCEEDED]
    done = [job["id"] for job in succeeded]
    session.add_all([_results(job) for job in succeeded])
    session.add_all([_export(job) for job in succeeded])
    artifacts = [
        {"job_id": job_id, "name": name, "kind": kind, "bytes": 1 << 20, "sha256": "0" * 64, "key": name,
         "listed": True}
        for job_id in done
        for name, kind in FILES
    ]  # fmt: skip
    checkpoints = [
        {"job_id": job_id, "step": step, "bytes": 1 << 20, "metrics": {"train_loss": 0.7}}
        for job_id in done
        for step in (250, 500)
    ]
    if done:
        session.flush()
        session.execute(insert(ArtifactRow), artifacts)
        session.execute(insert(CheckpointRow), checkpoints)


def _results(job: dict[str, Any]) -> DatasetRow:
    return DatasetRow(
        id=new_dataset_id(), owner=job["owner"], filename="results.csv", bytes=1000, sha256="0" * 64,
        status="processed", format="text", key="results", purpose=RESULTS, job_id=job["id"],
        created_at=job["created_at"],
    )  # fmt: skip


def _export(job: dict[str, Any]) -> ExportTask:
    return ExportTask(
        id=new_export_id(), job_id=job["id"], format="gguf:q8_0", status=ExportStatus.SUCCEEDED,
        created_at=job["finished_at"],
    )  # fmt: skip


def _log_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"job_number": job["number"], "seq": seq, "time": job["created_at"], "level": entry.level,
         "type": entry.type, "message": entry.message, "data": entry.data}
        for seq, entry in enumerate(messages(ENTRIES_OF_A_JOB), start=1)
    ]  # fmt: skip


def _metric_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"job_number": job["number"], "step": step, "values": measured(step)}
        for step in range(STEPS_OF_A_JOB)
    ]


def _label_rows(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"job_id": job["id"], "key": k, "value": v, "owner": job["owner"], "created_at": job["created_at"]}
        for job in jobs
        for k, v in job["user_metadata"].items()
    ]


def _write_log(database: Database, job_ids: list[str], count: int) -> None:
    """Entries of one job, or of many in turns of a hundred, as they come from jobs that run side by side."""
    each = count // len(job_ids)
    for begin in range(0, each, 100 if len(job_ids) > 1 else AT_A_TIME):
        size = min(each - begin, 100 if len(job_ids) > 1 else AT_A_TIME)
        for part in _parts(job_ids):
            with database.write() as session:
                for job_id in part:
                    logs.append_entries(session, job_id, list(metrics(size)))


def _parts(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), AT_A_TIME):
        yield items[start : start + AT_A_TIME]
