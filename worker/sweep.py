"""Removing the work folders that nobody needs any more."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

from shared.database import Database
from shared.ids import JOB_ID
from shared.repository import leases
from worker.settle import CHECKPOINTS

SWEEP_SECONDS = 30.0


def sweep(database: Database, work: Path) -> None:
    """Remove the work folders of jobs that were deleted, and of attempts that nobody runs any more."""
    folders = [f for f in work.iterdir() if f.is_dir() and JOB_ID.fullmatch(f.name)]
    with database.read() as session:
        holders = leases.holders(session, [f.name for f in folders])
    for folder in folders:
        if folder.name not in holders:
            remove_in_background(folder)
            continue
        _, token = holders[folder.name]
        for attempt in folder.iterdir():
            held = attempt.name == CHECKPOINTS or (token and attempt.name.endswith(f"-{token}"))
            # A claim that is newer than what was read of it above has a new folder.
            if not held and time.time() - attempt.stat().st_mtime > SWEEP_SECONDS:
                remove_in_background(attempt)


def remove_in_background(folder: Path) -> None:
    """A merged model takes seconds to remove, and nothing waits for it."""
    threading.Thread(target=shutil.rmtree, args=(folder, True)).start()
