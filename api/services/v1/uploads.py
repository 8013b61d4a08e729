"""Files that come in parts: begin, take parts, put them together, call off."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from anyio import to_thread
from pydantic import BaseModel, ConfigDict, Field

from api.context import Caller, Context
from api.schemas_v1 import UploadPartV1, UploadV1
from api.services import files as stored
from api.services.files import Terms, on_full_disk
from api.services.uploads import Upload, display_name, receive
from api.services.v1.files import LIFETIMES, PURPOSES, purpose_of
from shared.clock import utcnow
from shared.errors import InvalidRequest, QuotaExceeded, StateConflict, TooLarge
from shared.ids import new_dataset_id, new_part_id, new_upload_id
from shared.repository import files, owners, uploads
from shared.repository.uploads import COMPLETING, PENDING
from shared.tables import DatasetRow, UploadPartRow, UploadRow

OPEN_SECONDS = 3600
MAX_OPEN = 10
MAX_PARTS = 1000
MAX_PART_BYTES = 64 << 20


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class ExpiresAfter(_Body):
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LIFETIMES.start, lt=LIFETIMES.stop)]


class CreateUpload(_Body):
    """What is to come. `mime_type` is kept and otherwise ignored."""

    bytes: Annotated[int, Field(ge=1)]
    filename: Annotated[str, Field(min_length=1, max_length=1000)]
    mime_type: Annotated[str, Field(max_length=200)]
    purpose: Annotated[str, Field(json_schema_extra={"enum": list(PURPOSES)})]
    expires_after: ExpiresAfter | None = None


class CompleteUpload(_Body):
    """All parts, in their order; `md5` (hex) is checked if it is given."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=MAX_PARTS)]
    md5: Annotated[str, Field(pattern="^[0-9a-fA-F]{32}$")] | None = None


def create(context: Context, caller: Caller, wanted: CreateUpload) -> UploadV1:
    """Begin an upload, which stays open for an hour.

    Raises:
        InvalidRequest: no such purpose.
        TooLarge: the file would be over the limit.
        QuotaExceeded: the owner has as many open uploads as one may have, or no storage left for this one.
    """
    limit = context.settings.max_upload_bytes
    if wanted.bytes > limit:
        raise TooLarge(f"The file is over this server's limit of {limit} bytes.", param="bytes")
    row = UploadRow(
        id=new_upload_id(),
        owner=caller.name,
        filename=display_name(wanted.filename),
        bytes=wanted.bytes,
        mime_type=display_name(wanted.mime_type),
        purpose=purpose_of(wanted.purpose),
        status=PENDING,
        file_seconds=wanted.expires_after.seconds if wanted.expires_after else None,
        expires_at=utcnow() + timedelta(seconds=OPEN_SECONDS),
    )
    with context.database.write() as session:
        owners.lock_owner(session, caller.name)
        sizes = uploads.open_sizes(session, caller.name)
        if len(sizes) >= MAX_OPEN:
            raise QuotaExceeded(
                f"You have {MAX_OPEN} open uploads, which is the limit for one owner: complete or cancel one."
            )
        # Parts lie in the store too, and all of them may become files.
        quotas = owners.quotas(session, context.settings, caller.name)
        quotas["stored_bytes"].check(sum(sizes) + row.bytes)
        session.add(row)
    return UploadV1.of(row)


async def add_part(
    context: Context, caller: Caller, upload_id: str, chunks: AsyncIterator[bytes], headers: Mapping[str, str]
) -> UploadPartV1:
    """Store a part. Several may come at the same time.

    Raises:
        NotFound: no such upload, or somebody else's.
        StateConflict: the upload takes no more parts.
        InvalidRequest: no part, an empty one, or one too many.
        TooLarge: the part is over 64 MiB, or over what is left of the file's size.
        Unavailable: the disk or the store has no room for it.
    """
    part_id = new_part_id()
    room = await to_thread.run_sync(_room, context, caller, upload_id)
    path = context.settings.root / "uploads" / part_id
    try:
        with on_full_disk():
            part = await _receive(chunks, headers, path, room)
            row = UploadPartRow(
                id=part_id, upload_id=upload_id, bytes=part.bytes, key=f"uploads/{upload_id}/{part_id}"
            )
            await to_thread.run_sync(_store_part, context, caller, path, row)
    finally:
        path.unlink(missing_ok=True)
    return UploadPartV1.of(row)


