"""Checkpoints, and attempts that go on from them: bit for bit what an uninterrupted run does."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.clock import utcnow
from shared.database import Database
from shared.errors import JobStopped
from shared.events import Checkpoint, Entry, MemorySink
from shared.lifecycle import Phase
from shared.queue import Doorbell
from shared.repository import jobs, leases
from shared.settings import Settings
from shared.spec import JobSpec
from shared.storage import Store
from tests.samples import make_job
from tests.worker.training.samples import Outcome, Running, make_spec, new_workdir, plan_for
from worker.checkpoints import FOLDER, complete_checkpoints, take_over
from worker.copies import Copies, fetch_copy
from worker.lease import JobLease
from worker.order import Order
from worker.sink import DatabaseSink
from worker.training.checkpoints import RECORD
from worker.training.pipeline import run

pytestmark = pytest.mark.train

# Six packed rows, two a step: epochs end at steps 3, 6 and 9.
ROWS, HELD_OUT = 25, 0.2
DURATIONS = {"tokens_per_second"}


class _Killed(BaseException):
    """Stands for what kills a process: nobody catches it."""


class StepSink(MemorySink):
    """Does something when a step's row is told."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._step, self._act = step, act

    def metrics(self, row: dict[str, float | int | None]) -> None:
        super().metrics(row)
        if row["step"] == self._step:
            self._act()


def die() -> None:
    raise _Killed


def make(**fields: Any) -> JobSpec:
    training = {
        "max_steps": 9, "logging_steps": 1, "gradient_accumulation_steps": 2, "save_steps": 4,
        "per_device_train_batch_size": 1, "eval_steps": 3, **fields.pop("training", {}),
    }  # fmt: skip
    return make_spec(training, validation_fraction=HELD_OUT, lora={"dropout": 0.3}, **fields)


def losses(sink: MemorySink) -> dict[Any, Any]:
    return {row["step"]: {k: v for k, v in row.items() if k not in DURATIONS} for row in sink.rows}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "adapter_model.safetensors"))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@dataclasses.dataclass
class Job:
    """A job's folder, and its attempts one after the other."""

    folder: Path
    model: Path
    spec: JobSpec
    attempts: int = 0

    def attempt(self, sink: MemorySink | None = None, control: Running | None = None, **plan: Any) -> Outcome:
        """Another attempt, with what the ones before it left, to the end or to what ends it."""
        self.attempts += 1
        workdir = new_workdir(self.folder / f"data-{self.attempts}", self.model, ROWS)
        root = self.folder / "job" / f"{self.attempts}-token"
        root.mkdir(parents=True)
        take_over(root.parent, root / FOLDER)
        workdir = dataclasses.replace(workdir, root=root, cache=self.folder / "cache")
        outcome = Outcome(self.spec, workdir, sink or MemorySink())
        try:
            outcome.artifacts = run(
                self.spec, plan_for(self.spec, **plan), workdir, outcome.sink, control or Running()
            )
        except (_Killed, JobStopped) as end:
            outcome.sink.log(Entry(type(end).__name__))
        return outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Outcome:
    """The run that nothing interrupts."""
    return Job(tmp_path_factory.mktemp("whole"), tiny_model, make()).attempt()


def check_same(resumed: list[Outcome], whole: Outcome) -> None:
    """Together the attempts told, left and exported what the uninterrupted run did."""
    last = resumed[-1]
    told: dict[Any, Any] = {}
    for outcome in resumed:
        told |= losses(outcome.sink)
    assert told == losses(whole.sink)
    # The last attempt tells the rows of those before it again.
    assert losses(last.sink) == told
    assert same(adapter(last.workdir.root / "adapter"), adapter(whole.workdir.root / "adapter"))
    tables = []
    for outcome in (last, whole):
        with outcome.path("metrics.csv").open(newline="") as stream:
            tables.append(
                [{k: v for k, v in r.items() if k not in DURATIONS} for r in csv.DictReader(stream)]
            )
    assert tables[0] == tables[1]
    manifests = [json.loads(o.path("manifest.json").read_text(encoding="utf-8")) for o in (last, whole)]
    for name in ("evaluations", "best_step", "exported_step", "steps"):
        assert manifests[0][name] == manifests[1][name]
    assert manifests[0]["used"]["tokens"] == manifests[1]["used"]["tokens"]
    assert [r["loss"] for r in manifests[0]["history"]] == [r["loss"] for r in manifests[1]["history"]]
    kept = [{c.step: c.metrics for c in o.sink.checkpoints} for o in (last, whole)]
    assert all(kept[0][step] == kept[1][step] for step in kept[0].keys() & kept[1].keys())


