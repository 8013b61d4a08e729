"""Room on the disk: promised to one job at a time, and a disk that fills up under a job."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.disk import DiskNeed, disk_need
from shared.errors import JobFailure, NoRoomYet
from shared.events import MemorySink
from shared.lifecycle import FailureCode
from tests.worker.training.samples import make_spec, new_workdir, run_job
from tests.worker.training.test_resume import StepSink
from worker.checkpoints import FOLDER, checkpoint_folder, complete_checkpoints
from worker.reservations import RESERVED, put_off, still_put_off
from worker.training import room as room_module
from worker.training.checkpoints import RECORD
from worker.training.room import Room
from worker.training.workdir import Workdir

Usage = namedtuple("Usage", ["total", "used", "free"])
FOUR_B = 4_513_000_000


class Disk:
    """A disk of which so much is free."""

    def __init__(self) -> None:
        self.free = 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    found = Disk()
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(found.free, 0, found.free))
    monkeypatch.setattr(room_module, "WATCH_SECONDS", 0.0)
    return found


@pytest.fixture
def need() -> DiskNeed:
    return disk_need(make_spec(exports=["adapter", "merged_16bit"]), FOUR_B, 33_000_000)


class Attempts:
    """Rooms of attempts at jobs of one box, with what each told."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rooms: list[Room] = []

    def new(self) -> tuple[Room, MemorySink, Workdir]:
        root = self._folder / f"attempt-{len(self.rooms)}"
        root.mkdir()
        workdir = Workdir(root=root, cache=self._folder / "cache", store=self._folder / "store" / root.name)
        sink = MemorySink()
        self.rooms.append(Room(workdir, sink))
        return self.rooms[-1], sink, workdir


@pytest.fixture
def attempts(tmp_path: Path) -> Iterator[Attempts]:
    found = Attempts(tmp_path)
    yield found
    for room in found.rooms:
        with room:
            pass


def messages(sink: MemorySink) -> list[str]:
    return [entry.message for entry in sink.entries]


def put_checkpoints(workdir: Workdir, sizes: dict[int, int]) -> None:
    for step, size in sizes.items():
        folder = checkpoint_folder(workdir.root / FOLDER, step)
        folder.mkdir(parents=True)
        record: dict[str, Any] = {"step": step, "created_at": "2026-11-24T12:00:00+00:00", "metrics": {}}
        (folder / RECORD).write_text(json.dumps(record))
        (folder / "weights").write_bytes(b"w" * size)


def test_what_does_not_fit_names_what_is_needed_and_free(
    attempts: Attempts, disk: Disk, need: DiskNeed
) -> None:
    room, _, workdir = attempts.new()
    disk.free = need.total - 1
    with pytest.raises(JobFailure, match=r"needs about 18\.\d\d GB.* 18\.\d\d GB are free.*merged") as caught:
        room.reserve(need)
    assert caught.value.code == FailureCode.OUT_OF_DISK
    # Checkpoints that are there from an earlier attempt need no room again.
    put_checkpoints(workdir, {4: 1000})
    room.reserve(need)
    # With a store elsewhere, a finished file leaves the work folder before the next is made.
    bare = Workdir(root=workdir.root, cache=workdir.root)
    disk.free = need.work
    with Room(bare, MemorySink()) as elsewhere:
        elsewhere.reserve(need)


def test_two_jobs_never_count_the_same_room(
    attempts: Attempts, disk: Disk, need: DiskNeed, tmp_path: Path
) -> None:
    disk.free = 2 * need.total - 1
    first, _, filling = attempts.new()
    first.reserve(need)
    second, sink, workdir = attempts.new()
    with pytest.raises(NoRoomYet, match=r"jobs that run have been promised 18\.\d\d GB: it waits") as caught:
        second.reserve(need)
    assert list(caught.value.needs.values()) == [need.total]
    reserved = workdir.cache / RESERVED
    put_off(reserved, "ftjob-second", caught.value.needs)
    assert still_put_off(reserved) == {"ftjob-second"}
    # What the first one fills, it may give back: a merged model and all that is made on the way.
    put_checkpoints(filling, {2: 3000})
    disk.free = need.total - 3000
    assert still_put_off(reserved) == {"ftjob-second"}
    with pytest.raises(NoRoomYet):
        second.reserve(need)
    # What is too much for the disk without any of that fails at its next attempt.
    disk.free -= 1000
    assert still_put_off(reserved) == set()
    with pytest.raises(JobFailure):
        second.reserve(need)
    disk.free = 2 * need.total - 1
    attempts.rooms.remove(first)
    with first:
        pass
    assert still_put_off(reserved) == set()
    second.reserve(need)
    assert sink.entries == []


def test_a_disk_that_fills_up_is_told_of_once_and_so_is_its_end(
    attempts: Attempts, disk: Disk, need: DiskNeed
) -> None:
    room, sink, _ = attempts.new()
    disk.free = need.total
    room.reserve(need)
    room.watch()
    assert messages(sink) == []
    disk.free = need.total - need.checkpoints + need.one_checkpoint - 1
    room.watch()
    room.watch()
    assert [(entry.level, entry.data) for entry in sink.entries] == [
        ("warning", {"needed_bytes": disk.free + 1, "free_bytes": disk.free})
    ]
    assert messages(sink)[0].startswith("The disk fills up: the next checkpoint and the exports need about")
    disk.free += 1
    room.watch()
    assert messages(sink)[1:] == ["There is room for the next checkpoint and the exports again."]
    # What another job was promised is not free either.
    other, *_ = attempts.new()
    disk.free = 2 * need.total
    other.reserve(need)
    disk.free -= need.total
    room.watch()
    assert len(sink.entries) == 3


