"""Room on a disk that is promised: counted by others until it is filled, and gone with its process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from worker.reservations import Promise, Reservation, size_of

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
    assert other.others(disk) == 1000
    assert other.others(disk + 1) == mine.others(disk) == 0
    store.mkdir()
    (store / "file").write_bytes(b"f" * 300)
    (store / "same").hardlink_to(store / "file")
    assert size_of([work, store]) == 400
    assert other.others(disk) == 700
    (store / "more").write_bytes(b"f" * 900)
    assert other.others(disk) == 0
    mine.hold([Promise.of(50, [work])])
    assert other.others(disk) == 50
    mine.close()
    assert other.others(disk) == 0
    other.close()
    assert [file.name for file in (tmp_path / "reserved").iterdir()] == ["all.lock"]


def test_a_promise_ends_with_a_killed_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        mine = Reservation(tmp_path / "reserved")
        assert mine.others(tmp_path.stat().st_dev) == 5000
        holder.kill()
        holder.wait()
        assert mine.others(tmp_path.stat().st_dev) == 0
        mine.close()