def messages(outcome: Outcome) -> list[str]:
    return [entry.message for entry in outcome.sink.entries]


@pytest.mark.parametrize("killed_at", [6, 9])
def test_a_killed_job_goes_on_bit_for_bit(
    whole: Outcome, tmp_path: Path, tiny_model: Path, killed_at: int
) -> None:
    """From step 4, past an epoch's border and evaluations, and from step 8."""
    job = Job(tmp_path, tiny_model, make())
    first = job.attempt(StepSink(killed_at, die))
    second = job.attempt()
    assert any(m.startswith(f"Resumed from step {killed_at // 4 * 4} of 9.") for m in messages(second))
    assert [row["step"] for row in second.sink.rows].count(killed_at) <= 2
    check_same([first, second], whole)
    assert not any("can't be used" in m or "do not match" in m for m in messages(second))


def test_a_killed_job_goes_on_bit_for_bit_on_another_machine(
    whole: Outcome, tmp_path: Path, tiny_model: Path, database: Database, settings: Settings
) -> None:
    """From the copy in the store: there is no common disk."""
    job_id = make_job(database)
    store, bell = Store(settings.artifacts()), Doorbell(settings.redis())
    one, other = Job(tmp_path / "one", tiny_model, make()), Job(tmp_path / "other", tiny_model, make())
    orders = {token: Order(job_id, token, str(tmp_path / token / "job"), {}) for token in ("one", "other")}

    def sink_of(token: str) -> DatabaseSink:
        with database.write() as session:
            leases.claim(session, job_id, token, token, utcnow() + timedelta(hours=1))
        return DatabaseSink(database, store, bell, JobLease(job_id, token), 3600, lambda: None)

    class CopyingSink(StepSink):
        def checkpoint(self, checkpoint: Checkpoint) -> None:
            super().checkpoint(checkpoint)
            order = dataclasses.replace(orders["one"], workdir=str(checkpoint.path.parents[1]))
            running = Copies(order, store, sink_of("one"), None)
            running.offer(checkpoint)
            running.end(lambda: time.monotonic() + 60)

    first = one.attempt(CopyingSink(6, die))
    with database.write() as session:
        leases.lose(session, jobs.lock_job(session, job_id, None), "It died.", 9)
    assert fetch_copy(orders["other"], database, store, sink_of("other"), tmp_path / "cache") == 4
    second = other.attempt()
    bell.close()
    assert any(m.startswith("Resumed from step 4 of 9.") for m in messages(second))
    check_same([first, second], whole)
    assert not any("can't be used" in m or "do not match" in m for m in messages(second))


@pytest.mark.parametrize("step", [3, 9])
def test_leaving_keeps_a_checkpoint_of_the_step_that_runs(
    whole: Outcome, tmp_path: Path, tiny_model: Path, step: int
) -> None:
    """Also of one that is to be evaluated and ends an epoch (3), and of the very last (9)."""
    job = Job(tmp_path, tiny_model, make(training={"save_steps": 100}))
    control = Running()

    def leave() -> None:
        control.leave = True

    first = job.attempt(StepSink(step - 1, leave), control)
    assert messages(first)[-1] == "JobStopped"
    assert max(losses(first.sink)) == step
    assert max(complete_checkpoints(first.workdir.root / FOLDER)) == step
    second = job.attempt()
    assert any(m.startswith(f"Resumed from step {step} of 9.") for m in messages(second))
    check_same([first, second], whole)


def test_leaving_in_the_middle_of_an_evaluation_puts_it_off(
    whole: Outcome, tmp_path: Path, tiny_model: Path
) -> None:
    control = Running()

    class LeaveInEvaluation(MemorySink):
        def phase(self, phase: Phase) -> None:
            super().phase(phase)
            control.leave = phase is Phase.EVALUATING

    job = Job(tmp_path, tiny_model, make())
    first = job.attempt(LeaveInEvaluation(), control)
    assert max(complete_checkpoints(first.workdir.root / FOLDER)) == 3
    assert all("eval_loss" not in row for row in first.sink.rows)
    check_same([first, job.attempt()], whole)