def test_older_checkpoints_make_way_before_one_is_left_out(
    attempts: Attempts, disk: Disk, need: DiskNeed
) -> None:
    room, sink, workdir = attempts.new()
    disk.free = need.total
    room.reserve(need)
    output = workdir.root / FOLDER
    put_checkpoints(workdir, {2: 3000, 4: 3000, 6: 3000, 8: 3000})
    assert room.fits_checkpoint(10, 4)
    assert messages(sink) == []
    disk.free = 100
    assert not room.fits_checkpoint(10, 4)
    # The last and the best stay.
    assert list(complete_checkpoints(output)) == [4, 8]
    assert [c.step for c in sink.checkpoints] == [8]
    assert messages(sink)[0] == "The checkpoints of steps 2, 6 were given up: the disk is full."
    assert messages(sink)[1].startswith("Step 10 gets no checkpoint")
    assert messages(sink)[1].endswith("if it is interrupted, it goes on from step 8.")
    disk.free = 10_000
    assert room.fits_checkpoint(12, 4)


def test_exports_that_do_not_fit_end_the_job_after_the_checkpoints_made_way(
    attempts: Attempts, disk: Disk, need: DiskNeed
) -> None:
    room, sink, workdir = attempts.new()
    disk.free = need.total
    room.reserve(need)
    put_checkpoints(workdir, {2: 3000, 4: 3000})
    adapter = workdir.root / "adapter"
    adapter.mkdir()
    (adapter / "weights").write_bytes(b"a" * 5000)
    # What is written is needed no more.
    disk.free = need.total - need.checkpoints - 5000
    room.fit_exports()
    assert list(complete_checkpoints(workdir.root / FOLDER)) == [2, 4]
    disk.free -= 1
    with pytest.raises(JobFailure, match=r"The exports need about 18\.\d\d GB more") as caught:
        room.fit_exports()
    assert caught.value.code == FailureCode.OUT_OF_DISK
    assert list(complete_checkpoints(workdir.root / FOLDER)) == [4]
    assert messages(sink) == ["The checkpoints of steps 2 were given up: the disk is full."]


def at(step: int, act: Callable[[], None]) -> StepSink:
    return StepSink(step, act)


@pytest.mark.train
def test_a_job_outlives_a_disk_that_is_full_for_a_while(tmp_path: Path, tiny_model: Path, disk: Disk) -> None:
    disk.free = 1 << 40
    full_from, free_from = 3, 5

    class Filling(MemorySink):
        def metrics(self, row: dict[str, float | int | None]) -> None:
            super().metrics(row)
            step = row["step"] or 0
            disk.free = 1000 if full_from <= step < free_from else 1 << 40

    sink = Filling()
    outcome = run_job(make_spec({"max_steps": 6, "save_steps": 1}), new_workdir(tmp_path, tiny_model), sink)
    assert "adapter.tar" in [a.name for a in outcome.artifacts]
    assert [c.step for c in sink.checkpoints] == [1, 2, 2, 5, 6]
    told = [entry.message for entry in sink.entries if entry.level == "warning"]
    assert [text.split(":")[0] for text in told] == [
        "The checkpoints of steps 1 were given up",
        "Step 3 gets no checkpoint",
        "The disk fills up",
        "Step 4 gets no checkpoint",
    ]
    assert told[3].endswith("if it is interrupted, it goes on from step 2.")
    assert list(complete_checkpoints(outcome.workdir.root / FOLDER)) == [2, 5, 6]


@pytest.mark.train
def test_the_best_step_that_was_kept_is_exported(tmp_path: Path, tiny_model: Path, disk: Disk) -> None:
    """The best one's checkpoint found no room."""
    disk.free = 1 << 40

    class FullAtTheBest(MemorySink):
        def metrics(self, row: dict[str, float | int | None]) -> None:
            super().metrics(row)
            disk.free = 1000 if (row["step"] or 0) == 2 else 1 << 40

    # The first two steps help, and then the rate is far too high.
    spec = make_spec(
        {"max_steps": 3, "eval_steps": 1, "early_stopping_patience": 9, "save_steps": 100,
         "learning_rate": 5e-3, "lr_scheduler_type": "constant"},
        validation_fraction=0.2,
    )  # fmt: skip
    outcome = run_job(spec, new_workdir(tmp_path, tiny_model), FullAtTheBest())
    manifest = json.loads(outcome.path("manifest.json").read_text(encoding="utf-8"))
    there = {row["step"]: row["eval_loss"] for row in manifest["evaluations"] if row["step"] != 2}
    assert manifest["exported_step"] == min(there, key=lambda step: there[step])


def test_copies_of_checkpoints_in_a_store_on_this_disk_are_promised_too(
    disk: Disk, need: DiskNeed, tmp_path: Path
) -> None:
    _, sink, workdir = Attempts(tmp_path).new()
    with Room(replace(workdir, store=tmp_path / "store", copies=True), sink) as room:
        disk.free = need.total + need.one_checkpoint
        with pytest.raises(JobFailure):
            room.reserve(need)
        disk.free += need.one_checkpoint
        room.reserve(need)
