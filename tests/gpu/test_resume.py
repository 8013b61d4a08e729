"""Going on from a checkpoint on a GPU, with each engine."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import psutil
import pytest
import torch

from shared.database import Database
from shared.repository import logs
from shared.settings import Settings
from shared.shape import ModelShape
from tests.conftest import wait_for
from tests.samples import add_dataset, make_job
from tests.worker.conftest import Start, doorbell, start
from tests.worker.test_supervisor import entries, wait_status
from tests.worker.training.samples import conversations, write_rows
from tests.worker.training.test_resume import Job, StepSink, die, make, messages
from worker.checkpoints import FOLDER, complete_checkpoints
from worker.gpus import probe_gpus

__all__ = ["doorbell", "start"]
pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize(
    "engine",
    [
        "reference",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton"),
        ),
    ],
)
def test_a_killed_job_goes_on_where_it_was(tmp_path: Path, tiny_model: Path, engine: str) -> None:
    """GPU kernels add up in no fixed order, so the losses are those of an uninterrupted run but for that."""
    plan = {"engine": engine, "device": "cuda", "precision": "bf16"}
    whole = Job(tmp_path / "whole", tiny_model, make()).attempt(**plan)
    job = Job(tmp_path / "killed", tiny_model, make())
    first = job.attempt(StepSink(6, die), **plan)
    assert list(complete_checkpoints(first.workdir.root / FOLDER)) == [4]
    second = job.attempt(**plan)
    assert "Resumed from step 4 of 9." in messages(second)
    expected = {row["step"]: row["loss"] for row in whole.sink.rows}
    found = {row["step"]: row["loss"] for row in second.sink.rows}
    assert found == pytest.approx(expected, rel=1e-2)


@pytest.mark.skipif(not importlib.util.find_spec("unsloth"), reason="needs Unsloth")
def test_a_job_of_unsloth_whose_process_is_killed_goes_on(
    start: Start, database: Database, settings: Settings, tmp_path: Path, tiny_model: Path
) -> None:
    """Under a supervisor, for Unsloth must be the first that its process imports."""
    start(
        module="worker.child",
        devices=probe_gpus()[:1],
        forked=False,
        models_root=tiny_model.parent,
        lease_seconds=60.0,
    )
    dataset_id = add_dataset(database, settings, write_rows(tmp_path / "rows.jsonl", conversations(400)))
    shape = ModelShape.from_config(json.loads((tiny_model / "config.json").read_text()))

    def make_one() -> str:
        return make_job(
            database,
            shape=shape,
            model=f"local/{tiny_model.name}",
            dataset={"source": "file", "file_id": dataset_id},
            engine="unsloth",
            max_seq_length=512,
            training={"max_steps": 120, "save_steps": 20, "logging_steps": 1},
        )

    def rows_of(job_id: str) -> dict[int, float]:
        with database.read() as session:
            return {
                int(row["step"] or 0): float(row["loss"] or 0) for row in logs.read_metrics(session, job_id)
            }

    whole, killed = make_one(), make_one()
    assert wait_status(database, whole, "succeeded", "failed", seconds=300).status == "succeeded"
    wait_for(lambda: len(rows_of(killed)) > 20, 300)
    (child,) = (p for p in psutil.Process().children() if "worker.child" in p.cmdline())
    child.kill()
    job = wait_status(database, killed, "succeeded", "failed", seconds=300)
    assert (job.status, job.attempt, job.losses) == ("succeeded", 2, 1)
    assert any(entry.message.startswith("Resumed from step") for entry in entries(database, killed))
    assert rows_of(killed).keys() == set(range(1, 121))
    assert rows_of(killed) == pytest.approx(rows_of(whole), rel=2e-2)
