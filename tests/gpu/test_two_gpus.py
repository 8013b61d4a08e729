"""Jobs on two GPUs: `python -m pytest tests/gpu/test_two_gpus.py` on a machine that has them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from shared.errors import JobStopped, ProcessLost
from shared.events import MemorySink
from tests.worker.training.samples import Running, make_spec, new_workdir, run_job
from worker.training.workdir import Workdir

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ENGINES = ("reference", "compiled")


def workdir_on(folder: Path, model: Path, gpus: int) -> Workdir:
    made = new_workdir(folder, model, rows=400)
    return Workdir(
        root=made.root,
        cache=made.cache,
        dataset_file=made.dataset_file,
        model_dir=model,
        gpus=tuple(range(gpus)),
    )


def ranks() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "worker.training.rank" in p.cmdline()]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_gpus_train_what_one_does(
    tmp_path: Path, tiny_model: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 sums in another order differ by its rounding: about 1% of a loss after some steps."""
    # A job's process sees its own GPUs alone. This one sees both, and the trainer would use both.
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 1)
    training: dict[str, Any] = {"max_steps": 20, "save_steps": 10, "learning_rate": 5e-4}
    spec = make_spec(training, lora={"r": 8, "dropout": 0.0})
    found = {}
    for gpus, accumulation in ((2, 2), (1, 4)):
        outcome = run_job(
            spec,
            workdir_on(tmp_path / str(gpus), tiny_model, gpus),
            engine=engine,
            device="cuda",
            precision="bf16",
            micro_batch=1,
            accumulation=accumulation,
            gpus=gpus,
        )
        found[gpus] = [float(row["loss"] or 0) for row in outcome.sink.rows]
        manifest = json.loads(outcome.path("manifest.json").read_text())
        assert manifest["used"]["gpus"] == gpus
        assert manifest["used"]["tokens"] > 0
    assert len(found[2]) == 20
    assert found[2][0] == pytest.approx(found[1][0], rel=2e-3)
    assert found[2] == pytest.approx(found[1], rel=1e-2)
    assert found[2][-1] < found[2][0]


def test_a_stopped_job_leaves_no_process(tmp_path: Path, tiny_model: Path) -> None:
    control = Running()

    class Stopping(MemorySink):
        def metrics(self, row: dict[str, float | int | None]) -> None:
            super().metrics(row)
            control.stop = True

    with pytest.raises(JobStopped):
        run_job(
            make_spec({"max_steps": 10_000}),
            workdir_on(tmp_path, tiny_model, 2),
            Stopping(),
            control,
            device="cuda",
            precision="bf16",
            gpus=2,
        )
    assert ranks() == []


def test_a_rank_that_dies_is_noticed_through_nccl(tmp_path: Path, tiny_model: Path) -> None:
    """Rank 0 waits on its GPU for what never comes, until its own group is broken off."""

    class Killing(MemorySink):
        def metrics(self, row: dict[str, float | int | None]) -> None:
            super().metrics(row)
            if len(self.rows) == 2:
                os.kill(ranks()[0].pid, signal.SIGKILL)

    with pytest.raises(ProcessLost, match=r"GPU 1 ended unexpectedly \(signal 9\)"):
        run_job(
            make_spec({"max_steps": 10_000}),
            workdir_on(tmp_path, tiny_model, 2),
            Killing(),
            device="cuda",
            precision="bf16",
            micro_batch=1,
            gpus=2,
        )
    assert ranks() == []
