"""Running out of memory: the next cheaper plan, from the last checkpoint, a few times."""

from __future__ import annotations

from typing import Any

import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.device import Device, DeviceKind
from shared.lifecycle import Phase
from shared.repository import leases
from shared.repository.leases import MEMORY_RETRIES
from shared.savings import EXPORT_MEMORY_ADVICE, MACHINE_MEMORY_ADVICE, lost_advice, memory_advice
from shared.spec import JobSpec
from shared.tables import Job
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import entries, read, wait_status
from worker.gpus import measure_free, with_share


def batch_of(plan: dict[str, int]) -> int:
    return plan["micro_batch"] * plan["accumulation"] * plan["gpus"]


def check_history(job: Job, failures: int) -> None:
    """Each plan that failed is told with its step; each one after it takes less for the same batch."""
    spec = JobSpec.from_json(job.spec)
    plans = [entry["plan"] for entry in job.plan_history]
    assert [entry.get("reason") for entry in job.plan_history[:failures]] == ["out of memory"] * failures
    assert [entry.get("step") for entry in job.plan_history[:failures]] == [2] * failures
    assert {batch_of(plan) for plan in plans} == {spec.training.effective_batch}
    sizes = [(plan["micro_batch"], plan["gradient_checkpointing"]) for plan in plans]
    assert len(set(sizes)) == len(sizes)


def test_a_job_goes_on_under_a_cheaper_plan(start: Start, database: Database) -> None:
    start()
    job_id = make_job(database, name="hungry 1")
    job = wait_status(database, job_id, "succeeded", "failed")
    assert (job.status, job.attempt, job.losses) == ("succeeded", 2, 0)
    check_history(job, 1)
    assert job.plan == job.plan_history[1]["plan"]
    assert "reason" not in job.plan_history[1]
    told = [e.message for e in entries(database, job_id)]
    (gone,) = [m for m in told if m.startswith("The job ran out of memory")]
    assert "no room for 4 GiB" in gone
    assert gone.endswith("That was after step 2. The job goes back to the queue.")
    assert any(m.startswith("Trying with less memory: ") for m in told)


def test_a_job_that_nothing_helps_fails_with_what_to_change(start: Start, database: Database) -> None:
    start()
    training = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    job_id = make_job(database, name="hungry 99", training=training)
    other = make_job(database)
    job = wait_status(database, job_id, "failed")
    assert job.failure is not None
    assert job.failure["code"] == "out_of_memory"
    assert "max_seq_length" in job.failure["advice"]
    assert 2 <= job.attempt <= MEMORY_RETRIES + 1
    assert job.losses == 0
    check_history(job, job.attempt)
    assert {JobSpec.from_json(job.spec).max_seq_length} == {4096}
    assert wait_status(database, other, "succeeded").status == "succeeded"


def test_a_killed_preparation_of_data_is_no_plans_fault(start: Start, database: Database) -> None:
    start()
    job = wait_status(database, make_job(database, name="starved"), "failed")
    assert job.failure == {
        "code": "out_of_memory",
        "message": "A process that prepared data was killed.",
        "advice": "Add memory.",
    }
    assert (job.attempt, "reason" in job.plan_history[0]) == (1, False)


def run_out(database: Database, job_id: str, device: str, *, of_machine: bool = False, **state: Any) -> Job:
    """Let a new attempt at the job, under a plan for this device, run out of memory in this state."""
    with database.write() as session:
        job = leases.claim(session, job_id, "w", "t", utcnow())
        assert job is not None
        job.plan = {"n": job.attempt, "device": device}
        job.plan_history = [*job.plan_history, {"attempt": job.attempt, "plan": job.plan}]
        for name, value in state.items():
            setattr(job, name, value)
        leases.run_out_of_memory(session, job, "No room.", of_machine=of_machine)
    return read(database, job_id)


def test_retries_come_to_an_end(database: Database) -> None:
    job_id = make_job(database)
    for attempt in range(1, MEMORY_RETRIES + 2):
        job = run_out(database, job_id, "cuda")
        assert job.status == ("queued" if attempt <= MEMORY_RETRIES else "failed")
    assert job.failure is not None
    assert (job.failure["code"], job.failure["message"]) == ("out_of_memory", "No room.")


