"""Files of all purposes: take one in, look into it if it is to be trained on, store it."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from anyio import to_thread

from api.context import Caller, Context
from api.services import uploads
from api.services.inspection import Finding, inspect
from shared.data.packed import GZIP_MAGIC, PARQUET_MAGIC, ZSTD_MAGIC
from shared.database import Database
from shared.errors import NotFound, Unavailable
from shared.ids import new_dataset_id
from shared.repository import files, owners
from shared.tables import FINE_TUNE, DatasetRow

# A few hundred bytes of these may take seconds and gigabytes to unpack.
PACKED = (GZIP_MAGIC, ZSTD_MAGIC, PARQUET_MAGIC)
# How long the answer to a small upload waits for what is found in it.
LOOK_SECONDS = 5.0
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Terms:
    """What a file is for, how it is to be read, and when its time is over."""

    purpose: str
    format: str = "auto"
    expires_at: datetime | None = None


async def receive(
    context: Context,
    caller: Caller,
    chunks: AsyncIterator[bytes],
    headers: Mapping[str, str],
    terms_of: Callable[[Mapping[str, str]], Terms],
) -> DatasetRow:
    """Store the file of a form, on the terms that its other fields say.

    Raises:
        InvalidRequest: no file, an empty one, or terms that can't be.
        MalformedRequest: the body is not multipart/form-data.
        TooLarge: the file is over the limit.
        QuotaExceeded: the owner's storage is used up, or would be.
        Unavailable: the disk or the store has no room for it.
    """
    await to_thread.run_sync(_check_storage, context, caller, headers)
    file_id = new_dataset_id()
    path = context.settings.root / "uploads" / file_id
    try:
        with on_full_disk():
            upload = await uploads.receive(chunks, headers, path, context.settings.max_upload_bytes)
        return await keep(context, caller, file_id, upload, terms_of(upload.fields))
    finally:
        path.unlink(missing_ok=True)


async def keep(
    context: Context, caller: Caller, file_id: str, upload: uploads.Upload, terms: Terms
) -> DatasetRow:
    """Store a complete file. A small one to train on is looked into, if that takes no more than seconds.

    Raises:
        QuotaExceeded: the owner's storage would be used up.
        Unavailable: the disk or the store has no room for it.
    """
    inline_bytes = context.settings.inline_inspect_bytes
    with on_full_disk():
        finding = await _first_look(upload, terms, inline_bytes)
        row = await to_thread.run_sync(_store, context, caller, file_id, upload, terms, finding)
    if row.status == "uploaded":
        looked_into = context.inspector.add(row)
        if row.bytes <= inline_bytes:
            return await _second_look(context.database, row, looked_into)
    return row


@contextmanager
def on_full_disk() -> Iterator[None]:
    """
    Raises:
        Unavailable: instead of the error of the disk or the store.
    """
    try:
        yield
    except OSError as error:
        logger.error("Could not store an upload: %s", error)
        why = "has no room for this file" if error.errno in DISK_FULL else "did not take this file"
        raise Unavailable(f"The server's disk {why}.", code="storage_unavailable") from error


def _check_storage(context: Context, caller: Caller, headers: Mapping[str, str]) -> None:
    """Before gigabytes are sent in vain; what the file really takes is checked when it is there."""
    claimed = headers.get("content-length", "")
    size = int(claimed[:20]) - uploads.ENVELOPE_BYTES if claimed.isdecimal() else 0
    with context.database.read() as session:
        owners.quotas(session, context.settings, caller.name)["stored_bytes"].check(max(size, 0))


async def _first_look(upload: uploads.Upload, terms: Terms, inline_bytes: int) -> Finding | None:
    """What a small text holds; None for a file that must not be looked into in this process."""
    if terms.purpose != FINE_TUNE:
        return Finding(terms.format)
    if upload.bytes > inline_bytes or await to_thread.run_sync(_is_packed, upload.path):
        return None
    return await to_thread.run_sync(inspect, upload.path, terms.format)


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(PACKED)


async def _second_look(database: Database, row: DatasetRow, looked_into: asyncio.Event) -> DatasetRow:
    """The file once it was looked into, or as it is after some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            await looked_into.wait()
    try:
        return await to_thread.run_sync(_read, database, row.id)
    except NotFound:
        # Deleted meanwhile: it was stored all the same.
        return row


def _read(database: Database, file_id: str) -> DatasetRow:
    with database.read() as session:
        return files.get_file(session, file_id, None)


def _store(
    context: Context,
    caller: Caller,
    file_id: str,
    upload: uploads.Upload,
    terms: Terms,
    finding: Finding | None,
) -> DatasetRow:
    row = DatasetRow(
        id=file_id,
        owner=caller.name,
        filename=upload.filename,
        bytes=upload.bytes,
        sha256=upload.sha256,
        status=finding.status if finding else "uploaded",
        format=finding.format if finding else terms.format,
        report=finding.report if finding else None,
        error=finding.error if finding else None,
        key=f"datasets/{file_id}/data",
        purpose=terms.purpose,
        expires_at=terms.expires_at,
    )
    context.store.publish(upload.path, row.key)
    try:
        with context.database.write() as session:
            owners.lock_owner(session, row.owner)
            owners.quotas(session, context.settings, row.owner)["stored_bytes"].check(row.bytes)
            files.add_file(session, row)
    except BaseException:
        context.store.delete(row.key)
        raise
    return row
