"""The newest checkpoint in the store: copied, replaced, fetched on another machine, removed."""

from __future__ import annotations

import shutil
import tarfile
import time
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from shared.clock import utcnow
from shared.database import Database
from shared.errors import JobFailure, NoRoomYet
from shared.events import Checkpoint
from shared.lifecycle import FailureCode
from shared.queue import Doorbell
from shared.repository import copies, jobs, leases
from shared.settings import Settings
from shared.storage import Store
from shared.tables import CheckpointCopy
from tests.conftest import wait_for
from tests.samples import make_job, size_and_hash
from tests.worker.attempts import FILES, Attempt, Stalling
from worker import copies as worker_copies
from worker import retention
from worker.checkpoints import FOLDER, complete_checkpoints
from worker.copies import Copies, remove_copies_of_ended
from worker.lease import JobLease
from worker.order import Order
from worker.reservations import RESERVED, Promise, Reservation
from worker.retention import collect
from worker.sink import DatabaseSink

Begin = Callable[..., Attempt]
Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def begin(settings: Settings, database: Database, doorbell: Doorbell, tmp_path: Path) -> Begin:
    def attempt(job_id: str, token: str = "token", machine: str = "one") -> Attempt:
        with database.write() as session:
            leases.claim(session, job_id, machine, token, utcnow() + timedelta(minutes=5))
        workdir = tmp_path / machine / f"1-{token}"
        (workdir / FOLDER).mkdir(parents=True)
        store = Stalling(settings.artifacts())
        sink = DatabaseSink(database, store, doorbell, JobLease(job_id, token), 300, lambda: None)
        order = Order(job_id, token, str(workdir), {})
        return Attempt(order, database, store, sink, workdir / FOLDER)

    return attempt


def copy_of(database: Database, job_id: str) -> CheckpointCopy | None:
    with database.read() as session:
        return copies.find_copy(session, job_id)


def wait_copy(database: Database, job_id: str, step: int) -> CheckpointCopy:
    found = wait_for(lambda: [c for c in [copy_of(database, job_id)] if c is not None and c.step == step])
    return found[0]


def stored(store: Store) -> list[str]:
    return sorted(file.name for file in store.list_files())


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def lose_lease(database: Database, job_id: str) -> None:
    with database.write() as session:
        leases.lose(session, jobs.lock_job(session, job_id, None), "It died.", 9)