def test_another_split_of_the_batch_sees_the_same_rows(
    whole: Outcome, tmp_path: Path, tiny_model: Path
) -> None:
    job = Job(tmp_path, tiny_model, make())
    first = job.attempt(StepSink(7, die), micro_batch=2, accumulation=1)
    second = job.attempt()
    assert any(m.startswith("Resumed from step 4 of 9.") for m in messages(second))
    assert not any("do not match" in m for m in messages(second))
    expected = losses(whole.sink)
    found = losses(first.sink) | losses(second.sink)
    # Dropout's numbers fall otherwise on rows side by side: that alone may differ, and it is little here.
    assert found.keys() == expected.keys()
    tokens = [o.path("manifest.json") for o in (second, whole)]
    used = [json.loads(path.read_text(encoding="utf-8"))["used"]["tokens"] for path in tokens]
    assert used[0] == used[1]


def test_early_stopping_counts_on_from_a_checkpoint(tmp_path: Path, tiny_model: Path) -> None:
    # So low a rate changes nothing: the first evaluation stays the best.
    still = {
        "learning_rate": 1e-30, "eval_steps": 1, "early_stopping_patience": 3, "save_steps": 1,
        "save_total_limit": 1,
    }  # fmt: skip
    spec = make(training=still)
    whole = Job(tmp_path / "whole", tiny_model, spec).attempt()
    last = max(losses(whole.sink))
    assert last == 4
    job = Job(tmp_path / "killed", tiny_model, spec)
    # After the first evaluation that wasn't better, and at the export that follows the last.
    attempts = [job.attempt(StepSink(last, die))]
    stop = Running()

    class StopAtExport(MemorySink):
        def phase(self, phase: Phase) -> None:
            super().phase(phase)
            stop.stop = phase is Phase.EXPORTING

    attempts += [job.attempt(StopAtExport(), stop), job.attempt()]
    assert losses(attempts[1].sink) == losses(whole.sink)
    check_same(attempts, whole)
    assert Phase.EVALUATING not in attempts[2].sink.phases
    best = json.loads(whole.path("manifest.json").read_text(encoding="utf-8"))["best_step"]
    assert set(complete_checkpoints(attempts[2].workdir.root / FOLDER)) == {best, last}


def test_what_cannot_be_used_is_told_of_and_the_one_before_taken(
    whole: Outcome, tmp_path: Path, tiny_model: Path
) -> None:
    job = Job(tmp_path, tiny_model, make(training={"save_steps": 2}))
    first = job.attempt(StepSink(9, die))
    folder = first.workdir.root / FOLDER
    assert list(complete_checkpoints(folder)) == [4, 6, 8]
    optimizer = folder / "checkpoint-8" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    record = json.loads((folder / "checkpoint-6" / RECORD).read_text())
    record["identity"]["total_steps"] = 7
    (folder / "checkpoint-6" / RECORD).write_text(json.dumps(record))
    second = job.attempt(StepSink(5, die))
    told = [m for m in messages(second) if "can't be used" in m]
    assert told == [
        "The checkpoint of step 8 can't be used: optimizer.pt is not what was written.",
        "The checkpoint of step 6 can't be used: it was made with another total steps.",
    ]
    assert "Resumed from step 4 of 9." in messages(second)
    assert list(complete_checkpoints(second.workdir.root / FOLDER)) == [4]
    assert losses(second.sink)[5] == losses(whole.sink)[5]
    (second.workdir.root / FOLDER / "checkpoint-4" / RECORD).unlink()
    third = job.attempt(StepSink(1, die))
    assert f"The checkpoint of step 4 can't be used: its {RECORD} can't be read." in messages(third)
    assert max(losses(third.sink)) == 1


def test_a_checkpoint_has_no_pickle_that_could_do_harm(whole: Outcome) -> None:
    folder = max(complete_checkpoints(whole.workdir.root / FOLDER).items())[1]
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert "training_args.bin" not in names
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(folder / name, weights_only=True)


def test_a_full_disk_leaves_no_half_a_checkpoint_and_ends_no_job(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.save

    def full(value: Any, file: Any, **options: Any) -> None:
        if str(file).endswith("scheduler.pt"):
            raise OSError(28, "No space left on device")
        real(value, file, **options)

    job = Job(tmp_path, tiny_model, make(training={"max_steps": 5}))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        outcome = job.attempt()
    # The job is none the worse for it.
    assert "adapter.tar" in [artifact.name for artifact in outcome.artifacts]
    assert sum(m.startswith("Step 4 gets no checkpoint") for m in messages(outcome)) == 1
    assert list((outcome.workdir.root / FOLDER).iterdir()) == []