def test_the_log_says_when_memory_ran_out(database: Database) -> None:
    job_id = make_job(database)
    run_out(database, job_id, "cuda")
    run_out(database, job_id, "cuda", progress={"step": 7})
    told = [e.message for e in entries(database, job_id) if e.message.startswith("No room.")]
    assert told == [
        "No room. That was before this attempt's first step. The job goes back to the queue.",
        "No room. That was after step 7. The job goes back to the queue.",
    ]


@pytest.mark.parametrize(
    ("device", "phase", "of_machine", "status", "advice"),
    [
        ("cuda", Phase.PREPARING_DATA, False, "queued", None),
        ("cuda", Phase.PREPARING_DATA, True, "failed", MACHINE_MEMORY_ADVICE),
        ("cuda", Phase.TRAINING, True, "failed", MACHINE_MEMORY_ADVICE),
        ("cpu", Phase.PREPARING_DATA, True, "failed", MACHINE_MEMORY_ADVICE),
        ("cpu", Phase.TRAINING, True, "queued", None),
        ("cuda", Phase.EXPORTING, False, "failed", EXPORT_MEMORY_ADVICE),
        ("cpu", Phase.EXPORTING, True, "failed", EXPORT_MEMORY_ADVICE),
    ],
)
def test_a_cheaper_plan_is_tried_where_it_can_help(
    database: Database, device: str, phase: Phase, of_machine: bool, status: str, advice: str | None
) -> None:
    job = run_out(database, make_job(database), device, of_machine=of_machine, phase=phase)
    assert job.status == status
    assert (job.failure and job.failure["advice"]) == advice
    assert ("reason" in job.plan_history[0]) == (status == "queued")


@pytest.mark.parametrize(
    ("spec", "kind", "says", "never"),
    [
        (
            {},
            "cuda",
            ["max_seq_length 2048", "a GPU with more memory"],
            ["4bit", "lora.r", "engine", "optim"],
        ),
        ({"quantization": "none"}, "cuda", ["quantization 4bit,"], ["auto"]),
        ({"quantization": "none"}, "cpu", ["max_seq_length 2048", "a machine with more"], ["4bit"]),
        ({"quantization": "4bit"}, "cuda", ["a smaller model"], ["4bit"]),
        ({"precision": "fp8"}, "cuda", ["precision auto"], ["4bit"]),
        ({"engine": "compiled"}, "cuda", ["engine auto"], ["precision"]),
        ({"engine": "unsloth"}, "cuda", ["a smaller model"], ["engine"]),
        ({"max_seq_length": 256}, "cuda", ["Try a smaller model"], ["max_seq_length"]),
        ({"lora": {"r": 64}, "training": {"optim": "adamw_torch"}}, "cuda", ["lora.r 16", "adamw_8bit"], []),
    ],
)
def test_the_advice_is_about_what_the_spec_says(
    spec: dict[str, Any], kind: DeviceKind, says: list[str], never: list[str]
) -> None:
    advice = memory_advice(JobSpec.from_json(spec), kind)
    assert [words for words in says if words not in advice] == []
    assert [words for words in never if words in advice] == []


def test_a_lost_jobs_advice_names_no_smaller_batch_where_there_is_none() -> None:
    stated = JobSpec.from_json({})
    assert "per_device_train_batch_size 1 with training.gradient_accumulation_steps 8" in lost_advice(
        stated, "cpu"
    )
    single = JobSpec.from_json({"training": {"per_device_train_batch_size": 1}, "max_seq_length": 128})
    assert lost_advice(single, "cpu").endswith("ends like this: try a smaller model.")
    assert "batch" not in lost_advice(stated, "cuda")


def test_the_share_of_a_gpu_is_what_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [Device("cuda", 0, "GPU", 80 << 30), Device("cpu", 0, "CPU", 8 << 30)]
    shared = with_share(whole, 0.25)
    assert [device.memory_bytes >> 30 for device in shared] == [20, 8]
    for free, expected in ((70, 20), (5, 5)):
        monkeypatch.setattr("worker.gpus._ask", lambda *_, free=free: f"0, {free << 10}\n")
        assert measure_free(shared[:1])[0].memory_bytes >> 30 == expected
