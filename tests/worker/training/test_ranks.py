"""Jobs on several devices: two processes on the CPU, which talk through gloo as GPUs do through NCCL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from shared.errors import JobFailure, JobStopped, OutOfMemory, ProcessLost
from shared.events import GoOn, MemorySink
from shared.lifecycle import FailureCode, Phase
from shared.plan import Plan
from tests.conftest import wait_for
from tests.worker.training.samples import Running, make_spec, new_workdir, plan_for, run_job
from tests.worker.training.warm import Popen, running
from worker.training.models import ResolvedModel
from worker.training.ranks import Ranks, break_off
from worker.training.workdir import Workdir

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[3]


def ranks() -> list[psutil.Process]:
    started = [p for p in psutil.Process().children() if "worker.training.rank" in p.cmdline()]
    return started + running()


class StopAfterAStep(MemorySink):
    """Stops the job once it has trained a step."""

    def __init__(self, control: Running) -> None:
        super().__init__()
        self.control = control

    def metrics(self, row: dict[str, float | int | None]) -> None:
        super().metrics(row)
        self.control.stop = True


def test_two_ranks_train_what_one_does(tmp_path: Path, tiny_model: Path) -> None:
    # 45 rows make a last step that is not full, and a last batch that only one rank has.
    spec = make_spec(
        {"num_train_epochs": 2, "max_steps": None, "eval_steps": 3, "optim": "adamw_torch"},
        lora={"r": 8, "dropout": 0.0},
        packing=False,
        validation_fraction=0.2,
    )
    found = {}
    for gpus, accumulation in ((2, 2), (1, 4)):
        workdir = new_workdir(tmp_path / str(gpus), tiny_model, rows=45)
        outcome = run_job(spec, workdir, gpus=gpus, micro_batch=2, accumulation=accumulation)
        weights = load_file(workdir.root / "adapter" / "adapter_model.safetensors")
        found[gpus] = outcome.sink, weights
    (two, weights), (one, expected) = found[2], found[1]
    assert len(two.rows) == len(one.rows) > 4
    for mine, other in zip(two.rows, one.rows, strict=True):
        # Not the fraction of an epoch: the last batches are filled up.
        names = ("loss", "grad_norm", "learning_rate", "mean_token_accuracy")
        assert [mine[n] for n in names] == pytest.approx([other[n] for n in names], rel=2e-4, abs=1e-5)
        assert mine.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), rel=1e-4)
    assert sum("eval_loss" in row for row in two.rows) > 1
    for name, weight in expected.items():
        assert (weights[name] - weight).norm() < 0.01 * weight.norm()
    assert ranks() == []
    assert "RANK" not in os.environ


def test_each_rank_sees_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    class Noted:
        stdin = None

        def __init__(self, _command: list[str], *, env: dict[str, str], **_rest: object) -> None:
            seen.append(env)

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("worker.training.ranks.subprocess.Popen", Noted)
    spec = make_spec({"per_device_train_batch_size": 6})
    workdir = replace(new_workdir(tmp_path, None), gpus=(3, 0, 5))
    plan = plan_for(spec, gpus=3, device="cuda")
    Ranks(plan, workdir, Running()).start(spec, ResolvedModel("local/tiny", tmp_path))
    # This process is rank 0, on the first of them. To each the one that it sees is the first.
    names = ("CUDA_VISIBLE_DEVICES", "RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert [[env[name] for name in names] for env in seen] == [["0", "1", "0", "3"], ["5", "2", "0", "3"]]


@pytest.mark.usefixtures("warm")
def test_a_stopped_job_ends_all_ranks(tmp_path: Path, tiny_model: Path) -> None:
    control = Running()
    sink = StopAfterAStep(control)
    with pytest.raises(JobStopped):
        run_job(
            make_spec({"max_steps": 500}),
            new_workdir(tmp_path, tiny_model),
            sink,
            control,
            gpus=2,
            micro_batch=1,
        )
    assert len(sink.rows) >= 1
    assert ranks() == []


class LeaveAfterAStep(StopAfterAStep):
    """Lets the job end with a checkpoint."""

    def metrics(self, row: dict[str, float | int | None]) -> None:
        MemorySink.metrics(self, row)
        self.control.leave = True


@pytest.mark.usefixtures("warm")
def test_a_job_that_left_with_a_checkpoint_goes_on_with_fewer_ranks(tmp_path: Path, tiny_model: Path) -> None:
    spec = make_spec({"max_steps": 6, "gradient_accumulation_steps": 2}, lora={"r": 8, "dropout": 0.0})
    control = Running()
    workdir = new_workdir(tmp_path, tiny_model)
    with pytest.raises(JobStopped):
        run_job(spec, workdir, LeaveAfterAStep(control), control, gpus=2, micro_batch=1, accumulation=1)
    assert ranks() == []
    assert (workdir.root / "checkpoints" / "checkpoint-2").is_dir()
    outcome = run_job(spec, workdir, micro_batch=1, accumulation=2)
    assert "Resumed from step 2 of 6." in [entry.message for entry in outcome.sink.entries]
    assert [row["step"] for row in outcome.sink.rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("warm")
def test_a_rank_that_dies_ends_the_attempt_and_is_a_loss(tmp_path: Path, tiny_model: Path) -> None:
    sink = MemorySink()

    def kill() -> None:
        wait_for(lambda: sink.rows)
        os.kill(ranks()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ProcessLost, match=r"process on GPU 1 ended unexpectedly \(signal 9\)"):
        run_job(
            make_spec({"max_steps": 5000}), new_workdir(tmp_path, tiny_model), sink, gpus=2, micro_batch=1
        )
    killer.join()
    assert ranks() == []


@pytest.mark.usefixtures("warm")
def test_a_rank_out_of_memory_is_the_jobs_own(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.training.ranks.MODULE", "tests.worker.training.hungry_rank")
    sink = MemorySink()
    with pytest.raises(JobFailure, match="no room for 4 GiB") as failed:
        run_job(
            make_spec({"max_steps": 5000}), new_workdir(tmp_path, tiny_model), sink, gpus=2, micro_batch=1
        )
    assert failed.value.code == FailureCode.OUT_OF_MEMORY
    assert [row["step"] for row in sink.rows] == [1]
    assert ranks() == []


MEET = """
import os, sys
from pathlib import Path
from shared.errors import ProcessLost
from tests.worker.training.samples import make_spec, new_workdir, run_job
from tests.worker.training.warm import fork_programs
from worker.training import ranks

