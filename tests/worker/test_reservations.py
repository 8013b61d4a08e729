"""Room on a disk that is promised: counted by others until it is filled, gone with its process, and waited
for by jobs that hold nothing meanwhile."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from shared.database import Database
from shared.queue import Doorbell
from shared.settings import Settings
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import Start
from tests.worker.test_exports import ask, finished, wait_export
from tests.worker.test_pause import messages
from tests.worker.test_supervisor import cancel, read, wait_status
from worker.reservations import (
    ALL,
    RESERVED,
    Promise,
    Reservation,
    Taken,
    notes,
    put_off,
    size_of,
    still_put_off,
)
from worker.sweep import sweep_notes

HOLD = """
import sys, pathlib
from worker.reservations import Promise, Reservation
folder = pathlib.Path(sys.argv[1])
held = Reservation(folder / "reserved")
held.hold([Promise.of(5000, [folder / "work"])])
print("held", flush=True)
sys.stdin.read()
"""


def test_others_count_what_is_promised_and_not_yet_filled(tmp_path: Path) -> None:
    work, store = tmp_path / "work", tmp_path / "store"
    work.mkdir()
    (work / "before").write_bytes(b"b" * 100)
    disk = tmp_path.stat().st_dev
    mine, other = Reservation(tmp_path / "reserved"), Reservation(tmp_path / "reserved")
    mine.hold([Promise.of(1000, [work, store])])
    assert other.others(disk) == Taken(1000, 100)
    assert other.others(disk + 1) == mine.others(disk) == Taken()
    store.mkdir()
    (store / "file").write_bytes(b"f" * 300)
    (store / "same").hardlink_to(store / "file")
    assert size_of([work, store]) == 400
    assert other.others(disk) == Taken(700, 400)
    (store / "more").write_bytes(b"f" * 900)
    assert other.others(disk) == Taken(0, 1300)
    mine.hold([Promise.of(50, [work])])
    assert other.others(disk) == Taken(50, 100)
    mine.close()
    assert other.others(disk) == Taken()
    other.close()
    assert [file.name for file in (tmp_path / "reserved").iterdir()] == ["all.lock"]


def test_a_promise_ends_with_a_killed_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        mine = Reservation(tmp_path / "reserved")
        assert mine.others(tmp_path.stat().st_dev).open == 5000
        holder.kill()
        holder.wait()
        assert mine.others(tmp_path.stat().st_dev) == Taken()
        mine.close()


def test_a_job_without_room_leaves_its_gpu_to_others(
    start: Start, database: Database, doorbell: Doorbell, settings: Settings
) -> None:
    start(slots=2, poll_seconds=0.05)
    holder = make_job(database, name="roomy forever")
    assert wait_for(lambda: "has room" in messages(database, holder))
    waits = make_job(database, name="roomy")
    doorbell.ring(waits)
    assert wait_for(lambda: "jobs that run have been promised" in messages(database, waits)[-1])
    assert messages(database, waits)[-1].endswith("The job goes back to the queue.")
    assert (read(database, waits).status, read(database, waits).losses) == ("queued", 0)
    # Whoever is behind it has the slot; it is not tried in vain meanwhile.
    behind = make_job(database)
    doorbell.ring(behind)
    wait_status(database, behind, "succeeded")
    assert (read(database, waits).status, read(database, waits).attempt) == ("queued", 1)
    cancel(database, doorbell, holder)
    job = wait_status(database, waits, "succeeded")
    assert (job.attempt, job.losses) == (2, 0)
    assert messages(database, waits).count("has room") == 1
    note = notes(settings.root / "cache" / RESERVED)[waits]
    os.utime(note, (0, 0))
    sweep_notes(database, settings.root / "cache" / RESERVED)
    assert not note.exists()


def test_an_export_without_room_lets_others_be_made(
    start: Start, database: Database, doorbell: Doorbell
) -> None:
    start(poll_seconds=0.05)
    roomy, plain = finished(database, doorbell, "succeed roomy"), finished(database, doorbell)
    holder = make_job(database, name="roomy forever")
    assert wait_for(lambda: "has room" in messages(database, holder))
    waits, behind = ask(database, roomy), ask(database, plain)
    assert wait_export(database, behind, "succeeded").attempt == 1
    assert "jobs that run have been promised" in " ".join(messages(database, roomy))
    task = wait_export(database, waits, "queued")
    assert (task.attempt, task.losses, task.passed_by) == (1, 0, [])
    cancel(database, doorbell, holder)
    assert wait_export(database, waits, "succeeded").attempt == 2


def test_notes_of_those_that_still_wait_stay(database: Database, tmp_path: Path) -> None:
    waits = make_job(database)
    for name in (waits, "ftjob-gone", "ftjob-new"):
        put_off(tmp_path, name, {str(tmp_path / "work" / name): 1 << 60})
    for name in (waits, "ftjob-gone"):
        os.utime(notes(tmp_path)[name], (0, 0))
    sweep_notes(database, tmp_path)
    assert notes(tmp_path).keys() == {waits, "ftjob-new"}
    # More than the disk has: it is to fail rather than to wait.
    assert still_put_off(tmp_path) == set()
    # A frozen process that counts holds up no supervisor: nothing of it is claimed until it is known.
    with (tmp_path / ALL).open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert still_put_off(tmp_path) == {waits, "ftjob-new"}
