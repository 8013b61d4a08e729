"""Files and uploads whose owners gave them an end, or that were never completed: removed once it has come."""

from __future__ import annotations

from dataclasses import dataclass

from shared.database import Database
from shared.repository import files, uploads
from shared.storage import Store


@dataclass(frozen=True)
class Expired:
    """A file, or an upload with the parts that came; `bytes` are those in the store."""

    what: str
    id: str
    owner: str
    bytes: int


def remove_expired(database: Database, store: Store, *, dry_run: bool = False) -> list[Expired]:
    """Remove what is over its time; with `dry_run` only tell. A file that a job still needs stays until then.

    Uploads that were completed or cancelled have nothing in the store any more: their rows go untold.
    """
    found: list[Expired] = []
    keys: list[str] = []
    with database.write() as session:
        for file in files.expired(session):
            found.append(Expired("files over their time", file.id, file.owner, file.bytes))
            if not dry_run:
                keys.append(files.delete_file(session, file))
        for upload in uploads.expired(session):
            if uploads.is_unfinished(upload):
                size = sum(part.bytes for part in uploads.list_parts(session, upload.id))
                found.append(Expired("unfinished uploads", upload.id, upload.owner, size))
            if not dry_run:
                keys += uploads.delete_upload(session, upload)
    for key in keys:
        store.delete(key)
    return found
