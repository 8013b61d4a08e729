"""A GPU that has less memory than was planned with: `python -m pytest tests/gpu/test_out_of_memory.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shared.database import Database
from shared.device import Device
from shared.repository import logs
from shared.settings import Settings
from shared.spec import BUNDLED_MODEL, JobSpec
from tests.samples import add_dataset, make_job
from tests.worker.conftest import Start, doorbell, start
from tests.worker.test_supervisor import entries, wait_status
from tests.worker.training.samples import conversations, write_rows
from worker.gpus import probe_gpus

__all__ = ["doorbell", "start"]
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CAP_GIB = 4


@pytest.mark.parametrize("engine", ["reference", "compiled", "unsloth"])
def test_a_plan_that_is_too_large_is_followed_by_cheaper_ones(
    start: Start, database: Database, settings: Settings, tmp_path: Path, engine: str
) -> None:
    """The supervisor plans for the whole card, of which the process gets 4 GiB.

    16 rows of 2048 tokens of SmolLM2 want 15 GB or so with all activations kept, under 2 GB with few rows
    and recomputation.
    """
    whole: Device = probe_gpus()[0]
    if engine not in whole.engines:
        pytest.skip(f"{engine} is not installed")
    dataset_id = add_dataset(database, settings, write_rows(tmp_path / "rows.jsonl", conversations(2000)))
    job_id = make_job(
        database,
        model=BUNDLED_MODEL,
        dataset={"source": "file", "file_id": dataset_id},
        max_seq_length=2048,
        engine=engine,
        training={
            "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1, "max_steps": 6,
            "save_steps": 2, "logging_steps": 1,
        },
    )  # fmt: skip
    start(
        module="worker.child",
        devices=[whole],
        forked=False,
        gpu_memory_fraction=(CAP_GIB << 30) / whole.memory_bytes,
        lease_seconds=60.0,
    )
    job = wait_status(database, job_id, "succeeded", "failed", seconds=540)
    assert job.status == "succeeded", job.failure
    assert job.attempt > 1, "the first plan was to fail"
    assert job.losses == 0
    *failed, last = job.plan_history
    assert {entry["reason"] for entry in failed} == {"out of memory"}
    assert "reason" not in last
    batch = JobSpec.from_json(job.spec).training.effective_batch
    for entry in job.plan_history:
        plan = entry["plan"]
        print(entry.get("reason", "succeeded"), entry.get("step"), plan["reason"])
        assert plan["micro_batch"] * plan["accumulation"] * plan["gpus"] == batch
    told = [entry.message for entry in entries(database, job_id)]
    assert sum(m.startswith("Trying with less memory") for m in told) == len(failed)
    with database.read() as session:
        assert [row["step"] for row in logs.read_metrics(session, job_id)] == list(range(1, 7))
