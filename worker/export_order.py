"""What an export of a finished job is made from, brought to this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shared.database import Database
from shared.errors import JobFailure
from shared.exports import artifact_name
from shared.lifecycle import FailureCode
from shared.repository import exports, files, jobs
from shared.spec import JobSpec
from shared.storage import Store
from worker.checkpoints import FOLDER, checkpoint_folder
from worker.order import Order

ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LaterExport:
    """One file to be made of a job that has succeeded.

    `adapter` is the job's `adapter.tar` and `manifest` its `manifest.json`; `weights` is the checkpoint's
    adapter, which takes the place of the last one, None where the last one is asked for. `smallest_gguf` is
    the size of the smallest GGUF that there is of this adapter, None if there is none.
    """

    spec: JobSpec
    format: str
    checkpoint: int | None
    adapter: Path
    manifest: Path
    weights: Path | None
    smallest_gguf: int | None


def checkpoint_weights(work: Path, job_id: str, step: int) -> Path:
    """Where a box has the adapter of a checkpoint of a job that it trained."""
    return checkpoint_folder(work / job_id / FOLDER, step) / ADAPTER_FILE


def read_export(order: Order, export_id: str, database: Database, store: Store) -> LaterExport:
    """
    Raises:
        LeaseLost: another attempt has it.
        JobFailure: `export_failed`: what it is to be made from is gone.
    """
    root = Path(order.workdir)
    with database.write() as session:
        task = exports.owned_export(session, order.job_id, export_id, order.token)
        spec = JobSpec.from_json(jobs.get_job(session, order.job_id, None).spec)
        rows = {
            name: files.find_artifact(session, order.job_id, name)
            for name in ("adapter.tar", "manifest.json")
        }
        keys = {name: row.key for name, row in rows.items() if row is not None}
        there = [
            row.bytes
            for row in files.list_artifacts(session, order.job_id)
            if row.kind.startswith("gguf:") and row.name == artifact_name(row.kind, task.checkpoint)
        ]
        fmt, step = task.format, task.checkpoint
    try:
        found = {name: store.fetch(keys[name], root / name) for name in rows}
    except (FileNotFoundError, KeyError) as error:
        raise JobFailure(
            FailureCode.EXPORT_FAILED, "The job's adapter is gone from the store.", "Train the job again."
        ) from error
    weights = checkpoint_weights(root.parents[1], order.job_id, step) if step is not None else None
    if weights is not None and not weights.is_file():
        raise JobFailure(
            FailureCode.EXPORT_FAILED, f"The checkpoint of step {step} is gone.", "Choose another checkpoint."
        )
    return LaterExport(
        spec=spec,
        format=fmt,
        checkpoint=step,
        adapter=found["adapter.tar"],
        manifest=found["manifest.json"],
        weights=weights,
        smallest_gguf=min(there, default=None),
    )
