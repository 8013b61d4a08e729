"""Artifact files: reproducible tars, and size and SHA-256 by streaming."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO

from typing_extensions import Buffer

from shared.errors import JobFailure
from shared.events import Artifact, Control
from shared.lifecycle import FailureCode

BLOCK = 4 * 1024 * 1024


def tar_artifact(name: str, kind: str, folder: Path, target: Path, control: Control) -> Artifact:
    """Pack a folder's files into `target`/`name`: the same bytes for the same content.

    Entries are sorted, owned by nobody in particular, dated 1970 and never links: their paths begin with
    the tar's own name without `.tar`.

    Raises:
        JobFailure: `export_failed` for anything in the folder that is no plain file.
        JobStopped: the half-written file is removed first.
    """
    path = target / name
    top = name.removesuffix(".tar")
    try:
        with path.open("wb") as stream:
            writer = HashingWriter(stream, control)
            with tarfile.open(fileobj=writer, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                for file in sorted(folder.rglob("*")):
                    if file.is_dir() and not file.is_symlink():
                        continue
                    _add(tar, file, f"{top}/{file.relative_to(folder).as_posix()}")
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Artifact(name=name, kind=kind, path=path, bytes=writer.bytes, sha256=writer.digest.hexdigest())


def file_artifact(path: Path, kind: str, control: Control) -> Artifact:
    """A complete file as an artifact of its own name."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            control.check()
            digest.update(block)
            size += len(block)
    return Artifact(name=path.name, kind=kind, path=path, bytes=size, sha256=digest.hexdigest())


def _add(tar: tarfile.TarFile, file: Path, name: str) -> None:
    if file.is_symlink() or not file.is_file():
        raise JobFailure(
            FailureCode.EXPORT_FAILED, f"{file.name} in an export is no plain file.", "Submit the job again."
        )
    info = tarfile.TarInfo(name)
    info.size = file.stat().st_size
    info.mode = 0o644
    with file.open("rb") as stream:
        tar.addfile(info, stream)


class HashingWriter(io.RawIOBase):
    """Counts and hashes what passes through, and lets the job be stopped in the middle of a large file."""

    def __init__(self, stream: IO[bytes], control: Control) -> None:
        super().__init__()
        self._stream = stream
        self._control = control
        self.digest = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Buffer, /) -> int:
        self._control.check()
        self.digest.update(data)
        written = self._stream.write(data)
        self.bytes += written
        return written
