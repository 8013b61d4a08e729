"""Running out of memory: the next cheaper plan, from the last checkpoint, a few times."""

from __future__ import annotations

import pytest

from shared.database import Database
from shared.device import Device
from shared.repository import leases
from shared.repository.leases import MEMORY_RETRIES
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


def test_retries_come_to_an_end(database: Database) -> None:
    job_id = make_job(database)
    failure = {"code": "out_of_memory", "message": "No room.", "advice": "Take less."}
    for attempt in range(1, MEMORY_RETRIES + 2):
        with database.write() as session:
            job = leases.claim(session, job_id, "w", "t", read(database, job_id).created_at)
            assert job is not None
            job.plan_history = [*job.plan_history, {"attempt": attempt, "plan": {"n": attempt}}]
            leases.run_out_of_memory(session, job, failure)
        assert read(database, job_id).status == ("queued" if attempt <= MEMORY_RETRIES else "failed")
    assert read(database, job_id).failure == failure


def test_the_share_of_a_gpu_is_what_is_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [Device("cuda", 0, "GPU", 80 << 30), Device("cpu", 0, "CPU", 8 << 30)]
    shared = with_share(whole, 0.25)
    assert [device.memory_bytes >> 30 for device in shared] == [20, 8]
    for free, expected in ((70, 20), (5, 5)):
        monkeypatch.setattr("worker.gpus._ask", lambda *_, free=free: f"0, {free << 10}\n")
        assert measure_free(shared[:1])[0].memory_bytes >> 30 == expected
