"""Prepared data by content: made once, shared between jobs, the least recently used given up first."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as memoize
from pathlib import Path
from typing import Any

import filelock

from shared.events import Control

DEFAULT_BYTES = 50 * 2**30
LOCK_POLL_SECONDS = 0.5
# What a killed job left half made is swept once it is this old.
STALE_SECONDS = 24 * 3600
_CODE = ("shared/data", "worker/training")
_CODE_FILES = (
    "collect.py", "data*.py", "documents.py", "encode.py", "hub_data.py", "packing.py", "template*.py",
    "tokenize.py",
)  # fmt: skip


def key_of(parts: dict[str, Any]) -> str:
    """A name for data that depends on nothing but these parts and the code that prepares it."""
    text = json.dumps({**parts, "code": code_version()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@memoize
def code_version() -> str:
    """Hash of the source files that take part in preparing data."""
    root = Path(__file__).resolve().parents[2]
    files = [*(root / _CODE[0]).glob("*.py")]
    files += [file for pattern in _CODE_FILES for file in (root / _CODE[1]).glob(pattern)]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def cached(
    root: Path, key: str, make: Callable[[Path], None], control: Control, limit: int = DEFAULT_BYTES
) -> Iterator[tuple[Path, bool]]:
    """The folder of that key, filled by `make` if it isn't there yet, and whether it was there.

    Made aside and renamed, under a lock: a folder that is there is complete, and two jobs that want the same
    one make it once. Folders over `limit` bytes in all are given up, the least recently used first, but none
    whose lock somebody holds: a job has it until its files are mapped, and then keeps them.

    Raises:
        JobStopped: while waiting for another job to make it. Whatever `make` raises; nothing is left of it.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    lock = filelock.FileLock(root / f"{key}.lock")
    while True:
        control.check()
        try:
            lock.acquire(timeout=LOCK_POLL_SECONDS)
            break
        except filelock.Timeout:
            continue
    try:
        yield _found_or_made(root, folder, make, limit)
    finally:
        lock.release()


def _found_or_made(root: Path, folder: Path, make: Callable[[Path], None], limit: int) -> tuple[Path, bool]:
    if folder.is_dir():
        os.utime(folder)
        return folder, True
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=root))
    try:
        make(aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    evict(root, limit, keep=folder)
    return folder, False


def evict(
    root: Path, limit: int, *, keep: Path | None = None, before: float | None = None, dry_run: bool = False
) -> list[tuple[int, str]]:
    """Give up folders used before a time (Unix), and the least recently used over `limit` bytes in all.

    Args:
        keep: a folder that stays.

    Returns:
        size and name of each.
    """
    if not root.is_dir():
        return []
    gone = []
    with filelock.FileLock(root / "evict.lock"):
        now = time.time()
        folders: list[tuple[float, Path, int]] = []
        for folder in root.iterdir():
            if not folder.is_dir():
                continue
            try:
                used = folder.stat().st_mtime
            except FileNotFoundError:
                # Another job has just renamed what it made aside.
                continue
            if not folder.name.startswith("."):
                folders.append((used, folder, sum(file.stat().st_size for file in folder.iterdir())))
            elif now - used > STALE_SECONDS and not dry_run:
                shutil.rmtree(folder, ignore_errors=True)
        total = sum(size for *_, size in folders)
        for used, folder, size in sorted(folders):
            if total <= limit and (before is None or used >= before):
                break
            if folder != keep and _give_up(root, folder, dry_run=dry_run):
                total -= size
                gone.append((size, folder.name))
    return gone


def _give_up(root: Path, folder: Path, *, dry_run: bool) -> bool:
    """Remove a folder, unless a job is about to open its files; whether it went, or would go."""
    try:
        with filelock.FileLock(root / f"{folder.name}.lock", timeout=0):
            # Renamed first: nobody may find it half gone.
            if dry_run:
                return True
            gone = folder.rename(root / f".gone-{folder.name}-{os.getpid()}")
    except filelock.Timeout:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
