"""Processes that wait for a job: by themselves, and under a supervisor with real ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import psutil
import pytest

from shared.database import Database
from shared.device import Device
from shared.plan import EngineName
from shared.settings import Settings
from tests.conftest import wait_for
from tests.samples import make_job
from tests.worker.conftest import CPU, Start
from tests.worker.test_supervisor import child_pid, entries, read, wait_status
from worker import standby
from worker.process import Process
from worker.standby import Standbys
from worker.sweep import sweep

GPU = Device("cuda", 0, "GPU", 80 << 30, ("reference", "compiled", "unsloth"))
REAL_AVAILABLE = standby.available_bytes
OTHER_GPU = Device("cuda", 1, "GPU", 80 << 30, ("reference", "compiled", "unsloth"))


class Started:
    """A process that never was one."""

    def __init__(self, folder: Path, device: Device, arguments: list[str]) -> None:
        self.folder, self.device, self.engine = folder, device, arguments[0]
        self.pid = 0
        self.code: int | None = None

    def exit_code(self) -> int | None:
        return self.code

    def last_words(self) -> str:
        return ""

    def close(self) -> None:
        self.code = -9

    def move_to(self, folder: Path) -> None:
        self.folder = folder


class Box:
    """Standbys whose processes are only noted down."""

    def __init__(self, wanted: str, slots: list[Device], work: Path) -> None:
        self.started: list[Started] = []
        self.standbys = Standbys(wanted, slots, work, self._start)

    def _start(self, folder: Path, device: Device, arguments: list[str]) -> Process:
        self.started.append(Started(folder, device, arguments))
        return cast("Process", self.started[-1])

    def waiting(self) -> list[tuple[str, int]]:
        return [(s.engine, s.device.index) for s in self.started if s.code is None]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "REPLACE_SECONDS", 0.0)
    monkeypatch.setattr(standby, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(standby, "available_bytes", lambda: 64 << 30)


def standing_by(but: int | None = None) -> int | None:
    """The process that waits, once it is warm."""
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it ends at this moment
            if process.cmdline()[2:4] == ["tests.worker.fake_child", "reference"] and process.pid != but:
                return process.pid if Path(process.environ()["TMPDIR"], "warm").exists() else None
    return None


def test_a_job_gets_the_process_that_waited_and_the_next_one_another(
    start: Start, database: Database, settings: Settings
) -> None:
    start(forked=False, standby="auto")
    waiting = wait_for(standing_by)
    job_id = make_job(database, name="forever")
    assert wait_for(lambda: child_pid(database, job_id)) == waiting
    (attempt,) = (settings.root / "work" / job_id).iterdir()
    assert (attempt / "tmp" / "warm").read_text() == "reference"
    # The one slot is taken: on a CPU nothing is imported beside a job.
    assert list((settings.root / "work").glob("standby-*")) == []
    os.kill(waiting or 0, 9)
    again = wait_for(lambda: (pid := child_pid(database, job_id)) != waiting and pid)
    assert again != waiting
    assert read(database, job_id).losses == 1


def test_a_job_that_comes_before_the_imports_are_done_is_not_lost(
    start: Start, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_TEST_SLOW_IMPORT_SECONDS", "6")
    start(forked=False, standby="auto", lease_seconds=4)
    job_id = make_job(database)
    job = wait_status(database, job_id, "succeeded", "failed")
    assert (job.status, job.attempt) == ("succeeded", 1)
    assert not [e for e in entries(database, job_id) if e.level == "warning"]


def test_a_standby_that_died_is_replaced_and_all_end_with_their_supervisor(
    start: Start, settings: Settings
) -> None:
    supervisor = start(forked=False, standby="auto")
    first = wait_for(standing_by)
    os.kill(first or 0, 9)
    second = wait_for(lambda: standing_by(but=first))
    supervisor.stop()
    assert wait_for(lambda: second is not None and not psutil.pid_exists(second))
    assert wait_for(lambda: list((settings.root / "work").glob("standby-*")) == [])


def test_a_standby_whose_supervisor_was_killed_ends(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.worker.fake_child", "reference"],
        stdin=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        start_new_session=True,
    ) as process:
        wait_for((tmp_path / "warm").exists)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(10) == -9


def test_folders_of_standbys_that_nobody_watches_are_swept(database: Database, tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as gone:
        gone.wait()
    for pid in (gone.pid, os.getpid()):
        (tmp_path / f"standby-{pid}-1" / "tmp").mkdir(parents=True)
    sweep(database, tmp_path)
    left = tmp_path / f"standby-{os.getpid()}-1"
    assert wait_for(lambda: list(tmp_path.glob("standby-*")) == [left])


def test_each_gpu_has_one_of_the_engine_that_ran_last(tmp_path: Path) -> None:
    box = Box("auto", [GPU, OTHER_GPU], tmp_path)
    for _ in range(4):
        box.standbys.tend([OTHER_GPU])
    assert box.waiting() == [("compiled", 1), ("compiled", 0)]
    assert box.standbys.take("unsloth", GPU, tmp_path / "a") is None
    for _ in range(4):
        box.standbys.tend([OTHER_GPU])
    assert box.waiting() == [("unsloth", 1), ("unsloth", 0)]
    taken = box.standbys.take("unsloth", GPU, tmp_path / "b")
    assert cast("Started", taken).device == GPU
    assert box.standbys.take("unsloth", GPU, tmp_path / "c") is None


def test_only_unsloth_needs_its_own(tmp_path: Path) -> None:
    box = Box("compiled,unsloth", [GPU], tmp_path)
    for _ in range(3):
        box.standbys.tend([GPU])
    assert box.waiting() == [("compiled", 0), ("unsloth", 0)]
    engines: list[EngineName] = ["reference", "unsloth"]
    taken = [box.standbys.take(engine, GPU, tmp_path / engine) for engine in engines]
    assert [cast("Started", t).engine for t in taken] == ["compiled", "unsloth"]


def test_those_that_wait_make_way_for_who_needs_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < REAL_AVAILABLE() < psutil.virtual_memory().total
    box = Box("auto", [GPU, OTHER_GPU], tmp_path)
    box.standbys.tend([])
    for mebibytes, waiting in ((1500, [("compiled", 0)]), (900, []), (1500, []), (9000, [("compiled", 0)])):
        monkeypatch.setattr(standby, "available_bytes", lambda m=mebibytes: m << 20)
        box.standbys.tend([])
        assert box.waiting() == waiting


def test_one_that_imported_other_versions_gets_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(site))
    box = Box("auto", [GPU], tmp_path)
    box.standbys.tend([])
    os.utime(site, (1, 1))
    assert box.standbys.take("compiled", GPU, tmp_path / "a") is None
    box.standbys.tend([])
    assert [started.code for started in box.started] == [-9, None]
    assert box.standbys.take("compiled", GPU, tmp_path / "b") is not None


def test_none_is_started_where_it_is_switched_off_or_the_engine_is_not_installed(tmp_path: Path) -> None:
    for wanted in ("off", "unsloth"):
        box = Box(wanted, [CPU], tmp_path)
        box.standbys.tend([CPU])
        assert box.started == []
