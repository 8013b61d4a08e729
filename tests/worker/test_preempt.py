"""A job of lower priority makes way for one of higher priority."""

from __future__ import annotations

import pytest

from shared.database import Database
from shared.device import Device
from shared.lifecycle import Phase
from shared.plan import Plan
from shared.queue import Doorbell
from shared.spec import JobSpec
from shared.tables import Job
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_pause import messages, steps_told
from tests.worker.test_supervisor import cancel, child_pid, read, wait_status
from worker import claims
from worker.preempt import _victims


def test_the_lower_one_leaves_with_a_checkpoint_and_goes_on_later(start: Start, database: Database) -> None:
    start(preemption=True)
    low = make_job(database, name="patient 1", priority="low")
    wait_for(lambda: steps_told(database, low) == [1])
    high = make_job(database, owner="bob", priority="high")
    wait_status(database, high, "succeeded")
    assert (read(database, low).losses, read(database, low).attempt) in ((0, 1), (0, 2))
    job = wait_status(database, low, "succeeded")
    assert (job.attempt, job.losses) == (2, 0)
    assert steps_told(database, low) == [1, 2, 3, 4, 5]
    told = messages(database, low)
    assert any("A job of higher priority takes its place" in message for message in told)
    assert not any("from step 0" in message for message in told[told.index("from step 0") + 1 :])


@pytest.mark.parametrize(("allowed", "priority"), [(False, "high"), (True, "normal")])
def test_nobody_makes_way_unasked_or_for_an_equal(
    start: Start, database: Database, doorbell: Doorbell, allowed: bool, priority: str
) -> None:
    supervisor = start(preemption=allowed)
    running = make_job(database, name="forever")
    wait_for(lambda: child_pid(database, running))
    waiting = make_job(database, priority=priority)
    for _ in range(3):
        supervisor._wake.set()
        wait_for(lambda: not supervisor._wake.is_set())
    assert read(database, running).status == "running"
    assert read(database, waiting).status == "queued"
    cancel(database, doorbell, running)
    wait_status(database, waiting, "succeeded")


class Running:
    """Stands for a child on these devices."""

    def __init__(self, name: str, started_at: float, *devices: Device) -> None:
        self.job_id, self.started_at, self.devices = name, started_at, devices


def plan_by_size(spec: JobSpec, *rest: list[Device]) -> Plan | None:
    """A job takes as many GiB of each GPU as its model's name says."""
    if sum(device.memory_bytes >= int(spec.name or "0") << 30 for device in rest[-1]) < spec.gpus:
        return None
    return Plan(
        engine="reference", device="cuda", quantization="none", precision="bf16", micro_batch=1,
        accumulation=1, gradient_checkpointing="none", gpus=spec.gpus, reason="fits",
    )  # fmt: skip


def test_as_few_as_needed_leave_and_the_last_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "make_plan", plan_by_size)
    small, large, other = (Device("cuda", n, "GPU", size << 30) for n, size in enumerate((24, 80, 80)))

    def job(name: str, priority: int, phase: Phase = Phase.TRAINING, gpus: int = 1) -> Job:
        spec = JobSpec(name=name, gpus=gpus).to_json()
        return Job(
            id=name, owner="o", status="running", model="m", priority=priority, phase=phase, spec=spec,
            user_metadata={},
        )  # fmt: skip

    children = [Running("a", 1, small), Running("b", 2, large), Running("c", 3, other)]
    held = {"a": job("a", 2), "b": job("b", 1), "c": job("c", 1)}

    def left(wanted: Job, free: tuple[Device, ...] = ()) -> list[str]:
        return [child.job_id for child in _victims(wanted, children, held, free)]  # type: ignore[arg-type]

    assert left(job("10", 0)) == ["a"]
    assert left(job("60", 0)) == ["c"]
    assert left(job("60", 1)) == []
    assert left(job("60", 0, gpus=2)) == ["c", "b"]
    assert left(job("10", 0, gpus=2), (Device("cuda", 3, "GPU", 24 << 30),)) == ["a"]
    assert left(job("10", 0), (Device("cuda", 3, "GPU", 24 << 30),)) == []
    held["c"].phase = Phase.EXPORTING
    assert left(job("60", 0)) == ["b"]
