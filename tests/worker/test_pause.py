"""Pausing, resuming, stopping and taking over, with real child processes and a real database."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from shared.database import Database, Session
from shared.errors import StateConflict
from shared.events import Checkpoint
from shared.queue import Doorbell
from shared.repository import jobs, leases, logs
from shared.settings import Settings
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_supervisor import cancel, child_pid, entries, read, wait_status
from worker import child
from worker.checkpoints import FOLDER, complete_checkpoints, discard, move_checkpoints, take_over
from worker.sweep import sweep


def pause(database: Database, doorbell: Doorbell, job_id: str) -> None:
    with database.write() as session:
        jobs.request_pause(session, job_id, None)
    doorbell.ring(job_id)


def resume(database: Database, doorbell: Doorbell, job_id: str) -> None:
    with database.write() as session:
        jobs.request_resume(session, job_id, None)
    doorbell.ring(job_id)


def messages(database: Database, job_id: str) -> list[str]:
    return [entry.message for entry in entries(database, job_id)]


def steps_told(database: Database, job_id: str) -> list[int]:
    with database.read() as session:
        return [row["step"] for row in logs.read_metrics(session, job_id)]


def checkpoints_told(database: Database, job_id: str) -> list[int]:
    with database.read() as session:
        return [row.step for row in logs.read_checkpoints(session, job_id)]


def test_a_job_paused_in_mid_step_goes_on_after_it(
    start: Start, database: Database, settings: Settings, doorbell: Doorbell
) -> None:
    start()
    job_id = make_job(database, name="patient 2", time_limit_seconds=3600)
    wait_for(lambda: steps_told(database, job_id) == [1, 2])
    pid = child_pid(database, job_id)
    pause(database, doorbell, job_id)
    pause(database, doorbell, job_id)
    with pytest.raises(StateConflict, match="still pausing"), database.write() as session:
        jobs.request_resume(session, job_id, None)
    job = wait_status(database, job_id, "paused")
    assert (job.losses, job.lease_token, job.worker) == (0, None, None)
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))
    assert messages(database, job_id)[-1] == "Paused after step 2."
    assert checkpoints_told(database, job_id) == [2]
    kept = settings.root / "work" / job_id
    assert wait_for(lambda: [p.name for p in kept.iterdir()] == [FOLDER])
    # The slot is free, and the time goes by for others.
    ran = job.run_seconds
    assert wait_status(database, make_job(database), "succeeded").status == "succeeded"
    resume(database, doorbell, job_id)
    resume(database, doorbell, job_id)
    job = wait_status(database, job_id, "succeeded")
    assert (job.attempt, job.losses) == (2, 0)
    assert ran < job.run_seconds < 30
    assert "from step 2" in messages(database, job_id)
    assert steps_told(database, job_id) == [1, 2, 3, 4, 5]
    log = entries(database, job_id)
    assert [e.seq for e in log] == list(range(1, len(log) + 1))


def test_a_job_is_paused_at_once_where_it_has_nothing_to_keep(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start(stop_grace_seconds=0.5)
    job_id = make_job(database, name="loading")
    pid = wait_for(lambda: child_pid(database, job_id))
    wait_for(lambda: read(database, job_id).phase == "loading_model")
    began = time.monotonic()
    pause(database, doorbell, job_id)
    job = wait_status(database, job_id, "paused")
    assert time.monotonic() - began < 5
    assert job.losses == 0
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))


def test_a_waiting_job_is_paused_and_resumed(database: Database, doorbell: Doorbell) -> None:
    job_id = make_job(database)
    pause(database, doorbell, job_id)
    pause(database, doorbell, job_id)
    assert read(database, job_id).status == "paused"
    resume(database, doorbell, job_id)
    assert read(database, job_id).status == "queued"
    assert messages(database, job_id)[1:] == [
        "Paused while it waited.",
        "Resumed: the job is back in the queue.",
    ]


def test_a_pausing_job_can_still_be_cancelled(start: Start, database: Database, doorbell: Doorbell) -> None:
    start(stop_grace_seconds=0.5)
    job_id = make_job(database, name="deaf")
    wait_for(lambda: child_pid(database, job_id))
    pause(database, doorbell, job_id)
    wait_for(lambda: read(database, job_id).status == "pausing")
    cancel(database, doorbell, job_id)
    assert wait_status(database, job_id, "cancelled", seconds=5).status == "cancelled"


def test_a_stopped_worker_lets_a_step_end_with_a_checkpoint(start: Start, database: Database) -> None:
    supervisor = start()
    job_id = make_job(database, name="patient 2")
    wait_for(lambda: steps_told(database, job_id) == [1, 2])
    supervisor.stop()
    job = wait_status(database, job_id, "queued")
    assert job.losses == 0
    assert checkpoints_told(database, job_id) == [2]
    start()
    assert wait_status(database, job_id, "succeeded").attempt == 2
    assert "from step 2" in messages(database, job_id)


def test_a_stopped_worker_waits_no_longer_than_its_grace_time(start: Start, database: Database) -> None:
    supervisor = start(checkpoint_grace_seconds=0.5)
    job_id = make_job(database, name="deaf")
    pid = wait_for(lambda: child_pid(database, job_id))
    supervisor.stop()
    assert wait_status(database, job_id, "queued", seconds=5).losses == 0
    assert wait_for(lambda: pid is not None and not psutil.pid_exists(pid))


def test_what_a_killed_attempt_left_is_taken_over(
    start: Start, database: Database, settings: Settings
) -> None:
    """With a checkpoint that the database never heard of: the kill came in between."""
    start()
    work = settings.root / "work"
    job_id = make_job(database, name="patient 1")
    wait_for(lambda: steps_told(database, job_id) == [1])
    (attempt,) = [f for f in (work / job_id).iterdir() if f.name != FOLDER]
    (attempt / FOLDER / "checkpoint-3").mkdir(parents=True)
    pid = child_pid(database, job_id)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    job = wait_status(database, job_id, "succeeded")
    assert (job.attempt, job.losses) == (2, 1)
    assert "from step 3" in messages(database, job_id)


def make_checkpoints(folder: Path, *steps: int, text: str = "") -> Path:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "weights").write_text(text)
    return folder


def test_an_attempt_takes_over_whatever_earlier_ones_left(tmp_path: Path) -> None:
    job = tmp_path / "job"
    make_checkpoints(job / FOLDER, 2, 4, text="kept")
    make_checkpoints(job / "2-dead" / FOLDER, 4, 6, text="dead")
    (job / "2-dead" / FOLDER / ".writing" / "checkpoint-8").mkdir(parents=True)
    (job / FOLDER / ".removed-checkpoint-0-x").mkdir()
    new = job / "3-new" / FOLDER
    new.parent.mkdir()
    take_over(job, new)
    assert list(complete_checkpoints(new)) == [2, 4, 6]
    assert list((job / FOLDER).iterdir()) == []
    assert (new / "checkpoint-6" / "weights").read_text() == "dead"
    # The frozen attempt wakes up: it can neither remove nor replace what is no longer its own.
    discard(job / "2-dead" / FOLDER / "checkpoint-6")
    make_checkpoints(job / "2-dead" / FOLDER, 6, text="zombie")
    assert (new / "checkpoint-6" / "weights").read_text() == "dead"
    move_checkpoints(new, job / FOLDER)
    assert list(complete_checkpoints(job / FOLDER)) == [2, 4, 6]


def test_a_supervisor_that_starts_an_attempt_late_takes_nothing_from_the_next_one(tmp_path: Path) -> None:
    job = tmp_path / "job"
    make_checkpoints(job / "1-first" / FOLDER, 2)
    make_checkpoints(job / "3-third" / FOLDER, 4)
    late = job / "2-frozen" / FOLDER
    late.parent.mkdir()
    take_over(job, late)
    assert list(complete_checkpoints(late)) == [2]
    assert list(complete_checkpoints(job / "3-third" / FOLDER)) == [4]


def test_two_that_move_the_same_checkpoints_lose_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt, kept = make_checkpoints(tmp_path / "1-dead", 5, text="of one attempt"), tmp_path / FOLDER
    seen = complete_checkpoints(attempt)
    move_checkpoints(attempt, kept)
    monkeypatch.setattr("worker.checkpoints.complete_checkpoints", lambda _: seen)
    move_checkpoints(attempt, kept)
    assert (kept / "checkpoint-5" / "weights").read_text() == "of one attempt"


@pytest.fixture
def removed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the sweep would remove."""
    found: list[Path] = []
    monkeypatch.setattr("worker.sweep.remove_in_background", found.append)
    return found