@pytest.fixture(params=["file", "s3"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    if request.param == "file":
        return settings
    return settings.model_copy(update={"artifacts_url": request.getfixturevalue("s3_url")})


on_a_folder = pytest.mark.parametrize("settings", ["file"], indirect=True)
in_a_bucket = pytest.mark.parametrize("settings", ["s3"], indirect=True)


def test_a_machine_that_has_no_checkpoint_goes_on_from_the_copy(begin: Begin, database: Database) -> None:
    job_id = make_job(database)
    first = begin(job_id)
    with first.copies():
        for step in (4, 8):
            first.save(step)
            copy = wait_copy(database, job_id, step)
    # The one before is gone.
    assert wait_for(lambda: stored(first.store) == [copy.key])
    assert copy.key.startswith(f"jobs/{job_id}/token/checkpoint-8-")
    lose_lease(database, job_id)
    second = begin(job_id, "other", "two")
    assert second.fetch() == 8
    assert content_of(second.folder / "checkpoint-8") == FILES
    assert [path.name for path in second.folder.iterdir()] == ["checkpoint-8"]
    told = second.log()
    assert "The checkpoint of step 8 came from the store." in told
    # What came from the store is not put there again.
    with second.copies(8):
        second.sink.checkpoint(Checkpoint(8, second.folder / "checkpoint-8", 1, {}))
        second.save(12)
        wait_copy(database, job_id, 12)
    assert len(second.store.begun) == 1
    assert sum("is in the store: another machine could" in line for line in second.log()) == 2


@on_a_folder
def test_a_newer_checkpoint_of_the_machine_is_kept_and_an_older_one_is_not_enough(
    begin: Begin, database: Database
) -> None:
    job_id = make_job(database)
    first = begin(job_id)
    with first.copies():
        first.save(8)
        wait_copy(database, job_id, 8)
    for token, local, expected in (("same", 8, 8), ("newer", 12, None), ("older", 4, 8)):
        lose_lease(database, job_id)
        other = begin(job_id, token, token)
        other.save(local)
        assert other.fetch() == expected
        assert max(complete_checkpoints(other.folder)) == max(local, 8)
        assert ("came from the store" in str(other.log()[-1])) == (token == "older")


@on_a_folder
def test_a_checkpoint_that_goes_while_it_is_copied_is_copied_whole_and_the_next_one_is_the_newest(
    begin: Begin, database: Database
) -> None:
    job_id = make_job(database)
    attempt = begin(job_id)
    attempt.store.flows.clear()
    began = time.monotonic()
    with attempt.copies():
        attempt.save(1)
        wait_for(lambda: attempt.store.begun)
        for step in (2, 3, 4):
            attempt.save(step)
        # None of it waits for the store.
        assert time.monotonic() - began < 30
        assert list(complete_checkpoints(attempt.folder)) == [4]
        attempt.store.flows.set()
        wait_copy(database, job_id, 4)
    assert [key.split("checkpoint-")[1][0] for key in attempt.store.begun] == ["1", "4"]


@on_a_folder
def test_what_an_attempt_took_over_and_the_store_does_not_have_is_copied_at_once(
    begin: Begin, database: Database
) -> None:
    attempt = begin(job_id := make_job(database))
    attempt.save(5)
    with attempt.copies(attempt.fetch()):
        wait_copy(database, job_id, 5)


@on_a_folder
def test_a_store_that_refuses_is_told_of_once_and_tried_again(
    begin: Begin, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = make_job(database)
    attempt = begin(job_id)
    with attempt.copies():
        attempt.store.refuses = True
        for step in (1, 2):
            attempt.save(step)
            wait_for(lambda step=step: f"checkpoint-{step}-" in str(attempt.store.begun))
        attempt.store.refuses = False
        attempt.save(3)
        wait_copy(database, job_id, 3)
    told = attempt.log()
    assert [line for line in told if "was not copied" in line] == [
        "The newest checkpoint was not copied into the store: it was refused. It is tried again with the "
        "next one. Another machine would go on from an earlier one, or begin anew."
    ]
    assert "The checkpoint of step 3 is in the store" in str(told)
    assert "secret-bucket" not in str(told)
    # Of a process that dies, users read the last line.
    assert "secret-bucket" not in caplog.text.splitlines()[-1]


@on_a_folder
def test_a_copy_before_that_can_not_be_deleted_is_no_failure(
    begin: Begin, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_key: str) -> None:
        raise PermissionError

    attempt = begin(job_id := make_job(database))
    monkeypatch.setattr(attempt.store, "delete", refuse)
    with attempt.copies():
        for step in (1, 2):
            attempt.save(step)
            wait_copy(database, job_id, step)
    assert len(stored(attempt.store)) == 2
    assert not any("was not copied" in line for line in attempt.log())


@in_a_bucket
@pytest.mark.postgresql
def test_an_attempt_that_was_overtaken_leaves_no_copy(begin: Begin, database: Database) -> None:
    job_id = make_job(database)
    frozen = begin(job_id)
    with frozen.copies():
        frozen.save(4)
        wait_copy(database, job_id, 4)
        frozen.store.flows.clear()
        frozen.save(8)
        wait_for(lambda: len(frozen.store.begun) == 2)
        lose_lease(database, job_id)
        later = begin(job_id, "other", "two")
        assert later.fetch() == 4
        with later.copies(4):
            later.save(6)
            copy = wait_copy(database, job_id, 6)
        # It wakes up, and goes on writing.
        frozen.store.flows.set()
        wait_for(lambda: stored(later.store) == [copy.key])
    assert copy_of(database, job_id) == copy
    assert content_of(later.folder / "checkpoint-6") == FILES


@on_a_folder
def test_what_was_changed_in_the_store_is_not_used(begin: Begin, database: Database, tmp_path: Path) -> None:
    job_id = make_job(database)
    first = begin(job_id)
    with first.copies():
        first.save(8)
        copy = wait_copy(database, job_id, 8)
    path = first.store.fetch(copy.key, tmp_path / "none")
    whole = path.read_bytes()
    broken = {"cut": whole[:-1], "changed": whole.replace(b"{}", b"[]"), "long": whole + b"0"}
    for name, content in broken.items():
        path.write_bytes(content)
        lose_lease(database, job_id)
        other = begin(job_id, name, name)
        assert other.fetch() is None
        assert list(other.folder.iterdir()) == []
        assert (
            other.log()[-1]
            == "The checkpoint of step 8 in the store can't be used: it is not what was written."
        )
    path.unlink()
    lose_lease(database, job_id)
    last = begin(job_id, "gone", "gone")
    assert last.fetch() is None
    assert last.log()[-1] == "The checkpoint of step 8 is gone from the store."
    # One of the same step that is made anew takes its place.
    with last.copies():
        last.save(8)
        assert wait_for(lambda: (found := copy_of(database, job_id)) and found.key != copy.key)


@on_a_folder
@pytest.mark.parametrize("kind", ["path", "link", "folder"])
def test_a_tar_is_files_in_its_folder_and_nothing_else(
    begin: Begin, database: Database, tmp_path: Path, kind: str
) -> None:
    """Whoever could write into the store and into the database too would write no file elsewhere."""
    attempt = begin(job_id := make_job(database))
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        info = tarfile.TarInfo("../../out" if kind == "path" else "out")
        info.type = {"path": tarfile.REGTYPE, "link": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}[kind]
        info.linkname = "/etc/passwd"
        tar.addfile(info)
    size, sha256 = size_and_hash(evil)
    key = f"jobs/{job_id}/token/checkpoint-3.tar"
    attempt.store.publish(evil, key)
    with database.write() as session:
        copies.put_copy(session, CheckpointCopy(job_id=job_id, step=3, bytes=size, sha256=sha256, key=key))
    assert attempt.fetch() is None
    assert "can't be used" in attempt.log()[-1]
    assert list(attempt.folder.iterdir()) == []
    assert not list(tmp_path.rglob("out"))


@on_a_folder
def test_an_end_waits_for_the_copy_as_long_as_it_may(
    begin: Begin, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stalled(token: str) -> tuple[Attempt, Copies]:
        attempt = begin(make_job(database), token, token)
        running = Copies(attempt.order, attempt.store, attempt.sink, None)
        attempt.sink.on_checkpoint = running.offer
        attempt.store.flows.clear()
        attempt.save(1)
        wait_for(lambda: attempt.store.begun)
        return attempt, running

    def goes_on() -> float:
        attempt.store.flows.set()
        return time.monotonic() + 30

    attempt, running = stalled("one")
    running.end(goes_on)
    found = wait_copy(database, attempt.order.job_id, 1)
    # Nor is a thread waited for that hangs in the store.
    monkeypatch.setattr(worker_copies, "GIVE_UP_SECONDS", 0.05)
    late, running = stalled("late")
    limit = time.monotonic() + 0.05
    running.end(lambda: limit)
    assert "was not copied into the store: there was no time left for it." in late.log()[-1]
    late.store.flows.set()
    # Nothing half written is left.
    assert wait_for(lambda: stored(late.store) == [found.key])
    assert copy_of(database, late.order.job_id) is None


@on_a_folder
def test_a_copy_has_its_room_promised_before_it_is_fetched(
    begin: Begin, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begin(job_id := make_job(database))
    with first.copies():
        first.save(8)
        copy = wait_copy(database, job_id, 8)
    lose_lease(database, job_id)
    second = begin(job_id, "other", "two")
    free = copy.bytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(0, 0, free))
    with pytest.raises(JobFailure) as caught:
        second.fetch()
    assert caught.value.code == FailureCode.OUT_OF_DISK
    free = 2 * copy.bytes
    filled = begin(make_job(database), "third", "third")
    filled.save(1)
    held = Reservation(second.cache / RESERVED)
    held.hold([Promise.of(copy.bytes + 1, [filled.folder])])
    with pytest.raises(NoRoomYet):
        second.fetch()
    held.close()
    assert second.fetch() == 8


@on_a_folder
def test_memory_does_not_grow_with_the_checkpoint(begin: Begin, database: Database) -> None:
    job_id = make_job(database)
    attempt = begin(job_id)
    tracemalloc.start()
    with attempt.copies():
        attempt.save(1, bytes(30 << 20))
        tracemalloc.reset_peak()
        wait_copy(database, job_id, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


@on_a_folder
def test_it_is_removed_once_the_job_has_ended_and_known_until_then(
    begin: Begin, database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STRAY_SECONDS", -1.0)
    job_id = make_job(database)
    attempt = begin(job_id)
    with attempt.copies():
        attempt.save(1)
        copy = wait_copy(database, job_id, 1)
    assert collect(database, attempt.store, settings, dry_run=False) == []
    attempt.sink.give_back("It has to.")
    assert list(remove_copies_of_ended(database, attempt.store, dry_run=False)) == []
    with database.write() as session:
        jobs.request_cancel(session, job_id, None)
    (shown,) = collect(database, attempt.store, settings, dry_run=True)
    assert (shown.what, shown.job_id, shown.bytes) == ("checkpoint in the store", job_id, copy.bytes)
    assert stored(attempt.store) == [copy.key]
    assert collect(database, attempt.store, settings, dry_run=False) == [shown]
    assert (stored(attempt.store), copy_of(database, job_id)) == ([], None)
    # Without its row it would be nobody's.
    attempt.store.publish(attempt.save(2) / "checkpoint.json", copy.key)
    (stray,) = collect(database, attempt.store, settings, dry_run=False)
    assert (stray.what, stray.job_id) == ("files without a row", job_id)
