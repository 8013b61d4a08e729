"""Datasets: take in an uploaded file, find, delete."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args

from anyio import to_thread

from api.context import Caller, Context
from api.schemas import DatasetOut, ListOut
from api.services import uploads
from api.services.inspection import Finding, inspect
from shared.data.packed import GZIP_MAGIC, PARQUET_MAGIC, ZSTD_MAGIC
from shared.database import Database
from shared.errors import InvalidRequest, NotFound, Unavailable
from shared.ids import new_dataset_id
from shared.repository import files
from shared.repository.jobs import Page
from shared.spec import DataFormat
from shared.storage import Store
from shared.tables import DatasetRow

FORMATS: tuple[str, ...] = get_args(DataFormat)
# A few hundred bytes of these may take seconds and gigabytes to unpack.
PACKED = (GZIP_MAGIC, ZSTD_MAGIC, PARQUET_MAGIC)
# How long the answer to a small upload waits for what is found in it.
LOOK_SECONDS = 5.0
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

logger = logging.getLogger(__name__)


async def create(
    context: Context, caller: Caller, chunks: AsyncIterator[bytes], headers: Mapping[str, str]
) -> DatasetOut:
    """Store an upload. A small one is looked into before the answer, if that takes no more than seconds.

    Raises:
        InvalidRequest: no file, an empty one, or a format that there is not.
        MalformedRequest: the body is not multipart/form-data.
        TooLarge: the file is over the limit.
        Unavailable: the disk or the store has no room for it.
    """
    settings = context.settings
    dataset_id = new_dataset_id()
    path = settings.root / "uploads" / dataset_id
    try:
        upload = await uploads.receive(chunks, headers, path, settings.max_upload_bytes)
        try:
            finding = await _first_look(upload, settings.inline_inspect_bytes)
            row = await to_thread.run_sync(_store, context, caller, dataset_id, upload, finding)
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.error("Could not store an upload: %s", error)
        why = "has no room for this file" if error.errno in DISK_FULL else "did not take this file"
        raise Unavailable(f"The server's disk {why}.", code="storage_unavailable") from error
    if row.status == "uploaded":
        looked_into = context.inspector.add(row)
        if row.bytes <= settings.inline_inspect_bytes:
            return await _second_look(context.database, row, looked_into)
    return DatasetOut.of(row)


def list_page(database: Database, caller: Caller, page: Page) -> ListOut[DatasetOut]:
    """One page of the datasets that the caller may see, newest first.

    Raises:
        InvalidRequest: `after` names no dataset that the caller may see.
    """
    with database.read() as session:
        rows, more = files.list_datasets(session, caller.scope, page)
    return ListOut(
        data=[DatasetOut.of(row) for row in rows], has_more=more, next=rows[-1].id if more else None
    )


def get(database: Database, caller: Caller, dataset_id: str) -> DatasetOut:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        return DatasetOut.of(files.get_dataset(session, dataset_id, caller.scope))


def delete(database: Database, store: Store, caller: Caller, dataset_id: str) -> None:
    """Delete the row, then the file.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: a job that has not ended needs it.
    """
    with database.write() as session:
        key = files.delete_dataset(session, dataset_id, caller.scope)
    store.delete(key)


async def _first_look(upload: uploads.Upload, inline_bytes: int) -> Finding | None:
    """What a small text holds; None for a file that must not be looked into in this process.

    Raises:
        InvalidRequest: the form names a format that there is not.
    """
    format_name = _format_of(upload)
    if upload.bytes > inline_bytes or await to_thread.run_sync(_is_packed, upload.path):
        return None
    return await to_thread.run_sync(inspect, upload.path, format_name)


def _is_packed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(PACKED)


async def _second_look(database: Database, row: DatasetRow, looked_into: asyncio.Event) -> DatasetOut:
    """The dataset once it was looked into, or as it is after some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            await looked_into.wait()
    try:
        return await to_thread.run_sync(_read, database, row.id)
    except NotFound:
        # Deleted meanwhile: it was stored all the same.
        return DatasetOut.of(row)


def _read(database: Database, dataset_id: str) -> DatasetOut:
    with database.read() as session:
        return DatasetOut.of(files.get_dataset(session, dataset_id, None))


def _store(
    context: Context, caller: Caller, dataset_id: str, upload: uploads.Upload, finding: Finding | None
) -> DatasetRow:
    row = DatasetRow(
        id=dataset_id,
        owner=caller.name,
        filename=upload.filename,
        bytes=upload.bytes,
        sha256=upload.sha256,
        status=finding.status if finding else "uploaded",
        format=finding.format if finding else _format_of(upload),
        report=finding.report if finding else None,
        error=finding.error if finding else None,
        key=f"datasets/{dataset_id}/data",
    )
    context.store.publish(upload.path, row.key)
    try:
        with context.database.write() as session:
            session.add(row)
    except BaseException:
        context.store.delete(row.key)
        raise
    return row


def _format_of(upload: uploads.Upload) -> str:
    name = upload.fields.get("format") or "auto"
    if name not in FORMATS:
        raise InvalidRequest(
            f"There is no format {name[:50]!r}. There are: {', '.join(FORMATS)}.", param="format"
        )
    return name
