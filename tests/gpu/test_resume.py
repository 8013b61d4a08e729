"""Going on from a checkpoint on a GPU, with each engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.worker.training.test_resume import Job, StepSink, die, make, messages
from worker.checkpoints import FOLDER, complete_checkpoints

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
