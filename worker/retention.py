"""Removing what the settings say is old: checkpoints, model files, logs, caches, and files that no row names.

Never of a job that has not ended or of which something is being made, and never silently: each removal is an
entry in the job's log, and one of the list that `tuneyard gc` prints. Rows go first, then files: what is
interrupted in between is a file without a row, which goes a day later.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from shared.clock import utcnow
from shared.database import Database
from shared.expired import remove_expired
from shared.ids import JOB_ID
from shared.leftovers import leftovers
from shared.lifecycle import TERMINAL
from shared.repository import jobs, logs, retention
from shared.settings import Settings
from shared.storage import Store, StoredFile
from worker.caches import collect_caches
from worker.checkpoints import FOLDER, complete_checkpoints, discard
from worker.copies import remove_copies_of_ended
from worker.removed import Removed

# A file is put into the store before its row is written: younger ones may be about to get theirs.
STRAY_SECONDS = 86_400.0
# What Tuneyard puts into a store; whatever else is there is somebody else's.
OURS = re.compile(r"(jobs|datasets|results|uploads)/")
JOB_OF_KEY = re.compile(rf"(?:jobs|results)/({JOB_ID.pattern})/")
AT_A_TIME = 500
# So few files without a row are no sign of the wrong database.
AT_LEAST = 20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    """One checkpoint of an ended job on this machine."""

    job_id: str
    finished_at: datetime
    step: int
    path: Path
    bytes: int


def collect(
    database: Database, store: Store, settings: Settings, *, dry_run: bool, force: bool = False
) -> list[Removed]:
    """Remove what is old; with `dry_run` only tell what would be removed.

    Args:
        force: remove files without a row even if most of the store's are.
    """
    return [
        *_collect_checkpoints(database, settings, dry_run=dry_run),
        *remove_copies_of_ended(database, store, dry_run=dry_run),
        *_collect_models(database, store, settings, dry_run=dry_run),
        *_cut_logs(database, settings, dry_run=dry_run),
        *_collect_expired(database, store, dry_run=dry_run),
        *_collect_leftovers(settings, dry_run=dry_run),
        *collect_caches(database, settings, dry_run=dry_run),
        *_collect_strays(database, store, dry_run=dry_run, force=force),
        *_collect_unfinished(store, dry_run=dry_run),
    ]


def collect_in_background(database: Database, settings: Settings) -> None:
    """The same, while the caller goes on."""
    threading.Thread(target=_collect_quietly, args=(database, settings), name="gc", daemon=True).start()


def _collect_quietly(database: Database, settings: Settings) -> None:
    try:
        for removed in collect(database, Store(settings.artifacts()), settings, dry_run=False):
            logger.info("Removed %s of %s: %s", removed.what, removed.job_id or "no job", removed.why)
    except Exception:
        # The boundary of this thread: what the database or the store refuse now, they may take in an hour.
        logger.exception("Could not remove what is old")


def _collect_checkpoints(database: Database, settings: Settings, *, dry_run: bool) -> Iterator[Removed]:
    by_job: dict[tuple[str, str], list[_Kept]] = {}
    for kept, why in _old_checkpoints(_checkpoints(database, settings.root / "work"), settings):
        by_job.setdefault((kept.job_id, why), []).append(kept)
    for (job_id, why), group in by_job.items():
        if not _is_unused(database, job_id):
            continue
        if not dry_run:
            steps = {kept.step for kept in group}
            with database.write() as session:
                if retention.lock_unused(session, job_id) is None:
                    continue
                told = [row.step for row in logs.read_checkpoints(session, job_id) if row.step not in steps]
                logs.forget_checkpoints(session, job_id, told)
                named = ", ".join(str(step) for step in sorted(steps))
                retention.tell(session, job_id, f"Checkpoints of steps {named} were removed: {why}.")
            for kept in group:
                discard(kept.path)
        yield Removed("checkpoints", job_id, why, sum(kept.bytes for kept in group))


def _checkpoints(database: Database, work: Path) -> list[_Kept]:
    """The complete checkpoints of ended jobs on this machine, those of the oldest job first."""
    folders = {p.parent.name: p for p in work.glob(f"*/{FOLDER}") if JOB_ID.fullmatch(p.parent.name)}
    found = []
    with database.read() as session:
        for part in _parts(list(folders)):
            for job in jobs.find_jobs(session, part):
                if job.status not in TERMINAL or job.finished_at is None:
                    continue
                for step, path in complete_checkpoints(folders[job.id]).items():
                    found.append(_Kept(job.id, job.finished_at, step, path, _size(path)))
    return sorted(found, key=lambda kept: (kept.finished_at, kept.job_id, kept.step))


def _old_checkpoints(found: list[_Kept], settings: Settings) -> Iterator[tuple[_Kept, str]]:
    """Those to remove and why: by age, beyond a job's last N, then the oldest of what is too much."""
    before = _ago(settings.keep_checkpoint_days)
    newest: dict[str, list[int]] = {}
    for kept in found:
        newest.setdefault(kept.job_id, []).append(kept.step)
    left = []
    for kept in found:
        last = settings.keep_last_checkpoints
        if before is not None and kept.finished_at < before:
            yield kept, f"the job ended more than {settings.keep_checkpoint_days:g} days ago"
        elif last is not None and kept.step not in newest[kept.job_id][-last:]:
            yield kept, f"the last {last} of a job are kept"
        else:
            left.append(kept)
    limit = settings.keep_checkpoint_bytes
    total = sum(kept.bytes for kept in left)
    for kept in left:
        if limit is None or total <= limit:
            return
        total -= kept.bytes
        yield kept, f"{limit} bytes of ended jobs' checkpoints are kept on this machine"


