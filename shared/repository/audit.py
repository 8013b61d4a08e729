"""The audit log: entries are added, read and, when they are old, removed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlmodel import Session, col, delete, select

from shared.tables import AuditEntry


def add_entries(session: Session, entries: Sequence[AuditEntry]) -> None:
    # Copies: an object belongs to one session, and a failed write is tried again.
    session.add_all([AuditEntry(**entry.model_dump(exclude={"id"})) for entry in entries])


def list_entries(
    session: Session, owner: str | None, before: int | None, limit: int
) -> tuple[list[AuditEntry], bool]:
    """Entries, newest first: of one owner or all, those with an id < `before`; and whether there are more."""
    statement = select(AuditEntry)
    if owner is not None:
        statement = statement.where(AuditEntry.owner == owner)
    if before is not None:
        statement = statement.where(col(AuditEntry.id) < before)
    rows = list(session.exec(statement.order_by(col(AuditEntry.id).desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def remove_entries(session: Session, before: datetime) -> None:
    """Forget what is older."""
    session.exec(delete(AuditEntry).where(col(AuditEntry.time) < before))
