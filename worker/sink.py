"""The event sink of a running job: batches its writes to the database on a thread of its own.

Every write is guarded by the attempt's lease token. An attempt that has lost its lease writes nothing more
and is ended through `on_lost`.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.exc import DBAPIError

from shared.clock import utcnow
from shared.database import Database, Session
from shared.errors import JobFailure, LeaseLost, OutOfMemory
from shared.events import Artifact, Checkpoint, Entry, Progress
from shared.lifecycle import JobStatus, Phase
from shared.queue import Doorbell
from shared.repository import copies, files, logs
from shared.repository.jobs import get_job
from shared.repository.retention import known_keys
from shared.storage import Store
from shared.tables import ArtifactRow, CheckpointCopy, DatasetRow
from shared.vault import Redactor
from worker.checkpoints import complete_checkpoints
from worker.lease import Lease
from worker.results import publish_results

FLUSH_SECONDS = 0.05
RETRY_SECONDS = 0.5
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class _Batch:
    """What has been told since the last commit.

    `last_seq` is that of its last entry, from a transaction of which nobody knows whether it was committed.
    """

    entries: list[Entry] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    last_seq: int | None = None

    def __bool__(self) -> bool:
        return bool(self.entries or self.rows or self.checkpoints or self.changes)


class DatabaseSink:
    """Writes the events of one attempt at a job or an export; also keeps its lease alive for as long as this
    process runs."""

    def __init__(
        self,
        database: Database,
        store: Store,
        doorbell: Doorbell,
        lease: Lease,
        lease_seconds: float,
        on_lost: Callable[[], None],
        redactor: Redactor | None = None,
    ) -> None:
        self._database = database
        self._store = store
        self._doorbell = doorbell
        self._held = lease
        self._job_id = lease.job_id
        self._lease = timedelta(seconds=lease_seconds)
        self._on_lost = on_lost
        self._redactor = redactor or Redactor(())
        # Is told of every checkpoint, and must not wait for anything.
        self.on_checkpoint: Callable[[Checkpoint], None] = lambda _checkpoint: None
        self._batch = _Batch()
        self._results: DatasetRow | None = None
        self._lock = threading.Lock()  # guards _batch; held for no longer than an append
        self._writing = threading.Lock()  # one transaction at a time, in the order told
        self._wake = threading.Event()
        self._closing = False
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="sink", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def log(self, entry: Entry) -> None:
        with self._lock:
            self._batch.entries.append(self._entry(entry))
        self._wake.set()

    def phase(self, phase: Phase) -> None:
        with self._lock:
            self._batch.changes["phase"] = phase
            self._batch.entries.append(
                Entry(phase.replace("_", " ").capitalize() + ".", type="phase", data={"phase": phase})
            )
        self._wake.set()

    def metrics(self, row: dict[str, float | int | None]) -> None:
        with self._lock:
            self._batch.rows.append(storable(row))
        self._wake.set()

    def progress(self, progress: Progress) -> None:
        with self._lock:
            self._batch.changes["progress"] = storable(asdict(progress))
        self._wake.set()

    def data_report(self, report: dict[str, Any]) -> None:
        with self._lock:
            self._batch.changes["data_report"] = self._redactor.value(storable(report))
        self._wake.set()

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        with self._lock:
            self._batch.checkpoints.append(replace(checkpoint, metrics=storable(checkpoint.metrics)))
        self._wake.set()
        self.on_checkpoint(checkpoint)

    def artifact(self, artifact: Artifact) -> None:
        """Publish a complete file: into the store, then, if the lease still holds, into the table.

        Raises:
            LeaseLost: the file is not published.
        """
        key = f"jobs/{self._job_id}/{self._held.token}/{artifact.name}"
        self._store.publish(artifact.path, key)
        row = ArtifactRow(
            job_id=self._job_id,
            name=artifact.name,
            kind=artifact.kind,
            bytes=artifact.bytes,
            sha256=artifact.sha256,
            key=key,
            listed=artifact.listed,
        )
        ready = "is ready" if artifact.listed else "is kept for later exports"
        entry = Entry(
            f"{artifact.name} {ready}: {artifact.bytes} bytes.",
            data={"artifact": artifact.name, "kind": artifact.kind, "bytes": artifact.bytes},
        )

        def write(session: Session) -> str | None:
            # A row of its own at each try: one that may have been committed is no new one.
            return files.put_artifact(session, ArtifactRow(**row.model_dump()))

        earlier = self._commit_file(key, write, entry)
        if earlier is not None:
            self._store.delete(earlier)

    def checkpoint_copy(self, copy: CheckpointCopy, *entries: Entry) -> None:
        """Make a file that is in the store the copy of the job's newest checkpoint; the one before goes.

        Raises:
            LeaseLost: the file is removed.
        """
        earlier = self._commit_file(copy.key, lambda session: copies.put_copy(session, copy), *entries)
        if earlier is not None:
            with suppress(OSError):  # Without a row it goes a day later.
                self._store.delete(earlier)

    def _commit_file(self, key: str, write: Callable[[Session], str | None], *entries: Entry) -> str | None:
        """Write the row of a file that is in the store, or remove the file; the key whose place it took."""
        try:
            earlier = self._commit(write, *(self._entry(entry) for entry in entries))
        except BaseException:
            # Without its row the file is nobody's. The lease may have been lost after a commit whose answer
            # never came.
            with self._database.read() as session:
                known = known_keys(session, [key])
            if not known:
                self._store.delete(key)
            raise
        return None if earlier == key else earlier

    def results(self, folder: Path) -> None:
        """Publish the job's metrics as a file of its owner's, which is there once the job has succeeded.

        Raises:
            LeaseLost: another attempt has the job.
            OSError: the disk or the store refused.
        """
        rows, owner = self._commit(self._measured)
        self._results = publish_results(rows, self._job_id, self._held.token, owner, folder, self._store)

    def _measured(self, session: Session) -> tuple[list[dict[str, Any]], str]:
        return logs.read_metrics(session, self._job_id), get_job(session, self._job_id, None).owner

    def finish(self, status: JobStatus, entry: Entry, failure: JobFailure | None = None) -> None:
        """Write what is left and end the job, in one transaction.

        A job that was cancelled while it ended otherwise keeps the ending that really happened.

        Raises:
            LeaseLost: another attempt has the job.
        """
        self._stop_thread()
        recorded = self._recorded(failure) if failure else None
        last = self._entry(entry)

        def write(session: Session) -> None:
            self._held.finish(session, status, last, recorded)
            if status == JobStatus.SUCCEEDED and self._results is not None:
                files.add_file(session, DatasetRow(**self._results.model_dump()))

        self._commit(write)

    def give_back(self, why: str) -> None:
        """End this attempt without ending the job: cancelled if that was asked for, else queued again.

        Raises:
            LeaseLost: another attempt has the job.
        """
        self._stop_thread()
        self._commit(lambda session: self._held.give_back(session, why))

    def lose(self, why: str, max_losses: int) -> None:
        """End this attempt as one whose process died: queued again, or failed when that was the last time.

        Raises:
            LeaseLost: another attempt has the job.
        """
        self._stop_thread()
        self._commit(lambda session: self._held.lose(session, why, max_losses))

    def run_out_of_memory(self, failure: OutOfMemory) -> None:
        """End this attempt, and the job if no cheaper plan is left to try.

        Raises:
            LeaseLost: another attempt has the job.
        """
        self._stop_thread()
        recorded = self._recorded(failure)
        self._commit(
            lambda session: self._held.run_out_of_memory(
                session, recorded["message"], of_machine=failure.of_machine
            )
        )

    def _stop_thread(self) -> None:
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(timeout=self._lease.total_seconds() / 4)
            self._wake.clear()
            try:
                self._flush()
            except LeaseLost:
                self._on_lost()
                return
            except Exception:
                # Whatever could not be written is lost, but the lease must be renewed all the same.
                logger.exception("Some entries of the log could not be written")
            # What is told meanwhile is written together: at most 1 / FLUSH_SECONDS commits a second.
            time.sleep(FLUSH_SECONDS)

    def _flush(self) -> None:
        due = time.monotonic() - self._renewed > self._lease.total_seconds() / 4
        with self._lock:
            pending = bool(self._batch)
        if pending or due:
            self._commit(lambda _session: None)

    def _commit(self, write: Callable[[Session], T], *more: Entry) -> T:
        """Write all that was told so far, `more`, and then `write`, in one guarded transaction.

        A database that is locked or away is tried again until the lease is lost to another.
        """
        with self._writing:
            with self._lock:
                batch, self._batch = self._batch, _Batch()
            batch.entries += more
            while True:
                try:
                    result = self._write(batch, write)
                    break
                except DBAPIError as error:
                    if not _is_passing(error):
                        raise
                    logger.warning("The database did not take the log, trying again: %s", error.orig)
                    time.sleep(RETRY_SECONDS)
        self._doorbell.tell(self._job_id)
        return result

    def _write(self, batch: _Batch, write: Callable[[Session], T]) -> T:
        with self._database.write() as session:
            held = self._held.hold(session)
            held.lease_expires_at = utcnow() + self._lease
            for name, value in batch.changes.items():
                setattr(held, name, value)
            session.flush()
            if batch.entries and not self._is_written(session, batch):
                batch.last_seq = self._held.log(session, batch.entries)
            logs.put_metrics(session, self._job_id, batch.rows)
            for checkpoint in batch.checkpoints:
                there = complete_checkpoints(checkpoint.path.parent)
                logs.put_checkpoint(session, self._job_id, checkpoint, [*there, checkpoint.step])
            result = write(session)
        self._renewed = time.monotonic()
        return result

    def _is_written(self, session: Session, batch: _Batch) -> bool:
        """Whether a commit that failed was none: a connection may break before the answer comes."""
        if batch.last_seq is None:
            return False
        found = logs.read_entries(session, self._job_id, batch.last_seq - 1, 1)
        last = batch.entries[-1]
        return [(entry.time, entry.message) for entry in found] == [(last.time, last.message)]

    def _recorded(self, failure: JobFailure) -> dict[str, Any]:
        told = {"code": failure.code, "message": failure.message, "advice": failure.advice}
        found: dict[str, Any] = self._redactor.value(storable(told))
        return found

    def _entry(self, entry: Entry) -> Entry:
        message, data = (self._redactor.value(storable(part)) for part in (entry.message, entry.data))
        return replace(entry, message=message, data=data)


def storable(value: Any) -> Any:
    """The value as every database takes it: no NaN or infinity, no NUL and no lone surrogate."""
    if isinstance(value, dict):
        return {storable(str(key)): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", value)
    return value


def _is_passing(error: DBAPIError) -> bool:
    """Whether trying again may help: the database is locked, full or not reachable."""
    return error.connection_invalidated or type(error).__name__ == "OperationalError"
