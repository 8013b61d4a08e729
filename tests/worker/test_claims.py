"""Which job gets which GPU, with a driver's tool that says what the test wants."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.device import Device
from shared.lifecycle import JobStatus
from shared.plan import Plan
from shared.repository import jobs, keys, leases, logs
from shared.settings import Settings
from shared.spec import JobSpec
from shared.tables import WorkerRow
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import child_pid, entries
from worker import claims
from worker.claims import Claims
from worker.reservations import RESERVED, Promise, Reservation, free_bytes, put_off

GIB = 1 << 30
SMALL, LARGE = Device("cuda", 0, "small", 24 * GIB), Device("cuda", 1, "large", 80 * GIB)
OTHER = Device("cuda", 2, "large", 80 * GIB)
SetFree = Callable[..., None]


def plan_by_name(spec: JobSpec, *rest: Sequence[Device]) -> Plan | None:
    """The second word of a job's name is what it needs on each GPU, in GiB."""
    needed = int((spec.name or "any 0").split()[1]) * GIB
    fitting = [d for d in rest[-1] if d.memory_bytes >= needed]
    if len(fitting) < spec.gpus:
        return None
    largest = max(fitting, key=lambda d: d.memory_bytes)
    return Plan(
        engine="reference", device=largest.kind, quantization="none", precision="bf16", micro_batch=1,
        accumulation=1, gradient_checkpointing="none", gpus=spec.gpus, reason=largest.name,
        tokens_per_second=largest.memory_bytes,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def set_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SetFree:
    """Sets how many GiB are free on each GPU; at first all are."""
    told = tmp_path / "free"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat {told}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin:/bin")
    monkeypatch.setattr(claims, "make_plan", plan_by_name)

    def write(*free: int) -> None:
        told.write_text("".join(f"{index}, {gib * 1024}\n" for index, gib in enumerate(free)))

    write(24, 80)
    return write


@pytest.fixture
def box(settings: Settings, database: Database) -> Claims:
    return Claims(settings, database, "box-1", [SMALL, LARGE])


def claimed(box: Claims, *free: Device) -> list[tuple[str, list[int]]]:
    return [(job.id, [d.index for d in devices]) for job, devices in box.fill(free)]


def messages(database: Database, job_id: str) -> list[str]:
    with database.read() as session:
        return [entry.message for entry in logs.read_entries(session, job_id, 0, 100)]


def status(database: Database, job_id: str) -> str:
    with database.read() as session:
        return jobs.get_job(session, job_id, None).status


def test_each_job_goes_where_it_fits_and_the_fastest_is_taken_first(box: Claims, database: Database) -> None:
    light, heavy, last = (make_job(database, name=f"job {needs}") for needs in (10, 10, 10))
    assert claimed(box, SMALL, LARGE) == [(light, [1]), (heavy, [0])]
    assert claimed(box) == []
    assert claimed(box, SMALL) == [(last, [0])]


def test_a_job_that_fits_only_a_taken_gpu_waits_silently_and_holds_up_nobody(
    box: Claims, database: Database
) -> None:
    heavy, light = make_job(database, name="job 60"), make_job(database, name="job 10")
    assert claimed(box, SMALL) == [(light, [0])]
    assert messages(database, heavy) == ["Accepted."]
    assert claimed(box, LARGE) == [(heavy, [1])]


def test_a_busy_gpu_is_waited_for_with_one_entry(box: Claims, database: Database, set_free: SetFree) -> None:
    set_free(24, 30)
    heavy, light = make_job(database, name="job 60"), make_job(database, name="job 10")
    assert claimed(box, SMALL, LARGE) == [(light, [1])]
    assert claimed(box, SMALL, LARGE) == claimed(box, SMALL, LARGE) == []
    (told,) = messages(database, heavy)[1:]
    assert "GPU 1 has 30.0 GiB free of the 80.0 GiB that jobs may take" in told
    assert "It waits for 3600 s at most" in told
    assert "it fails with out_of_memory" in told
    assert "GPU 0" not in told
    set_free(24, 70)
    assert claimed(box, SMALL, LARGE) == [(heavy, [1])]


def test_the_plan_gets_the_memory_that_is_free(box: Claims, database: Database, set_free: SetFree) -> None:
    set_free(20, 12)
    job_id = make_job(database, name="job 10")
    assert claimed(box, SMALL, LARGE) == [(job_id, [0])]
    with database.read() as session:
        plan = jobs.get_job(session, job_id, None).plan
    assert plan is not None
    assert plan["tokens_per_second"] == 20 * GIB


def test_waiting_for_a_busy_gpu_has_an_end(settings: Settings, database: Database, set_free: SetFree) -> None:
    set_free(24, 30)
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", [SMALL, LARGE])
    heavy = make_job(database, name="job 60")
    assert claimed(box, SMALL, LARGE) == []
    assert status(database, heavy) == "queued"
    assert claimed(box, SMALL, LARGE) == []
    with database.read() as session:
        failure = jobs.get_job(session, heavy, None).failure
    assert failure is not None
    assert failure["code"] == "out_of_memory"
    assert "30.0 GiB free of the 80.0 GiB" in failure["message"]
    assert "in nvidia-smi what uses it" in failure["advice"]
    assert messages(database, heavy)[-1] == f"Failed: {failure['message']} {failure['advice']}"


def test_a_job_that_fits_nowhere_here_is_left_to_a_worker_that_it_fits(
    settings: Settings, database: Database
) -> None:
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", [SMALL])
    heavy, light = make_job(database, name="job 60"), make_job(database, name="job 10")
    other = WorkerRow(id="box-2", hostname="b", slots=[LARGE.to_json()])
    with database.write() as session:
        keys.put_worker(session, other)
    assert claimed(box, SMALL) == [(light, [0])]
    assert claimed(box, SMALL) == []
    assert messages(database, heavy)[1].startswith("No GPU of worker box-1 has the memory for this job.")
    assert status(database, heavy) == "queued"
    with database.write() as session:
        keys.put_worker(session, WorkerRow(**other.model_dump() | {"seen_at": utcnow() - timedelta(hours=1)}))
    assert claimed(box, SMALL) == []
    assert status(database, heavy) == "failed"


def test_a_driver_that_fails_starts_nothing(box: Claims, database: Database, tmp_path: Path) -> None:
    job_id = make_job(database, name="job 1")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert claimed(box, SMALL, LARGE) == []
    assert status(database, job_id) == "queued"


def test_a_job_for_several_gpus_keeps_what_is_free_until_there_are_enough(
    box: Claims, database: Database
) -> None:
    both = make_job(database, name="job 10", gpus=2)
    behind = make_job(database, name="job 10")
    assert claimed(box, SMALL) == claimed(box, LARGE) == []
    assert messages(database, behind) == ["Accepted."]
    assert claimed(box, SMALL, LARGE) == [(both, [1, 0])]
    assert claimed(box, LARGE) == [(behind, [1])]


def test_a_job_for_more_gpus_than_the_box_has_or_that_do_not_fit_it_keeps_none(
    box: Claims, database: Database
) -> None:
    four = make_job(database, name="job 10", gpus=4)
    large = make_job(database, name="job 60", gpus=2)
    one = make_job(database, name="job 10")
    assert claimed(box, SMALL) == [(one, [0])]
    assert status(database, four) == status(database, large) == "queued"
    assert messages(database, four)[1].startswith("The job asks for 4 GPUs, and worker box-1 has 2. It waits")


def test_a_job_for_several_gpus_of_which_one_is_busy_holds_up_nobody(
    box: Claims, database: Database, set_free: SetFree
) -> None:
    set_free(24, 5)
    both = make_job(database, name="job 10", gpus=2)
    one = make_job(database, name="job 10")
    assert claimed(box, SMALL, LARGE) == [(one, [0])]
    assert "GPU 1 has 5.0 GiB free of the 80.0 GiB" in messages(database, both)[1]


def test_a_job_that_a_gpu_of_ours_fits_waits_for_it_however_long_another_is_used_outside(
    settings: Settings, database: Database, set_free: SetFree
) -> None:
    slots = [SMALL, LARGE, OTHER]
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", slots)
    set_free(24, 30, 80)
    heavy, light = make_job(database, name="job 60"), make_job(database, name="job 10")
    # One of this box's own jobs is on OTHER.
    assert claimed(box, SMALL, LARGE) == [(light, [1])]
    assert claimed(box, SMALL, LARGE) == claimed(box, SMALL, LARGE) == []
    assert messages(database, heavy) == ["Accepted."]
    assert claimed(box, SMALL, LARGE, OTHER) == [(heavy, [2])]


def test_a_job_for_several_gpus_keeps_those_that_it_fits_and_no_others(
    settings: Settings, database: Database, set_free: SetFree
) -> None:
    slots = [SMALL, LARGE, OTHER]
    box = Claims(settings.model_copy(update={"busy_gpu_wait_seconds": 0}), database, "box-1", slots)
    set_free(24, 80, 80)
    large = make_job(database, name="job 60", gpus=2)
    light, last = (make_job(database, name="job 10") for _ in range(2))
    assert claimed(box, SMALL, LARGE) == [(light, [0])]
    assert claimed(box, LARGE) == []
    assert messages(database, large) == messages(database, last) == ["Accepted."]
    assert claimed(box, SMALL, LARGE, OTHER) == [(large, [1, 2]), (last, [0])]


def test_a_job_for_several_gpus_of_which_one_is_used_outside_keeps_none_from_those_behind_it(
    settings: Settings, database: Database, set_free: SetFree
) -> None:
    box = Claims(settings, database, "box-1", [SMALL, LARGE, OTHER])
    set_free(24, 5, 80)
    three = make_job(database, name="job 10", gpus=3, training={"per_device_train_batch_size": 3})
    behind = make_job(database, name="job 10")
    # One of this box's own jobs is on OTHER: its end would not help.
    assert claimed(box, SMALL, LARGE) == [(behind, [0])]
    assert "GPU 1 has 5.0 GiB free of the 80.0 GiB" in messages(database, three)[1]


@pytest.mark.parametrize("gpus", [1, 2])
def test_a_job_that_is_out_of_plans_fails_at_once_on_however_many_gpus(
    box: Claims, database: Database, gpus: int
) -> None:
    least = Plan(
        engine="reference", device="cuda", quantization="4bit", precision="bf16", micro_batch=1,
        accumulation=8 // gpus, gradient_checkpointing="all", gpus=gpus, reason="the least",
    )  # fmt: skip
    job_id = make_job(database, name="job 10", gpus=gpus)
    with database.write() as session:
        job = jobs.lock_job(session, job_id, None)
        job.plan_history = [{"attempt": 1, "plan": least.model_dump(), "reason": leases.OUT_OF_MEMORY}]
    assert claimed(box, SMALL, LARGE) == []
    assert status(database, job_id) == "failed"
    assert "no plan takes less than the last one (the least)" in messages(database, job_id)[-1]


def test_the_child_sees_its_first_gpu_and_knows_the_others(start: Start, database: Database) -> None:
    start(devices=[SMALL, LARGE], forked=False, standby="auto")
    job_id = make_job(database, name="forever 10", gpus=2)
    behind = make_job(database, name="forever 10")
    pid = wait_for(lambda: child_pid(database, job_id))
    assert pid is not None
    # The largest first; the process with this number was started before there was the job, or for it.
    assert psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] == "1"
    (started,) = [e for e in entries(database, job_id) if e.message == "started"]
    assert started.data is not None
    assert started.data["gpus"] == [1, 0]
    assert status(database, behind) == "queued"