def _collect_models(
    database: Database, store: Store, settings: Settings, *, dry_run: bool
) -> Iterator[Removed]:
    limits = []
    if settings.keep_artifact_days is not None:
        limits.append(f"they are kept for {settings.keep_artifact_days:g} days")
    if settings.keep_artifact_jobs is not None:
        limits.append(f"those of an owner's last {settings.keep_artifact_jobs} jobs are kept")
    why = " and ".join(limits)
    with database.read() as session:
        old = retention.old_models(session, _ago(settings.keep_artifact_days), settings.keep_artifact_jobs)
        sizes = {job_id: retention.model_bytes(session, job_id) for job_id in old}
    for job_id, size in sizes.items():
        if not _is_unused(database, job_id):
            continue
        if not dry_run:
            with database.write() as session:
                keys = retention.remove_model(session, job_id, why)
            if not keys:
                continue
            for key in keys:
                store.delete(key)
        yield Removed("model files", job_id, why, size)


def _cut_logs(database: Database, settings: Settings, *, dry_run: bool) -> Iterator[Removed]:
    with database.read() as session:
        long = retention.long_logs(session, _ago(settings.keep_log_days), settings.keep_log_entries)
    for job_id, keep in long:
        if not _is_unused(database, job_id):
            continue
        why = f"the last {keep} are kept"
        if not dry_run:
            with database.write() as session:
                if not retention.cut_log(session, job_id, keep, why):
                    continue
        yield Removed("log entries", job_id, why, 0)


def _collect_expired(database: Database, store: Store, *, dry_run: bool) -> Iterator[Removed]:
    for gone in remove_expired(database, store, dry_run=dry_run):
        yield Removed(gone.what, None, f"{gone.id} of {gone.owner}", gone.bytes)


def _collect_leftovers(settings: Settings, *, dry_run: bool) -> Iterator[Removed]:
    for path in leftovers(settings.root / "uploads", settings.keep_unfinished_hours):
        size = path.stat().st_size
        if not dry_run:
            path.unlink(missing_ok=True)
        yield Removed("unfinished uploads", None, path.name, size)


def _collect_strays(database: Database, store: Store, *, dry_run: bool, force: bool) -> Iterator[Removed]:
    ours = [file for file in store.list_files() if OURS.match(file.name)]
    old = [file for file in ours if time.time() - file.modified > STRAY_SECONDS]
    with database.read() as session:
        known = {key for part in _parts([f.name for f in old]) for key in retention.known_keys(session, part)}
    stray = [file for file in old if file.name not in known]
    if len(stray) * 2 > len(ours) and len(stray) > AT_LEAST and not force:
        logger.warning(
            "%d of the store's %d files are in no row of this database. Is it the right one, or was it "
            "restored? Nothing of them is removed; `tuneyard gc --force` does.",
            len(stray),
            len(ours),
        )
        return
    for file in stray:
        if not dry_run:
            store.remove_stray(file)
            _tell_of_stray(database, file)
        match = JOB_OF_KEY.match(file.name)
        yield Removed("files without a row", match[1] if match else None, file.name, file.bytes)


def _collect_unfinished(store: Store, *, dry_run: bool) -> Iterator[Removed]:
    for upload in store.unfinished_uploads():
        if OURS.match(upload.name) and time.time() - upload.begun > STRAY_SECONDS:
            if not dry_run:
                store.abort_upload(upload)
            yield Removed("parts of an unfinished file", None, upload.name, 0)


def _tell_of_stray(database: Database, file: StoredFile) -> None:
    match = JOB_OF_KEY.match(file.name)
    if match is None:
        return
    with database.write() as session:
        if jobs.find_jobs(session, [match[1]]):
            name = file.name.rsplit("/", 1)[-1]
            retention.tell(session, match[1], f"{name} of an attempt that was not counted was removed.")


def _is_unused(database: Database, job_id: str) -> bool:
    """Whether it may be looked into at all; what removes asks again, in its own transaction."""
    with database.write() as session:
        return retention.lock_unused(session, job_id) is not None


def _ago(days: float | None) -> datetime | None:
    return None if days is None else utcnow() - timedelta(days=days)


def _size(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def _parts(items: list[str]) -> Iterator[list[str]]:
    """In pieces that a statement takes as parameters."""
    for start in range(0, len(items), AT_A_TIME):
        yield items[start : start + AT_A_TIME]
