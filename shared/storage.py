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
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import fsspec

CHUNK = 1 << 20
KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


@dataclass(frozen=True)
class StoredFile:
    """A file as the store lists it: its key, if it is a complete one. `modified` is a Unix time."""

    name: str
    bytes: int
    modified: float


class Store:
    """Files under one fsspec URL."""

    def __init__(self, url: str) -> None:
        self._fs, self._root = fsspec.core.url_to_fs(url)
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
            self._fs.put_file(str(source), target)
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
        self._fs.get_file(self._path(key), str(target))
        return target

    def read(self, key: str, start: int, end: int) -> Generator[bytes, None, None]:
        """The bytes from `start` up to and without `end`, in chunks of at most 1 MiB.

        Raises:
            FileNotFoundError: no such key.
        """
        with self._fs.open(self._path(key), "rb", block_size=CHUNK) as file:
            file.seek(start)
            left = end - start
            while left > 0 and (chunk := file.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk

    def delete(self, key: str) -> None:
        """Delete a file; one that is gone already is no error."""
        try:
            self._fs.rm_file(self._path(key))
        except FileNotFoundError:
            return

    def delete_tree(self, prefix: str) -> None:
        """Delete all files whose keys begin with `prefix`/."""
        path = self._path(prefix)
        if self._fs.exists(path):
            self._fs.rm(path, recursive=True)

    def list_files(self) -> Iterator[StoredFile]:
        """Everything in the store, also what is no complete file of ours."""
        root = self._root.rstrip("/")
        self._fs.invalidate_cache()
        for path, info in self._fs.find(root, detail=True).items():
            made = info.get("mtime") or info.get("LastModified") or info.get("created")
            seconds = made.timestamp() if isinstance(made, datetime) else float(made or time.time())
            yield StoredFile(path.removeprefix(root).lstrip("/"), int(info["size"] or 0), seconds)

    def remove_stray(self, file: StoredFile) -> None:
        """Delete a file that `list_files` told of; one that is gone already is no error."""
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root.rstrip('/')}/{file.name}")

    def is_writable(self) -> bool:
        """Whether a small file can be written, for the readiness check."""
        path = f"{self._root.rstrip('/')}/.ready-{os.getpid()}"
        try:
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

    def _path(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"not a store key: {key!r}")
        return f"{self._root.rstrip('/')}/{key}"


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