def test_checkpoints_that_could_not_be_put_by_are_not_removed(
    database: Database, tmp_path: Path, removed: list[Path]
) -> None:
    job_id = make_job(database)
    attempt = tmp_path / job_id / "1-dead"
    make_checkpoints(attempt / FOLDER, 5)
    long_ago = time.time() - 3600
    os.utime(attempt, (long_ago, long_ago))
    # As on a full disk: the folder for them can't be made.
    (tmp_path / job_id / FOLDER).write_text("in the way")
    sweep(database, tmp_path)
    assert (removed, list(complete_checkpoints(attempt / FOLDER))) == ([], [5])
    (tmp_path / job_id / FOLDER).unlink()
    sweep(database, tmp_path)
    assert list(complete_checkpoints(tmp_path / job_id / FOLDER)) == [5]
    assert removed == [attempt]


def test_a_sweep_that_takes_its_time_leaves_an_attempt_that_begins_meanwhile(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: list[Path]
) -> None:
    job_id = make_job(database)
    (tmp_path / job_id).mkdir()
    attempt = tmp_path / job_id / "1-new"
    holders = leases.holders

    def look_late(session: Session, job_ids: Sequence[str]) -> dict[str, leases.Holder]:
        found = holders(session, job_ids)
        attempt.mkdir()
        long_ago = time.time() - 3600
        os.utime(attempt, (long_ago, long_ago))
        return found

    monkeypatch.setattr(leases, "holders", look_late)
    sweep(database, tmp_path)
    assert (removed, attempt.is_dir()) == ([], True)