async def complete(context: Context, caller: Caller, upload_id: str, wanted: CompleteUpload) -> UploadV1:
    """Put the parts together and store the file, like one that was uploaded whole.

    Raises:
        NotFound: no such upload, or somebody else's.
        StateConflict: the upload is not open any more, or another request has completed it meanwhile.
        InvalidRequest: the parts don't add up to the file's size, or to its MD5.
        Unavailable: the disk or the store has no room for it.
    """
    upload, parts = await to_thread.run_sync(_begin, context, caller, upload_id, wanted.part_ids)
    file_id = new_dataset_id()
    path = context.settings.root / "uploads" / file_id
    try:
        with on_full_disk():
            whole = await to_thread.run_sync(_assemble, context, upload, parts, path, wanted.md5)
        ends = utcnow() + timedelta(seconds=upload.file_seconds) if upload.file_seconds else None
        file = await stored.keep(
            context, Caller(upload.owner, admin=False), file_id, whole, Terms(upload.purpose, expires_at=ends)
        )
    except BaseException:
        await to_thread.run_sync(_reopen, context, upload_id)
        raise
    finally:
        path.unlink(missing_ok=True)
    return await to_thread.run_sync(_end, context, caller, upload_id, file)


def cancel(context: Context, caller: Caller, upload_id: str) -> UploadV1:
    """Call an upload off and forget its parts.

    Raises:
        NotFound: no such upload, or somebody else's.
        StateConflict: the upload is not open any more.
    """
    with context.database.write() as session:
        row = uploads.open_upload(session, upload_id, caller.scope)
        row.status = "cancelled"
        keys = uploads.forget_parts(session, upload_id)
    _delete(context, keys)
    return UploadV1.of(row)


async def _receive(chunks: AsyncIterator[bytes], headers: Mapping[str, str], path: Path, room: int) -> Upload:
    try:
        return await receive(chunks, headers, path, min(room, MAX_PART_BYTES), "data")
    except TooLarge:
        most = f"a part has at most {MAX_PART_BYTES}"
        told = f"{room} bytes of the file are left" if room < MAX_PART_BYTES else most
        raise TooLarge(f"The part is too large: {told}.", param="data") from None


def _room(context: Context, caller: Caller, upload_id: str) -> int:
    with context.database.write() as session:
        upload = uploads.open_upload(session, upload_id, caller.scope)
        parts = uploads.count_parts(session, upload_id)
        return _room_for_one_more(upload.bytes, uploads.room_left(session, upload), parts)


def _room_for_one_more(total: int, room: int, parts: int) -> int:
    if room <= 0:
        raise TooLarge(f"The parts have the {total} bytes of the file already.", param="data")
    if parts >= MAX_PARTS:
        raise InvalidRequest(f"A file comes in at most {MAX_PARTS} parts.", param="data", code="over_limit")
    return room


def _store_part(context: Context, caller: Caller, path: Path, row: UploadPartRow) -> None:
    context.store.publish(path, row.key)
    try:
        with context.database.write() as session:
            # What has changed while the part came.
            upload = uploads.open_upload(session, row.upload_id, caller.scope)
            room = uploads.room_left(session, upload)
            _room_for_one_more(upload.bytes, room, uploads.count_parts(session, upload.id))
            if row.bytes > room:
                raise TooLarge(f"The parts are over the {upload.bytes} bytes of the file.", param="data")
            session.add(row)
    except BaseException:
        context.store.delete(row.key)
        raise


def _begin(
    context: Context, caller: Caller, upload_id: str, part_ids: Sequence[str]
) -> tuple[UploadRow, list[UploadPartRow]]:
    with context.database.write() as session:
        row = uploads.open_upload(session, upload_id, caller.scope, or_completing=True)
        parts = uploads.parts_in_order(session, upload_id, part_ids)
        found = sum(part.bytes for part in parts)
        if found != row.bytes:
            raise InvalidRequest(
                f"The parts have {found} bytes, and the file was to have {row.bytes}.", param="part_ids"
            )
        row.status = COMPLETING
    return row, parts


def _assemble(
    context: Context, upload: UploadRow, parts: Sequence[UploadPartRow], path: Path, md5: str | None
) -> Upload:
    digest, checked = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("xb") as file:
        for part in parts:
            for chunk in context.store.read(part.key, 0, part.bytes):
                digest.update(chunk)
                checked.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if md5 is not None and checked.hexdigest() != md5.lower():
        raise InvalidRequest(f"The parts' MD5 is {checked.hexdigest()}, not {md5}.", param="md5")
    return Upload(path, upload.filename, upload.bytes, digest.hexdigest(), {})


def _reopen(context: Context, upload_id: str) -> None:
    with context.database.write() as session:
        row = uploads.get_upload(session, upload_id, None, lock=True)
        if row.status == COMPLETING:
            row.status = PENDING


def _end(context: Context, caller: Caller, upload_id: str, file: DatasetRow) -> UploadV1:
    with context.database.write() as session:
        row = uploads.get_upload(session, upload_id, caller.scope, lock=True)
        first = uploads.is_unfinished(row)
        if first:
            row.status, row.file_id = "completed", file.id
            keys = uploads.forget_parts(session, upload_id)
        else:
            keys = [files.delete_file(session, files.get_file(session, file.id, None))]
    _delete(context, keys)
    if not first:
        raise StateConflict(f"The upload was {row.status} meanwhile.")
    return UploadV1.of(row, file)


def _delete(context: Context, keys: Sequence[str]) -> None:
    for key in keys:
        context.store.delete(key)
