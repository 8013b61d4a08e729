"""Jobs that find no place: GPUs that somebody outside Tuneyard uses, and workers that lack what a job names.

With the real planner, and a driver's tool that says what is free.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.database import Database
from shared.device import Device
from shared.planner import make_plan
from shared.repository import jobs, keys, logs
from shared.repository.leases import OUT_OF_MEMORY
from shared.settings import Settings
from shared.shape import NEMOTRON_NANO_4B, ModelShape
from shared.spec import JobSpec
from shared.tables import WorkerRow
from tests.samples import make_job
from worker import claims
from worker.claims import Claims

GIB = 1 << 30
CARDS = [Device("cuda", n, "NVIDIA GeForce RTX 4090", 24 * GIB, ("reference",), 8.9) for n in range(2)]
CARD, OTHER = CARDS
LIMIT = 3600.0


class Clock:
    """What `time.monotonic` tells a supervisor."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    told = Clock()
    monkeypatch.setattr(claims, "time", told)
    return told


@pytest.fixture
def set_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets how many GiB are free on each GPU."""
    told, tool = tmp_path / "free", tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {told}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")

    def write(*free: float) -> None:
        told.write_text("".join(f"{n}, {int(gib * 1024)}\n" for n, gib in enumerate(free)))

    write(24, 24)
    return write


def put(database: Database, shape: ModelShape | None = NEMOTRON_NANO_4B, **spec: Any) -> str:
    """A queued job whose model's shape is known."""
    job_id = make_job(database, **spec)
    with database.write() as session:
        jobs.lock_job(session, job_id, None).model_shape = shape.to_json() if shape else None
    return job_id


def put_out_of_memory(database: Database, card: Device, **spec: Any) -> str:
    """A queued job that ran out of memory under the plan for this card."""
    job_id = put(database, **spec)
    count = spec.get("gpus", 1)
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        plan = make_plan(JobSpec.from_json(job.spec), NEMOTRON_NANO_4B, [card] * count)
        assert plan is not None
        job.plan_history = [{"attempt": 1, "plan": plan.model_dump(), "reason": OUT_OF_MEMORY, "step": 2}]
    return job_id


def read(database: Database, job_id: str) -> tuple[str, dict[str, Any] | None, list[str]]:
    with database.read() as session:
        job = jobs.get_job(session, job_id, None)
        told = [entry.message for entry in logs.read_entries(session, job_id, 0, 100)]
        return job.status, job.failure, told


def claimed(box: Claims, *free: Device) -> list[str]:
    return [job.id for job, _ in box.fill(free)]