if __name__ == "__main__":
    ranks.subprocess = fork_programs()
    ranks.MODULE = "tests.worker.training.late_rank"
    try:
        run_job(make_spec(), new_workdir(Path(sys.argv[1]), Path(sys.argv[2])), gpus=2, micro_batch=1)
    except ProcessLost as error:
        print(error, flush=True)
    # A thread still waits for the other.
    os._exit(0)
"""


def test_a_rank_that_dies_as_they_meet_is_not_waited_for(tmp_path: Path, tiny_model: Path) -> None:
    """In a process of its own, as jobs are: torch can't meet anybody else in this one."""
    program = tmp_path / "meet.py"
    program.write_text(MEET)
    command = [sys.executable, str(program), str(tmp_path), str(tiny_model)]
    with (tmp_path / "said").open("wb") as said, (tmp_path / "complaints").open("wb") as complaints:
        Popen(command, cwd=ROOT, stdout=said, stderr=complaints).wait(300)
    expected = "The job's process on GPU 1 ended unexpectedly (exit code 7).\n"
    assert (tmp_path / "said").read_text() == expected, (tmp_path / "complaints").read_text()


def test_what_a_lost_rank_leaves_behind_is_not_taken_for_training_that_diverged(tmp_path: Path) -> None:
    diverged = JobFailure(FailureCode.DIVERGED, "The loss was nan.", "")
    lost = Ranks(plan_for(make_spec(), gpus=2), new_workdir(tmp_path, None), Running())
    lost._processes = [subprocess.Popen(["/bin/sh", "-c", "kill -9 $$"], text=True)]
    lost._processes[0].wait()
    with pytest.raises(ProcessLost, match="signal 9"):
        lost.__exit__(JobFailure, diverged, None)


