"""Removing the work folders that nobody needs any more."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import threading
import time
from pathlib import Path

from shared.database import Database
from shared.ids import JOB_ID
from shared.repository import exports, leases
from worker.checkpoints import FOLDER, move_checkpoints
from worker.process import REPORTS

SWEEP_SECONDS = 30.0
# Folders of processes that wait for a job: this, the number of their supervisor, and their own.
STANDBY_PREFIX = "standby-"
# Folders of exports that are made after their job: this, and their token.
EXPORT_PREFIX = "export-"

logger = logging.getLogger(__name__)


def sweep(database: Database, work: Path) -> None:
    """Remove the work folders of deleted jobs, and of attempts and standbys that nobody runs any more."""
    for folder in work.glob(f"{STANDBY_PREFIX}*"):
        if not _is_running(folder.name.removeprefix(STANDBY_PREFIX).partition("-")[0]):
            remove_in_background(folder)
    folders = [f for f in work.iterdir() if f.is_dir() and JOB_ID.fullmatch(f.name)]
    with database.read() as session:
        holders = leases.holders(session, [f.name for f in folders])
        exported = {f"{EXPORT_PREFIX}{token}" for token in exports.live_tokens(session)}
    for folder in folders:
        if folder.name not in holders:
            remove_in_background(folder)
            continue
        token = holders[folder.name].token
        for attempt in folder.iterdir():
            held = attempt.name in (FOLDER, REPORTS) or attempt.name in exported
            held = held or bool(token and attempt.name.endswith(f"-{token}"))
            # A claim that is newer than what was read of it above has a new folder.
            if not held and time.time() - attempt.stat().st_mtime > SWEEP_SECONDS:
                _keep_checkpoints(attempt)
                remove_in_background(attempt)


def _keep_checkpoints(attempt: Path) -> None:
    """What an attempt left whose supervisor died with it."""
    try:
        move_checkpoints(attempt / FOLDER, attempt.parent / FOLDER)
    except OSError as error:
        logger.error("The checkpoints in %s could not be kept: %s", attempt, error)


def bound(cache: Path, limit: int) -> None:
    """Remove the files used longest ago until at most `limit` bytes are left, and emptied folders."""
    found = []
    for file in cache.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            seen = file.lstat()
            if not stat.S_ISDIR(seen.st_mode):
                found.append((max(seen.st_atime, seen.st_mtime), file, seen.st_size))
    total = sum(size for *_, size in found)
    for _, file, size in sorted(found):
        if total <= limit:
            break
        file.unlink(missing_ok=True)
        total -= size
        with contextlib.suppress(OSError):  # others are in it
            file.parent.rmdir()


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError):
        return False
    return True


def remove_in_background(folder: Path) -> None:
    """A merged model takes seconds to remove, and nothing waits for it."""
    threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
