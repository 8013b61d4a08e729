"""Uploads that come in parts."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import func
from sqlmodel import Session, col, select

from shared.clock import utcnow
from shared.errors import InvalidRequest, NotFound, StateConflict
from shared.tables import UploadPartRow, UploadRow

PENDING = "pending"
COMPLETING = "completing"


def get_upload(session: Session, upload_id: str, owner: str | None, *, lock: bool = False) -> UploadRow:
    """The upload, if `owner` may see it (None: everybody's); with `lock` until the transaction ends.

    Raises:
        NotFound: absent or somebody else's.
    """
    row = session.get(UploadRow, upload_id, with_for_update=lock)
    if row is None or (owner is not None and row.owner != owner):
        raise NotFound(f"No upload {upload_id}.", param="upload_id", code="upload_not_found")
    return row


def open_upload(
    session: Session, upload_id: str, owner: str | None, *, or_completing: bool = False
) -> UploadRow:
    """The upload, locked, if it can still take parts; or if it is just being completed, for whoever did so
    may have died.

    Raises:
        NotFound: absent or somebody else's.
        StateConflict: it is complete, cancelled or over its time.
    """
    row = get_upload(session, upload_id, owner, lock=True)
    status = upload_status(row)
    if status != PENDING or (row.status != PENDING and not or_completing):
        raise StateConflict(f"The upload is {row.status if status == PENDING else status}: begin another.")
    return row


def upload_status(row: UploadRow) -> str:
    """pending, completed, cancelled or expired."""
    if not is_unfinished(row):
        return row.status
    return PENDING if row.expires_at > utcnow() else "expired"


def open_sizes(session: Session, owner: str) -> list[int]:
    """Bytes that each open upload of this owner is to have."""
    statement = select(UploadRow.bytes).where(
        UploadRow.owner == owner,
        col(UploadRow.status).in_((PENDING, COMPLETING)),
        col(UploadRow.expires_at) > utcnow(),
    )
    return list(session.exec(statement))


def room_left(session: Session, upload: UploadRow) -> int:
    """Bytes that its parts may still bring."""
    statement = select(func.sum(UploadPartRow.bytes)).where(UploadPartRow.upload_id == upload.id)
    return upload.bytes - int(session.exec(statement).one() or 0)


def count_parts(session: Session, upload_id: str) -> int:
    return session.exec(select(func.count()).where(UploadPartRow.upload_id == upload_id)).one()


def parts_in_order(session: Session, upload_id: str, part_ids: Sequence[str]) -> list[UploadPartRow]:
    """The parts that these ids name.

    Raises:
        InvalidRequest: an id that names none of this upload's parts, or one twice.
    """
    parts = {part.id: part for part in list_parts(session, upload_id)}
    for place, part_id in enumerate(part_ids):
        if part_id not in parts:
            raise InvalidRequest(f"The upload has no part {part_id[:50]!r}.", param=f"part_ids.{place}")
    if len(set(part_ids)) != len(part_ids):
        raise InvalidRequest("Each part is given once.", param="part_ids")
    return [parts[part_id] for part_id in part_ids]


def list_parts(session: Session, upload_id: str) -> list[UploadPartRow]:
    return list(session.exec(select(UploadPartRow).where(UploadPartRow.upload_id == upload_id)))


def forget_parts(session: Session, upload_id: str) -> list[str]:
    """Delete the rows of its parts; returns their store keys, to be deleted after the commit."""
    keys = []
    for part in list_parts(session, upload_id):
        keys.append(part.key)
        session.delete(part)
    return keys


def expired(session: Session) -> list[UploadRow]:
    """Uploads that are over their time, whatever became of them, locked."""
    statement = select(UploadRow).where(col(UploadRow.expires_at) <= utcnow())
    return list(session.exec(statement.with_for_update(skip_locked=True)))


def is_unfinished(upload: UploadRow) -> bool:
    """Whether it was neither completed nor cancelled."""
    return upload.status in (PENDING, COMPLETING)


def delete_upload(session: Session, upload: UploadRow) -> list[str]:
    """Delete its row and its parts'; returns their store keys, to be deleted after the commit."""
    keys = forget_parts(session, upload.id)
    session.delete(upload)
    return keys