def test_a_group_that_was_broken_off_hides_no_failure(tmp_path: Path) -> None:
    """On GPUs the thread that watches the others has broken it off before this one comes to it."""
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    break_off()
    assert not dist.is_initialized()
    plan = plan_for(make_spec(), gpus=2, device="cuda")
    workdir = replace(new_workdir(tmp_path, None), gpus=(0, 7))
    lost = Ranks(plan, workdir, Running())
    lost._joined = True
    lost._processes = [subprocess.Popen(["/bin/sh", "-c", "kill -9 $$"], text=True)]
    lost._processes[0].wait()
    error = ValueError("Default process group has not been initialized")
    with pytest.raises(ProcessLost, match="GPU 7"):
        lost.__exit__(ValueError, error, None)


class InEvaluation(MemorySink):
    """Does something when the job's first evaluation begins."""

    def __init__(self, act: Callable[[], None]) -> None:
        super().__init__()
        self.act: Callable[[], None] | None = act

    def phase(self, phase: Phase) -> None:
        super().phase(phase)
        if phase is Phase.EVALUATING and self.act is not None:
            act, self.act = self.act, None
            act()


@pytest.mark.usefixtures("warm")
def test_what_ends_an_evaluation_of_two_ranks_changes_no_loss(tmp_path: Path, tiny_model: Path) -> None:
    """A pause or SIGTERM, a stop at once, and a kill of the other rank."""
    spec = make_spec(
        {"max_steps": 4, "eval_steps": 2, "save_steps": 1, "gradient_accumulation_steps": 1},
        lora={"r": 8, "dropout": 0.3},
        packing=False,
        validation_fraction=0.2,
    )
    ways = {"gpus": 2, "micro_batch": 1}
    whole = run_job(spec, new_workdir(tmp_path / "whole", tiny_model), **ways).sink
    workdir = new_workdir(tmp_path / "ended", tiny_model)
    attempts: list[MemorySink] = []

    def ended(act: Callable[[], None], error: type[Exception], control: Running) -> None:
        attempts.append(InEvaluation(act))
        with pytest.raises(error):
            run_job(spec, workdir, attempts[-1], control, **ways)
        assert ranks() == []

    control = Running()
    ended(lambda: os.kill(ranks()[0].pid, signal.SIGKILL), ProcessLost, control)
    ended(lambda: setattr(control, "stop", True), JobStopped, control)
    control = Running()
    ended(lambda: setattr(control, "leave", True), JobStopped, control)
    attempts.append(run_job(spec, workdir, **ways).sink)

    def losses(sink: MemorySink) -> dict[Any, Any]:
        return {r["step"]: {k: v for k, v in r.items() if k != "tokens_per_second"} for r in sink.rows}

    assert losses(attempts[-1]) == losses(whole)
    assert [step for step, row in losses(whole).items() if "eval_loss" in row] == [2, 4]


@pytest.mark.parametrize("cause", ["full", "gone"])
def test_of_ranks_that_failed_the_one_counts_that_the_others_lost(tmp_path: Path, cause: str) -> None:
    plan = Plan(
        engine="reference", device="cpu", quantization="none", precision="bf16", micro_batch=1,
        accumulation=1, gradient_checkpointing="all", gpus=3, reason="a test",
    )  # fmt: skip
    job = Ranks(plan, Workdir(root=tmp_path, cache=tmp_path), GoOn())
    folder = tmp_path / "ranks"
    folder.mkdir()
    lost = {"code": "internal_error", "message": "Connection closed by peer.", "advice": "Try again."}
    full = {"code": "out_of_memory", "message": "No room.", "advice": "", "of_machine": False}
    for rank, told in enumerate((lost, full if cause == "full" else None), start=1):
        if told is not None:
            (folder / f"{rank}.failure").write_text(json.dumps(told))
        job._processes.append(subprocess.Popen(["/bin/false"], stdin=subprocess.PIPE, text=True))
        job._processes[-1].wait()
    with pytest.raises(OutOfMemory if cause == "full" else ProcessLost) as failed, job:
        job.check()
    if isinstance(failed.value, OutOfMemory):
        assert not failed.value.of_machine
    assert job._processes == []
