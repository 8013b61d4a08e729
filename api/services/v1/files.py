"""Files in OpenAI's shape. One to train on is a dataset; others are kept as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from datetime import timedelta

from api.context import Caller, Context
from api.schemas_v1 import FileDeletedV1, FileV1, ListV1
from api.services import files as stored
from api.services.artifacts import Content, Download, read_stored
from api.services.datasets import format_of
from api.services.files import Terms
from shared.clock import utcnow
from shared.database import Database
from shared.errors import InvalidRequest
from shared.repository import files
from shared.repository.jobs import Page
from shared.storage import Store, StoreUnavailable

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
FIELDS = ("purpose", "format", "name", "expires_after[anchor]", "expires_after[seconds]")
# A file may be given away after an hour at the earliest, and a month at the latest.
LIFETIMES = range(3600, 2_592_001)


async def create(
    context: Context, caller: Caller, chunks: AsyncIterator[bytes], headers: Mapping[str, str]
) -> FileV1:
    """Store an upload.

    Raises:
        InvalidRequest: no file, an empty one, no purpose, or terms that can't be.
        MalformedRequest: the body is not multipart/form-data.
        TooLarge: the file is over the limit.
        Unavailable: the disk or the store has no room for it.
    """
    return FileV1.of(await stored.receive(context, caller, chunks, headers, _terms))


def list_page(database: Database, caller: Caller, page: Page, purpose: str | None) -> ListV1[FileV1]:
    """
    Raises:
        InvalidRequest: `after` names no file that the caller may see.
    """
    with database.read() as session:
        rows, more = files.list_files(session, caller.scope, page, purpose)
    return ListV1.of([FileV1.of(row) for row in rows], has_more=more)


def get(database: Database, caller: Caller, file_id: str) -> FileV1:
    """
    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        return FileV1.of(files.get_file(session, file_id, caller.scope))


def content(database: Database, store: Store, caller: Caller, file_id: str) -> Download:
    """The file, as it was uploaded.

    Raises:
        NotFound: absent or somebody else's.
    """
    with database.read() as session:
        row = files.get_file(session, file_id, caller.scope)
    headers = {
        "content-type": "application/octet-stream",
        "content-disposition": f'attachment; filename="{row.id}"',
        "content-length": str(row.bytes),
        "cache-control": "private, no-cache",
        "x-content-type-options": "nosniff",
    }
    found: Content = read_stored(store, row.key, row.id, 0, row.bytes)
    return Download(200, headers, found)


def delete(database: Database, store: Store, caller: Caller, file_id: str) -> FileDeletedV1:
    """Delete the row, then the file.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: a job that has not ended needs it.
    """
    with database.write() as session:
        key = files.delete_file(session, files.get_file(session, file_id, caller.scope, lock=True))
    with suppress(StoreUnavailable):  # `tuneyard gc` removes what no row names.
        store.delete(key)
    return FileDeletedV1(id=file_id)


def purpose_of(value: str | None) -> str:
    """
    Raises:
        InvalidRequest: there is no such purpose for an upload.
    """
    if value is None:
        raise InvalidRequest("purpose is missing.", param="purpose", code="missing_field")
    if value not in PURPOSES:
        raise InvalidRequest(f"purpose should be one of: {', '.join(PURPOSES)}.", param="purpose")
    return value


def _terms(fields: Mapping[str, str]) -> Terms:
    for name in fields:
        # One that is misspelt would be a file that never expires.
        if name not in FIELDS:
            known = f"The form has `file` and: {', '.join(FIELDS)}."
            raise InvalidRequest(
                f"There is no field {name[:100]}. {known}", param=name[:100], code="unknown_field"
            )
    purpose = purpose_of(fields.get("purpose"))
    lifetime = _lifetime(fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"))
    ends = utcnow() + timedelta(seconds=lifetime) if lifetime else None
    return Terms(purpose, format_of(fields), ends)


def _lifetime(anchor: str | None, given: str | None) -> int | None:
    if anchor is None and given is None:
        return None
    if anchor != "created_at":
        raise InvalidRequest("expires_after.anchor should be created_at.", param="expires_after.anchor")
    if given is None or not given.isdecimal() or int(given[:10]) not in LIFETIMES:
        raise InvalidRequest(
            f"expires_after.seconds should be {LIFETIMES.start} to {LIFETIMES.stop - 1}.",
            param="expires_after.seconds",
            code="out_of_range",
        )
    return int(given)
