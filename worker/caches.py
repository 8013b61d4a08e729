"""The caches of this machine: what can be made again goes by age and size, and never while it is in use.

Whoever works with a cache holds its lock together with others; whoever removes holds it alone. The lock is
the kernel's and ends with its process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from shared.database import Database
from shared.repository import secrets
from shared.settings import Settings
from worker.removed import Removed
from worker.reservations import size_of
from worker.training.data_cache import evict

COMPILED = "compiled"
OWNERS = "owners"
PREPARED = "prepared"
LOCK = ".lock"
GONE = ".gone-"


@dataclass(frozen=True)
class _Found:
    """Part of a cache: when it was last used (Unix time), and its size."""

    used: float
    path: Path
    bytes: int


def owner_cache(caches: Path, owner: str) -> Path:
    """The owner's own folder for what its token opens on the hub."""
    return caches / OWNERS / hashlib.sha256(owner.encode()).hexdigest()[:32]


def use(cache: Path) -> None:
    """Keep a cache from being removed until this process ends, and note that it was used."""
    cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    number = os.open(_lock_of(cache), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(number, fcntl.LOCK_SH)
    os.utime(number)


def collect_caches(database: Database, settings: Settings, *, dry_run: bool) -> Iterator[Removed]:
    """Remove what is old or too much; with `dry_run` only tell."""
    caches = settings.root / "cache"
    before = None if settings.keep_cache_days is None else time.time() - settings.keep_cache_days * 86_400
    yield from _collect_owners(database, settings, caches, before, dry_run=dry_run)
    for root in (caches / "data", *(caches / OWNERS).glob(f"*/{PREPARED}")):
        for size, why in evict(root, settings.data_cache_bytes, before=before, dry_run=dry_run):
            yield Removed("prepared data", None, why, size)
    with _alone(caches / COMPILED) as free:
        if free:
            yield from bound(caches / COMPILED, settings.compile_cache_bytes, before, dry_run=dry_run)
    yield from _collect_answering(settings, dry_run=dry_run)


def bound(cache: Path, limit: int, before: float | None, *, dry_run: bool) -> Iterator[Removed]:
    """Remove files used before a time, then those used longest ago until at most `limit` bytes are left."""
    found = []
    for file in cache.rglob("*"):
        with suppress(FileNotFoundError):
            seen = file.lstat()
            if not stat.S_ISDIR(seen.st_mode):
                found.append(_Found(max(seen.st_atime, seen.st_mtime), file, seen.st_size))
    removed = _old_or_too_much(found, limit, before)
    for part in removed if not dry_run else ():
        part.path.unlink(missing_ok=True)
        with suppress(OSError):  # others are in it
            part.path.parent.rmdir()
    if removed:
        why = f"{len(removed)} files of them, those used longest ago"
        yield Removed("compiled kernels", None, why, sum(part.bytes for part in removed))


def _collect_owners(
    database: Database, settings: Settings, caches: Path, before: float | None, *, dry_run: bool
) -> Iterator[Removed]:
    """Each owner's own cache goes as a whole: what is in it, only libraries of the hub's know."""
    with database.read() as session:
        names = {owner_cache(caches, o): o for o in secrets.owners_of(session, "hub_token")}
    found = [_Found(_used(path), path, size_of([path])) for path in _folders(caches / OWNERS)]
    old = _old_or_too_much(found, settings.owner_cache_bytes, before)
    for cache in found:
        name = names.get(cache.path)
        if name is not None and cache not in old:
            continue
        with _alone(cache.path) as free:
            if not free:
                continue
            gone = cache.path.with_name(f"{GONE}{cache.path.name}-{os.getpid()}")
            if not dry_run:
                # Renamed first: nobody finds it half gone.
                cache.path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        why = "its owner has no hub token any more" if name is None else f"that of {name}, used longest ago"
        yield Removed("an owner's cache of the hub", None, why, cache.bytes)


def _collect_answering(settings: Settings, *, dry_run: bool) -> Iterator[Removed]:
    """Copies of models for answers, of a process that was killed."""
    folder = settings.root / "cache" / "inference"
    size = size_of([folder])
    if not size:
        return
    with suppress(filelock.Timeout), filelock.FileLock(settings.root / "inference.lock", timeout=0):
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
        yield Removed("models for answers", None, "copies of a process that is gone", size)


def _old_or_too_much(found: list[_Found], limit: int | None, before: float | None) -> list[_Found]:
    """Those used before a time, then those used longest ago until at most `limit` bytes are left."""
    total = sum(part.bytes for part in found)
    gone = []
    for part in sorted(found, key=lambda part: (part.used, part.path)):
        too_much = limit is not None and total > limit
        if not too_much and (before is None or part.used >= before):
            break
        gone.append(part)
        total -= part.bytes
    return gone


def _folders(root: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return []


def _used(cache: Path) -> float:
    with suppress(FileNotFoundError):
        return _lock_of(cache).stat().st_mtime
    return cache.stat().st_mtime


def _lock_of(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}{LOCK}")


@contextmanager
def _alone(cache: Path) -> Iterator[bool]:
    """Whether nobody uses the cache; then nobody begins to, before the block ends."""
    if not cache.is_dir():
        yield False
        return
    with _lock_of(cache).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Who uses it for days uses it now.
            os.utime(lock.fileno())
            yield False
        else:
            yield True
