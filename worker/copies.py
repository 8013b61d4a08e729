"""Copies of checkpoints in the store, for the attempt that begins on another machine.

The newest complete checkpoint of an attempt is copied by a thread of its own, as one tar; the row that names
the tar is written under the attempt's lease. Nothing of it holds up training or fails a job.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from shared.database import Database
from shared.disk import DiskNeed
from shared.errors import JobStopped, LeaseLost
from shared.events import Checkpoint, Entry
from shared.repository import copies
from shared.settings import Settings
from shared.storage import CHUNK, Store, StoreUnavailable
from shared.tables import CheckpointCopy
from worker.checkpoints import FOLDER, checkpoint_folder, complete_checkpoints
from worker.order import Order
from worker.removed import Removed
from worker.reservations import size_of
from worker.sink import DatabaseSink
from worker.training.exports.files import HashingWriter
from worker.training.room import Room
from worker.training.workdir import Workdir

# How long an attempt that ends waits for the thread to drop what it is about.
GIVE_UP_SECONDS = 1.0
LOOK_SECONDS = 0.1
FETCHED = ".fetched"

logger = logging.getLogger(__name__)


class _UnusableError(Exception):
    """Why a copy can't be gone on from."""


class _GivenUpError(Exception):
    """The attempt ends, and what is half copied is of no use."""


class _GivingUp:
    """A control that stops the writing of a tar."""

    def __init__(self) -> None:
        self._set = threading.Event()

    def give_up(self) -> None:
        self._set.set()

    def check(self) -> None:
        if self._set.is_set():
            raise _GivenUpError


def wanted(settings: Settings, store: Store) -> bool:
    """Whether checkpoints are copied: by default where the store is on no disk of this machine."""
    chosen = settings.store_checkpoints
    return chosen == "on" or (chosen == "auto" and store.folder() is None)


class Copies:
    """Copies the newest checkpoint of one attempt each time that there is another one.

    It begins with what the attempt took over, if the store does not have that. One that comes while another
    is copied is next, unless a newer one comes before that. A failure is told in the job's log once, and
    tried again with the next checkpoint.

    Args:
        copied: the step that the store has already, if this attempt has the very same checkpoint.
    """

    def __init__(self, order: Order, store: Store, sink: DatabaseSink, copied: int | None) -> None:
        self._store = store
        self._sink = sink
        self._job_id, self._token = order.job_id, order.token
        self._folder = Path(order.workdir) / FOLDER
        self._copied = _mark(checkpoint_folder(self._folder, copied)) if copied is not None else None
        self._works: bool | None = None
        self._giving_up = _GivingUp()
        self._changed = threading.Condition()
        self._busy = self._ended = False
        self._pending = copied is None
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)
        self._thread.start()

    def offer(self, _checkpoint: Checkpoint) -> None:
        """There is another checkpoint."""
        with self._changed:
            self._pending = True
            self._changed.notify_all()

    def end(self, until: Callable[[], float]) -> None:
        """Let the newest checkpoint be copied until then (monotonic, asked again and again), and give up what
        is not done."""
        with self._changed:
            while (unfinished := self._pending or self._busy) and time.monotonic() < until():
                self._changed.wait(LOOK_SECONDS)
            self._ended = True
            self._changed.notify_all()
        self._giving_up.give_up()
        self._thread.join(GIVE_UP_SECONDS)
        if unfinished and until():
            self._tell_of_failure("there was no time left for it")

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._ended)
                if self._ended:
                    return
                self._pending, self._busy = False, True
            try:
                self._copy_newest()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _copy_newest(self) -> None:
        try:
            self._copy()
        except _GivenUpError:
            return
        except LeaseLost:
            return  # The sink's own thread ends this process.
        except Exception as error:
            # The boundary of this thread: whatever the store refuses, the job goes on.
            logger.exception("A checkpoint could not be copied into the store")
            # An error may name the store's address, and users read the last line of a process that dies.
            logger.warning("The job goes on without that copy.")
            self._tell_of_failure(f"{_reason(error)}. It is tried again with the next one")

    def _copy(self) -> None:
        there = complete_checkpoints(self._folder)
        if not there:
            return
        step, path = max(there.items())
        with ExitStack() as opened:
            try:
                mark = _mark(path)
                if mark == self._copied:
                    return
                files = _open_all(path, opened)
            except FileNotFoundError:
                return  # It has just made way for another one, which is told of.
            copy = self._write(step, files)
        self._sink.checkpoint_copy(copy, *self._news(copy))
        self._copied, self._works = mark, True

    def _write(self, step: int, files: list[tuple[str, IO[bytes]]]) -> CheckpointCopy:
        # Of a name that no file in the store has had: what another row names is never written over.
        key = f"jobs/{self._job_id}/{self._token}/checkpoint-{step}-{secrets.token_hex(4)}.tar"
        with self._store.writing(key) as stream:
            writer = HashingWriter(stream, self._giving_up)
            for name, file in files:
                _add(writer, name, file)
            writer.write(bytes(2 * tarfile.BLOCKSIZE))
        digest = writer.digest.hexdigest()
        return CheckpointCopy(job_id=self._job_id, step=step, bytes=writer.bytes, sha256=digest, key=key)

    def _news(self, copy: CheckpointCopy) -> list[Entry]:
        """For the log: the first one, and the first one after a failure."""
        if self._works:
            return []
        text = (
            f"The checkpoint of step {copy.step} is in the store: another machine could go on from it. Each "
            "newer one takes its place, and the last goes when the job ends."
        )
        return [Entry(text, data={"step": copy.step, "bytes": copy.bytes})]

    def _tell_of_failure(self, why: str) -> None:
        if self._works is False:
            return
        self._works = False
        text = (
            f"The newest checkpoint was not copied into the store: {why}. Another machine would go on from "
        )
        self._sink.log(Entry(f"{text}an earlier one, or begin anew.", level="warning"))


