"""Room on this machine's disks that jobs under way have been promised and have not filled yet, and who waits
for it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

# Where promises are, under the folder of caches.
RESERVED = "reserved"
ALL = "all.lock"
PREFIX = "job-"
WAITS = "waits-"


@dataclass(frozen=True)
class Promise:
    """Room on one disk: `bytes` at most in these folders together."""

    disk: int
    bytes: int
    folders: tuple[str, ...]

    @classmethod
    def of(cls, size: int, folders: Iterable[Path]) -> Self:
        """Of `size` bytes more than the folders hold now; they lie on one disk and may not be there yet."""
        folders = tuple(folders)
        disk = nearest(folders[0]).stat().st_dev
        return cls(disk, max(size, 0) + size_of(folders), tuple(str(folder) for folder in folders))

    def filled_bytes(self) -> int:
        """What is there already."""
        return size_of(Path(folder) for folder in self.folders)


@dataclass
class Taken:
    """Promised bytes of one disk: `open` are still to come, `filled` are there, and may come back."""

    open: int = 0
    filled: int = 0


class Reservation:
    """What one attempt was promised, in a file that it holds locked.

    The lock is the kernel's: a promise ends with the process, however that ends.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder
        with self.alone():
            number, name = tempfile.mkstemp(prefix=PREFIX, dir=folder)
            fcntl.flock(number, fcntl.LOCK_EX)
        self._number, self._path = number, Path(name)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        os.close(self._number)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other attempt of this box looks or reserves meanwhile."""
        with (self._folder / ALL).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def others(self, disk: int) -> Taken:
        """What other attempts have been promised of this disk. Ask `alone`."""
        return _taken(self._folder, self._path)[disk]

    def hold(self, promises: Iterable[Promise]) -> None:
        """Take these in the place of those before.

        Raises:
            OSError: the disk is full.
        """
        text = json.dumps([asdict(promise) for promise in promises])
        os.pwrite(self._number, text.encode().ljust(os.fstat(self._number).st_size), 0)


def put_off(folder: Path, name: str, needs: Mapping[str, int]) -> None:
    """Note what a job or an export waits for, by a folder on each disk.

    Raises:
        OSError: the disk is full.
    """
    note = folder / f"{WAITS}{name}"
    aside = note.with_name(f".{note.name}-{os.getpid()}")
    aside.write_text(json.dumps(needs), encoding="utf-8")
    aside.rename(note)


def notes(folder: Path) -> dict[str, Path]:
    """The notes of what was put off, by its name."""
    return {note.name.removeprefix(WAITS): note for note in folder.glob(f"{WAITS}*")}


def still_put_off(folder: Path) -> set[str]:
    """Names of those that have no room before others end. What would not fit then either waits no longer: it
    is to fail."""
    found = notes(folder)
    if not found:
        return set()
    with (folder / ALL).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Whoever has it may be frozen: a supervisor does not wait for that, and looks again soon.
            return set(found)
        taken = _taken(folder)
    return {name for name, note in found.items() if _waits(note, taken)}


def _waits(note: Path, taken: Mapping[int, Taken]) -> bool:
    needs: dict[str, int] = {}
    with suppress(FileNotFoundError):
        needs = json.loads(note.read_text(encoding="utf-8"))
    short = False
    for folder, size in needs.items():
        place = nearest(Path(folder))
        free, others = free_bytes(place), taken[place.stat().st_dev]
        if size > free + others.filled:
            return False
        short = short or size > free - others.open
    return short


def _taken(folder: Path, but: Path | None = None) -> dict[int, Taken]:
    """By disk; files of the dead are removed."""
    found: dict[int, Taken] = defaultdict(Taken)
    for file in folder.glob(f"{PREFIX}*"):
        if file != but and _is_live(file):
            for promise in _read(file):
                filled = promise.filled_bytes()
                found[promise.disk].open += max(promise.bytes - filled, 0)
                found[promise.disk].filled += filled
    return found


def _is_live(file: Path) -> bool:
    with suppress(FileNotFoundError), file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        file.unlink(missing_ok=True)
    return False


def nearest(folder: Path) -> Path:
    """The folder, or the first of those above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def free_bytes(folder: Path) -> int:
    """Free on its disk, whoever may have been promised it."""
    return shutil.disk_usage(nearest(folder)).free


def size_of(folders: Iterable[Path]) -> int:
    """Bytes of all files in the folders; one with two names counts once."""
    found: dict[tuple[int, int], int] = {}
    for folder in folders:
        for file in folder.rglob("*"):
            with suppress(FileNotFoundError):
                seen = file.lstat()
                if not file.is_dir():
                    found[seen.st_dev, seen.st_ino] = seen.st_size
    return sum(found.values())


def _read(file: Path) -> list[Promise]:
    with suppress(FileNotFoundError):
        text = file.read_text(encoding="utf-8")
        return [Promise(**told | {"folders": tuple(told["folders"])}) for told in json.loads(text or "[]")]
    return []
