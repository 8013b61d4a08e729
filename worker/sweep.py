"""Removing the work folders that nobody needs any more."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
import time
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from shared.database import Database
from shared.ids import JOB_ID
from shared.lifecycle import TERMINAL
from shared.repository import exports, leases, queue
from worker.checkpoints import FOLDER
from worker.process import REPORTS
from worker.reservations import RESERVED, notes
from worker.settle import keep_checkpoints

SWEEP_SECONDS = 30.0
# Folders of processes that wait for a job: this, the number of their supervisor, and their own.
STANDBY_PREFIX = "standby-"
# Folders of exports that are made after their job: this, and their token.
EXPORT_PREFIX = "export-"

logger = logging.getLogger(__name__)


class Sweeper:
    """Sweeps on a thread of its own: where many jobs have run are many folders, and no claim waits for it."""

    def __init__(self, database: Database, data: Path) -> None:
        self._database = database
        self._data = data
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Unless it is still at it."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._sweep, name="sweep", daemon=True)
            self._thread.start()

    def join(self, seconds: float) -> None:
        """Wait for it, though not for one that has much to remove: the next process goes on with that."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _sweep(self) -> None:
        try:
            sweep(self._database, self._data / "work")
            sweep_notes(self._database, self._data / "cache" / RESERVED)
        except DBAPIError as error:
            logger.warning("The database is away, nothing is swept: %s", error.orig)
        except Exception:
            # The boundary of this thread: the next one tries again.
            logger.exception("The sweep stumbled")


def sweep(database: Database, work: Path) -> None:
    """Remove the work folders of deleted jobs, of ended ones with nothing left there, and of attempts and
    standbys that nobody runs any more."""
    for folder in work.glob(f"{STANDBY_PREFIX}*"):
        if not _is_running(folder.name.removeprefix(STANDBY_PREFIX).partition("-")[0]):
            remove_in_background(folder)
    # Before the database is asked: an attempt's folder is younger than its claim, so one that is there now
    # and held by nobody then is over, however long this takes.
    found = {f: _entries(f) for f in _entries(work) if f.is_dir() and JOB_ID.fullmatch(f.name)}
    with database.read() as session:
        holders = leases.holders(session, [f.name for f in found])
        exported = {f"{EXPORT_PREFIX}{token}" for token in exports.live_tokens(session)}
    for folder, attempts in found.items():
        if folder.name not in holders:
            remove_in_background(folder)
            continue
        status, token, _ = holders[folder.name]
        if status in TERMINAL and {attempt.name for attempt in attempts} <= {FOLDER}:
            _remove_empty(folder)
            continue
        for attempt in attempts:
            held = attempt.name in (FOLDER, REPORTS) or attempt.name in exported
            held = held or bool(token and attempt.name.endswith(f"-{token}"))
            if not held and _is_old(attempt) and keep_checkpoints(attempt):
                remove_in_background(attempt)


def _remove_empty(folder: Path) -> None:
    """A job's folder in which nothing is left: there would be one for each job that ever was."""
    with contextlib.suppress(OSError):  # It is not empty, or not there.
        (folder / FOLDER).rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def sweep_notes(database: Database, reserved: Path) -> None:
    """Remove the notes of what waited for room and waits no longer."""
    old = {name: note for name, note in notes(reserved).items() if _is_old(note)}
    if not old:
        return
    with database.read() as session:
        queued = queue.still_queued(session, old) | exports.still_queued(session, old)
    for name in old.keys() - queued:
        old[name].unlink(missing_ok=True)


def _entries(folder: Path) -> list[Path]:
    """What is in the folder; several supervisors may sweep one."""
    with contextlib.suppress(FileNotFoundError):
        return list(folder.iterdir())
    return []


def _is_old(path: Path) -> bool:
    """Whether whoever left it has had the time to clean up, or to end what it was about."""
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime > SWEEP_SECONDS
    return False


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