@contextmanager
def copying(
    order: Order,
    settings: Settings,
    store: Store,
    sink: DatabaseSink,
    copied: int | None,
    until: Callable[[], float],
) -> Iterator[None]:
    """Copies what is told to the sink, where that is wanted.

    Args:
        copied: as `Copies` has it.
        until: when (monotonic) an attempt that leaves its job to another one must have ended the last copy.
    """
    if not wanted(settings, store):
        yield
        return
    running = Copies(order, store, sink, copied)
    sink.on_checkpoint = running.offer
    leaves = False
    try:
        yield
    except JobStopped:
        leaves = True
        raise
    finally:
        running.end(until if leaves else lambda: 0.0)


def fetch_copy(order: Order, database: Database, store: Store, sink: DatabaseSink, cache: Path) -> int | None:
    """Put the copy in the store beside an attempt's checkpoints, if those are older or there are none.

    Args:
        cache: the machine's folder of caches, where attempts have disk room promised.

    Returns:
        the copy's step if the attempt has that checkpoint now.

    Raises:
        JobFailure: `out_of_disk`: it would not fit without other jobs either.
        NoRoomYet: its room is promised to other jobs.
        StoreUnavailable: it did not answer for as long as the store is waited for.
        OSError: the disk is full.
    """
    with database.read() as session:
        copy = copies.find_copy(session, order.job_id)
    if copy is None:
        return None
    folder = Path(order.workdir) / FOLDER
    newest = max(complete_checkpoints(folder), default=-1)
    if newest >= copy.step:
        return copy.step if checkpoint_folder(folder, copy.step).is_dir() else None
    which = f"The checkpoint of step {copy.step}"
    try:
        with Room(Workdir(root=folder.parent, cache=cache), sink) as room:
            room.reserve(_room_for(copy, store, folder))
            _unpack(copy, store, folder)
    except FileNotFoundError:
        sink.log(Entry(f"{which} is gone from the store.", level="warning"))
    except (_UnusableError, tarfile.TarError):
        sink.log(Entry(f"{which} in the store can't be used: it is not what was written.", level="warning"))
    else:
        sink.log(Entry(f"{which} came from the store.", data={"step": copy.step, "bytes": copy.bytes}))
        return copy.step
    return None