def test_after_running_out_of_memory_a_busy_gpu_is_waited_for(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    box = Claims(settings, database, "box-1", [CARD])
    job_id = put_out_of_memory(database, CARD)
    set_free(3)
    assert claimed(box, CARD) == claimed(box, CARD) == []
    status, _, told = read(database, job_id)
    assert status == "queued"
    assert "3.0 GiB free of the 24.0 GiB" in told[-1]
    set_free(24)
    assert claimed(box, CARD) == [job_id]
    with database.read() as session:
        tried, following = (e["plan"] for e in jobs.get_job(session, job_id, None).plan_history)
    assert following["peak_memory_bytes"] < tried["peak_memory_bytes"]


def test_the_entry_says_how_much_is_needed_and_how_long_it_waits(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    box = Claims(settings, database, "box-1", [CARD])
    job_id = put(database, quantization="none")
    set_free(8)
    assert claimed(box, CARD) == []
    told = read(database, job_id)[2][-1]
    assert "GPU 0 has 8.0 GiB free of the 24.0 GiB that jobs may take" in told
    needed = float(told.split("The job needs ")[1].split(" GiB at the least")[0])
    assert "It waits for 3600 s at most (TUNEYARD_BUSY_GPU_WAIT_SECONDS)" in told
    assert "it fails with out_of_memory" in told
    # It is the truth: a little less is too little, a little more will do.
    set_free(needed - 0.1)
    assert claimed(box, CARD) == []
    set_free(needed + 0.1)
    assert claimed(box, CARD) == [job_id]


def test_a_job_for_several_gpus_without_a_cheaper_plan_fails_at_once(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    box = Claims(settings, database, "box-1", CARDS)
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    # The one way that there is: a row on each GPU, in 4-bit, all recomputed.
    least = {"gpus": 2, "quantization": "4bit", "training": training}
    tight = Device("cuda", 0, CARD.name, 8 * GIB, CARD.engines, CARD.capability)
    job_id = put_out_of_memory(database, tight, **least)
    assert claimed(box, *CARDS) == []
    status, failure, told = read(database, job_id)
    assert (status, failure and failure["code"]) == ("failed", "out_of_memory")
    assert failure is not None
    assert "no plan takes less than the last one" in failure["message"]
    assert "max_seq_length 2048" in failure["advice"]
    assert "4bit" not in failure["advice"]
    assert not any("waits" in message for message in told)


@pytest.mark.usefixtures("set_free")
def test_a_job_whose_cheaper_plans_fit_another_box_waits_for_that(
    settings: Settings, database: Database, clock: Clock
) -> None:
    small = Device("cuda", 0, "NVIDIA GeForce RTX 3050", 4 * GIB, CARD.engines, 8.6)
    box = Claims(settings, database, "box-1", [small])
    job_id = put_out_of_memory(database, CARD)
    assert claimed(box, small) == []
    status, _, told = read(database, job_id)
    assert status == "queued"
    assert "No GPU of worker box-1 has the memory for this job" in told[-1]
    clock.now += LIMIT
    assert claimed(box, small) == []
    assert read(database, job_id)[0] == "failed"


@pytest.mark.usefixtures("set_free")
def test_a_job_for_several_gpus_with_a_cheaper_plan_is_tried_again(
    settings: Settings, database: Database
) -> None:
    box = Claims(settings, database, "box-1", CARDS)
    job_id = put_out_of_memory(database, CARD, gpus=2)
    assert claimed(box, *CARDS) == [job_id]


def test_time_behind_the_boxs_own_jobs_does_not_count(
    settings: Settings, database: Database, set_free: Callable[..., None], clock: Clock
) -> None:
    box = Claims(settings, database, "box-1", [CARD])
    job_id = put(database, quantization="none")
    set_free(8)
    assert claimed(box, CARD) == []
    # A job of this box has the GPU, for hours.
    clock.now += 10
    assert claimed(box) == []
    clock.now += 10 * LIMIT
    assert claimed(box) == []
    # Then somebody outside again, who is not waited for anew but no longer than is left.
    assert claimed(box, CARD) == []
    clock.now += LIMIT - 1
    assert claimed(box, CARD) == []
    assert read(database, job_id)[0] == "queued"
    clock.now += 2
    assert claimed(box, CARD) == []
    status, failure, told = read(database, job_id)
    assert (status, failure and failure["code"]) == ("failed", "out_of_memory")
    assert failure is not None
    assert "It waited 3601 s." in failure["message"]
    assert "quantization 4bit" in failure["advice"]
    assert sum("It waits for" in message for message in told) == 1


def test_nor_does_it_while_one_of_the_gpus_that_it_fits_is_the_boxs_own(
    settings: Settings, database: Database, set_free: Callable[..., None], clock: Clock
) -> None:
    box = Claims(settings, database, "box-1", CARDS)
    job_id = put(database, quantization="none")
    set_free(8, 0)
    for _ in range(3):
        assert claimed(box, CARD) == []
        clock.now += 2 * LIMIT
    status, _, told = read(database, job_id)
    assert (status, told) == ("queued", ["Accepted."])
    set_free(8, 24)
    assert claimed(box, *CARDS) == [job_id]


def test_a_job_for_several_gpus_gets_those_that_its_plan_is_for(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    old = Device("cuda", 2, "Tesla V100-SXM2-32GB", 32 * GIB, ("reference",), 7.0)
    box = Claims(settings, database, "box-1", [*CARDS, old])
    set_free(24, 23, 32)
    job_id = put(database, gpus=2)
    ((job, devices),) = box.fill([*CARDS, old])
    assert (job.id, [device.index for device in devices]) == (job_id, [0, 1])
    assert job.plan is not None
    assert job.plan["precision"] == "bf16"


def test_a_model_of_unknown_size_goes_to_the_gpu_with_the_most_free(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    large = Device("cuda", 1, "NVIDIA H100 80GB HBM3", 80 * GIB, ("reference",), 9.0)
    box = Claims(settings, database, "box-1", [CARD, large])
    for free, index in (((24, 70), 1), ((20, 10), 0)):
        set_free(*free)
        job_id = put(database, None)
        taken = [(job.id, device.index) for job, devices in box.fill([CARD, large]) for device in devices]
        assert taken == [(job_id, index)]


def test_a_job_that_needs_what_no_worker_has_waits_for_one_that_has_it(
    settings: Settings, database: Database
) -> None:
    cpu = Device("cpu", 0, "CPU", 16 * GIB)
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", [cpu])
    float8, both = put(database, precision="fp8"), put(database, gpus=2)
    for _ in range(3):
        assert claimed(box, cpu) == []
    waits = "It waits for a worker on line that can run it."
    status, _, told = read(database, float8)
    assert status == "queued"
    assert len(told) == 2
    assert told[1].startswith("precision: fp8 needs a GPU, and the workers on line have none.")
    assert told[1].endswith(waits)
    status, _, told = read(database, both)
    assert status == "queued"
    assert told[1:] == [f"The job asks for 2 GPUs, and worker box-1 has 0. {waits}"]


def test_a_job_that_another_worker_can_run_is_left_to_it(
    settings: Settings, database: Database, set_free: Callable[..., None]
) -> None:
    hopper = Device("cuda", 0, "NVIDIA H100", 80 * GIB, ("reference", "compiled"), 9.0)
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", [CARD])
    with database.write() as session:
        keys.put_worker(session, WorkerRow(id="box-2", hostname="b", slots=[hopper.to_json()]))
    job_id = put(database, engine="compiled")
    for _ in range(3):
        assert claimed(box, CARD) == []
    status, _, told = read(database, job_id)
    assert status == "queued"
    assert told[1].startswith("Worker box-1 has nothing that runs what the job names.")
