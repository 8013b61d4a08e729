"""Where uploaded datasets and artifacts are kept: a folder, or any fsspec URL.

Keys are made by Tuneyard from ids and fixed names, never from a request. A file appears under its key
only when it is complete.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec

try:
    from botocore.exceptions import BotoCoreError
except ImportError:  # without the extra `s3`

    class BotoCoreError(Exception):  # type: ignore[no-redef]
        """Nothing raises it."""


CHUNK = 1 << 20
# What is asked of a store on the network at a time.
READ_AHEAD = 8 << 20
# The variables that botocore takes an account from, and what s3fs calls them.
ACCOUNT = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": "token"}
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
# s3fs tries five times within a second, which is enough: botocore's own tries on top make it seven.
S3_CONNECTIONS = {"connect_timeout": 3, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
# What a store says that has too much to do, or a fault.
OVERLOADED = frozenset({errno.EBUSY, errno.EREMOTEIO})
AWAY_SECONDS = 1.0

T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """A file as the store lists it: its key, if it is a complete one. `modified` is a Unix time."""

    name: str
    bytes: int
    modified: float


@dataclass(frozen=True)
class UnfinishedUpload:
    """Parts of a file that is not there yet: its key, and since when (Unix time) they come."""

    name: str
    upload_id: str
    begun: float


class StoreUnavailable(OSError):
    """The store on the network does not answer. Says nothing of its address: users read it."""


class Store:
    """Files under one fsspec URL.

    `account` has the variables of ACCOUNT for a process whose environment has none of them. Methods raise
    OSError where the disk or the store refuses, StoreUnavailable where it does not answer: `publish` and
    `fetch` only after trying again for `patience` seconds, of which they tell once, by `on_away`.
    """

    def __init__(
        self,
        url: str,
        account: Mapping[str, str] | None = None,
        patience: float = 0,
        on_away: Callable[[], None] | None = None,
    ) -> None:
        self._patience = patience
        self._on_away = on_away
        options: dict[str, Any] = {ACCOUNT[name]: value for name, value in (account or {}).items()}
        if url.startswith("s3:"):
            options["config_kwargs"] = S3_CONNECTIONS
        # Other processes change the store too, so what was listed once is no knowledge; and fsspec would give
        # out the file system that it made for this URL first, with the account that it had then.
        self._fs, self._root = fsspec.core.url_to_fs(
            url, use_listings_cache=False, skip_instance_cache=True, **options
        )
        self._base = self._root.rstrip("/")
        self._local = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )
        if self._local:
            Path(self._root).mkdir(parents=True, exist_ok=True, mode=0o700)

    def publish(self, source: Path, key: str) -> None:
        """Move a complete local file into the store under `key`; it appears there whole or not at all.

        Raises:
            OSError: the store or the disk refused.
        """
        target = self._path(key)
        if not self._local:
            self._patiently(lambda: self._fs.put_file(str(source), target))
            source.unlink()
            return
        destination = Path(target)
        destination.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync(source)
        try:
            source.rename(destination)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_across(source, destination)
        sync(destination.parent)

    @contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        """A file to write: it appears under `key` once the block has ended, and not at all if that raises.

        Nothing is tried again, and READ_AHEAD bytes or so are held in memory.

        Raises:
            OSError: the store or the disk refused.
        """
        target = self._path(key)
        written = self._written_locally(Path(target)) if self._local else self._written_remotely(target)
        with _reached(), written as file:
            yield file

    @contextmanager
    def _written_locally(self, destination: Path) -> Iterator[IO[bytes]]:
        destination.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = destination.with_name(f".{destination.name}.part")
        try:
            with aside.open("wb") as file:
                yield file
            sync(aside)
            aside.rename(destination)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        sync(destination.parent)

    @contextmanager
    def _written_remotely(self, target: str) -> Iterator[IO[bytes]]:
        # Closing a file is to fsspec completing it, whatever led to that: only without autocommit it isn't.
        file = self._fs.open(target, "wb", block_size=READ_AHEAD, autocommit=False)
        try:
            yield file
            file.close()
            file.commit()
        except BaseException:
            with suppress(AttributeError):  # Files of some file systems are never written by a close.
                file.closed = True
            with suppress(OSError, BotoCoreError):  # What is left of it goes as other unfinished files do.
                file.discard()
            raise

    def fetch(self, key: str, target: Path) -> Path:
        """A local path to the file: itself in a local store, else a copy at `target`.

        Raises:
            FileNotFoundError: no such key.
        """
        if self._local:
            found = Path(self._path(key))
            if not found.is_file():
                raise FileNotFoundError(key)
            return found
        self._patiently(lambda: self._fs.get_file(self._path(key), str(target)))
        return target

    def read(self, key: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes from `start` up to and without `end`, in chunks of at most 1 MiB.

        Raises:
            FileNotFoundError: no such key.
        """
        block = CHUNK if self._local else READ_AHEAD
        with _reached(), self._fs.open(self._path(key), "rb", block_size=block) as file:
            file.seek(start)
            left = end - start
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def delete(self, key: str) -> None:
        """Delete a file; one that is gone already is no error."""
        with _reached(), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def delete_tree(self, prefix: str) -> None:
        """Delete all files whose keys begin with `prefix`/."""
        path = self._path(prefix)
        with _reached(), suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    def list_files(self) -> Iterator[StoredFile]:
        """Everything in the store, also what is no complete file of ours."""
        with _reached():
            found = self._fs.find(self._base, detail=True)
        for path, info in found.items():
            made = info.get("mtime") or info.get("LastModified") or info.get("created")
            seconds = made.timestamp() if isinstance(made, datetime) else float(made or time.time())
            yield StoredFile(path.removeprefix(self._base).lstrip("/"), int(info["size"] or 0), seconds)

    def remove_stray(self, file: StoredFile) -> None:
        """Delete a file that `list_files` told of; one that is gone already is no error."""
        with _reached(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._base}/{file.name}")

    def unfinished_uploads(self) -> Iterator[UnfinishedUpload]:
        """The multipart uploads under this URL: an S3-compatible store keeps the parts of those that were
        killed for ever, where no list of files shows them."""
        if "s3" not in self._fs.protocol:
            return
        bucket, _, prefix = f"{self._base}/".partition("/")
        with _reached():
            found = self._fs.list_multipart_uploads(bucket)
        for upload in found:
            if upload["Key"].startswith(prefix):
                name = upload["Key"].removeprefix(prefix)
                yield UnfinishedUpload(name, upload["UploadId"], upload["Initiated"].timestamp())

    def abort_upload(self, upload: UnfinishedUpload) -> None:
        """Remove its parts; one that has ended since is no error."""
        bucket, _, prefix = f"{self._base}/".partition("/")
        with _reached(), suppress(FileNotFoundError):
            self._fs.abort_mpu(bucket, f"{prefix}{upload.name}", upload.upload_id)

    def is_writable(self) -> bool:
        """Whether a small file can be written, for the readiness check."""
        path = f"{self._base}/.ready-{os.getpid()}"
        try:
            with _reached():
                self._fs.pipe_file(path, b"")
                self._fs.rm_file(path)
        except OSError:
            return False
        return True

    def free_bytes(self) -> int | None:
        """Free space of a local store; None where the store has no such limit."""
        return shutil.disk_usage(self._root).free if self._local else None

    def folder(self) -> Path | None:
        """Where a local store is; None for others."""
        return Path(self._root) if self._local else None

    def _patiently(self, act: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience
        told = False
        while True:
            try:
                with _reached():
                    return act()
            except StoreUnavailable:
                if time.monotonic() >= deadline:
                    raise
            if self._on_away and not told:
                self._on_away()
                told = True
            time.sleep(AWAY_SECONDS)

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"not a store key: {key!r}")
        return f"{self._base}/{key}"


@contextmanager
def _reached() -> Iterator[None]:
    """botocore's own errors name the store's address, and are no OSErrors."""
    try:
        yield
    except (BotoCoreError, OSError) as error:
        if isinstance(error, BotoCoreError) or error.errno in OVERLOADED:
            raise StoreUnavailable("The artifact store does not answer.") from error
        raise


def account(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that a store's account is in."""
    return {name: environment[name] for name in ACCOUNT if name in environment}


def _copy_across(source: Path, destination: Path) -> None:
    """Move to another file system: copy beside the destination, then rename."""
    aside = destination.with_name(f".{destination.name}.part")
    try:
        shutil.copyfile(source, aside)
        sync(aside)
        aside.rename(destination)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    source.unlink()


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