def test_owners_share_the_gpus_that_are_free(box: Claims, database: Database) -> None:
    ann, more = make_job(database, name="job 10"), make_job(database, name="job 10")
    bob = make_job(database, owner="bob", name="job 10")
    assert claimed(box, SMALL, LARGE) == [(ann, [1]), (bob, [0])]
    last = make_job(database, owner="cem", name="job 10")
    assert claimed(box, LARGE) == [(last, [1])]
    assert claimed(box, LARGE) == [(more, [1])]


def test_an_owner_at_its_quota_of_running_jobs_waits_and_holds_up_nobody(
    settings: Settings, database: Database
) -> None:
    limited = settings.model_copy(update={"max_running_jobs": 1})
    box = Claims(limited, database, "box-1", [SMALL, LARGE])
    first, second = make_job(database, name="job 10"), make_job(database, name="job 10")
    other = make_job(database, owner="bob", name="job 10")
    assert claimed(box, SMALL, LARGE) == [(first, [1]), (other, [0])]
    assert claimed(box, SMALL, LARGE) == []
    with database.write() as session:
        jobs.set_status(jobs.lock_job(session, first, None), JobStatus.SUCCEEDED)
    assert claimed(box, SMALL, LARGE) == [(second, [1])]


def test_one_owners_jobs_that_fit_nowhere_do_not_hide_the_others(box: Claims, database: Database) -> None:
    for _ in range(claims.LOOK_AT_EACH + 1):
        make_job(database, name="job 90")
    other = make_job(database, owner="bob", name="job 10")
    assert claimed(box, SMALL) == [(other, [0])]


def test_a_job_without_disk_room_is_passed_by_until_there_is_some(
    box: Claims, database: Database, settings: Settings
) -> None:
    waits, behind = make_job(database, name="job 10"), make_job(database, name="job 10")
    most = free_bytes(settings.root) * 6 // 10
    held = Reservation(settings.root / "cache" / RESERVED)
    held.hold([Promise.of(most, [settings.root / "work"])])
    put_off(settings.root / "cache" / RESERVED, waits, {str(settings.root / "work"): most})
    assert claimed(box, SMALL, LARGE) == [(behind, [1])]
    # Nor does anybody make way for it.
    assert box.first(5) == []
    held.close()
    assert [job.id for job in box.first(5)] == [waits]
    assert claimed(box, SMALL) == [(waits, [0])]