def test_the_sweep_keeps_the_checkpoints_of_attempts_that_died_with_their_supervisor(
    database: Database, tmp_path: Path
) -> None:
    job_id = make_job(database)
    attempt = tmp_path / job_id / "1-dead"
    make_checkpoints(attempt / FOLDER, 5)
    long_ago = time.time() - 3600
    os.utime(attempt, (long_ago, long_ago))
    sweep(database, tmp_path)
    assert list(complete_checkpoints(tmp_path / job_id / FOLDER)) == [5]
    assert wait_for(lambda: not attempt.exists())


def test_an_ended_job_that_has_nothing_left_has_no_folder(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    ended, kept, paused = (make_job(database) for _ in range(3))
    with database.write() as session:
        for job_id in (ended, kept):
            jobs.request_cancel(session, job_id, None)
    for job_id in (ended, kept, paused):
        (work / job_id / FOLDER).mkdir(parents=True)
    (checkpoint,) = complete_checkpoints(make_checkpoints(work / kept / FOLDER, 5)).values()
    sweep(database, work)
    assert {folder.name for folder in work.iterdir()} == {kept, paused}
    assert checkpoint.is_dir()
    # A sweep may come between the making of the folder and the move into it.
    attempt = make_checkpoints(work / ended / "1-dead", 5)
    target, rename, swept = work / ended / FOLDER, Path.rename, []

    def sweep_first(path: Path, to: Path) -> Path:
        if not swept:
            swept.append(target)
            target.rmdir()
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", sweep_first)
    move_checkpoints(attempt, target)
    assert swept
    assert list(complete_checkpoints(target)) == [5]


def test_a_job_whose_checkpoint_is_on_another_machine_says_that_it_begins_anew(
    start: Start, database: Database, tmp_path: Path
) -> None:
    job_id = make_job(database, name="succeed")
    with database.write() as session:
        elsewhere = Checkpoint(step=7, path=tmp_path, bytes=1, metrics={})
        logs.put_checkpoint(session, job_id, elsewhere, [7])
    start()
    wait_status(database, job_id, "succeeded")
    assert "The checkpoint of step 7 is not on this machine: the job begins anew." in messages(
        database, job_id
    )


def test_who_leaves_waits_for_a_copy_as_long_as_it_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "end_process_group", lambda: None)
    read, write = os.pipe()
    with os.fdopen(read) as stdin, os.fdopen(write, "w", buffering=1) as supervisor:
        monkeypatch.setattr(sys, "stdin", stdin)
        control = child.ChildControl()
        control.start()
        supervisor.write("no order\n")
        assert control.leaves_until() == 0
        supervisor.write("leave 40.0\n")
        assert wait_for(control.leaving)
        assert 30 < control.leaves_until() - time.monotonic() <= 40
        supervisor.write("stop\n")
        assert wait_for(lambda: not control.leaving())
        assert control.leaves_until() == 0