def remove_copies_of_ended(database: Database, store: Store, *, dry_run: bool) -> Iterator[Removed]:
    """Rows first: what is interrupted in between leaves a file without a row."""
    with database.read() as session:
        found = copies.copies_of_ended(session)
    for copy in found:
        if not dry_run:
            with database.write() as session:
                key = copies.forget_copy(session, copy.job_id)
            if key is None:
                continue
            store.delete(key)
        yield Removed("checkpoint in the store", copy.job_id, "the job has ended", copy.bytes)


def remove_in_background(database: Database, settings: Settings) -> None:
    """The same, while the caller goes on."""
    with database.read() as session:
        if not copies.copies_of_ended(session):
            return
    threading.Thread(target=_remove_quietly, args=(database, settings), name="copies", daemon=True).start()


def _remove_quietly(database: Database, settings: Settings) -> None:
    try:
        for removed in remove_copies_of_ended(database, Store(settings.artifacts()), dry_run=False):
            logger.info("Removed the %s of %s: %s", removed.what, removed.job_id, removed.why)
    except Exception:
        # The boundary of this thread: what the store refuses now has no row any more, and goes a day later.
        logger.exception("Could not remove checkpoints of ended jobs from the store")


def _open_all(folder: Path, opened: ExitStack) -> list[tuple[str, IO[bytes]]]:
    """All files of a checkpoint by name: they can be read to their ends even if it is removed meanwhile.

    Raises:
        FileNotFoundError: it was removed, before or as they were opened.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if not paths:
        raise FileNotFoundError(folder)
    return [(p.relative_to(folder).as_posix(), opened.enter_context(p.open("rb"))) for p in paths]


def _add(tar: HashingWriter, name: str, file: IO[bytes]) -> None:
    """tarfile's own streams pass everything on in pieces of 10 KB: each of them would want Python's lock,
    which training needs too."""
    info = tarfile.TarInfo(name)
    info.size = os.fstat(file.fileno()).st_size
    tar.write(info.tobuf())
    shutil.copyfileobj(file, tar, CHUNK)
    tar.write(bytes(-info.size % tarfile.BLOCKSIZE))


def _mark(folder: Path) -> tuple[str, int]:
    """Tells a checkpoint from another one of the same step."""
    return folder.name, folder.stat().st_mtime_ns


def _room_for(copy: CheckpointCopy, store: Store, folder: Path) -> DiskNeed:
    """The checkpoint's and, until that is unpacked, the tar's; beside what the folder has."""
    size = copy.bytes if store.folder() is not None else 2 * copy.bytes
    return DiskNeed(size_of([folder]) + size, copy.bytes, 0, 0, 0, {}, 0)


def _unpack(copy: CheckpointCopy, store: Store, folder: Path) -> None:
    """Fetch the tar, check it, and let its checkpoint appear."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tar, aside = folder / f"{FETCHED}.tar", folder / FETCHED
    try:
        found = store.fetch(copy.key, tar)
        # Before anything in it is looked at.
        with found.open("rb") as stream:
            if os.fstat(stream.fileno()).st_size != copy.bytes:
                raise _UnusableError
            if hashlib.file_digest(stream, "sha256").hexdigest() != copy.sha256:
                raise _UnusableError
            stream.seek(0)
            _extract(stream, aside)
        aside.rename(checkpoint_folder(folder, copy.step))
    finally:
        tar.unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)


def _extract(stream: IO[bytes], target: Path) -> None:
    """Plain files alone, and none outside the folder."""
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            name = PurePosixPath(info.name)
            source = tar.extractfile(info) if info.isreg() else None
            if source is None or name.is_absolute() or ".." in name.parts:
                raise _UnusableError
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with path.open("wb") as file:
                shutil.copyfileobj(source, file, CHUNK)


def _reason(error: Exception) -> str:
    """In words that name no address: users read it."""
    if isinstance(error, StoreUnavailable):
        return "it does not answer"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return "it was refused"
