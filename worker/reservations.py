"""Room on this machine's disks that jobs under way have been promised and have not filled yet."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

ALL = "all.lock"
PREFIX = "job-"


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

    def open_bytes(self) -> int:
        """What is still to come."""
        return max(self.bytes - size_of(Path(folder) for folder in self.folders), 0)


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

    def others(self, disk: int) -> int:
        """Bytes of this disk that are promised to other attempts and still free."""
        return sum(p.open_bytes() for file in self._live() for p in _read(file) if p.disk == disk)

    def hold(self, promises: Iterable[Promise]) -> None:
        """Take these in the place of those before.

        Raises:
            OSError: the disk is full.
        """
        text = json.dumps([asdict(promise) for promise in promises])
        os.pwrite(self._number, text.encode().ljust(os.fstat(self._number).st_size), 0)

    def _live(self) -> Iterator[Path]:
        """The files of others; those of the dead are removed."""
        for file in self._folder.glob(f"{PREFIX}*"):
            if file == self._path:
                continue
            with suppress(FileNotFoundError), file.open("rb") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield file
                else:
                    file.unlink(missing_ok=True)


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
