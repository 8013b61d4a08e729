"""The audit log, for admins."""

from __future__ import annotations

from datetime import timedelta

from api.context import Caller, Context
from api.schemas import AuditOut, ListOut
from shared.clock import utcnow
from shared.database import Database
from shared.errors import Forbidden
from shared.repository import audit


def list_page(
    database: Database, caller: Caller, owner: str | None, after: int | None, limit: int
) -> ListOut[AuditOut]:
    """Who did what, newest first.

    Raises:
        Forbidden: the caller is no admin.
    """
    if not caller.admin:
        raise Forbidden("Only an admin key may read the audit log.", code="admin_only")
    with database.read() as session:
        rows, more = audit.list_entries(session, owner, after, limit)
    data = [AuditOut.of(row) for row in rows]
    return ListOut(data=data, has_more=more, next=str(data[-1].id) if more else None)


def prune(context: Context) -> None:
    """Forget what is older than the setting keeps."""
    with context.database.write() as session:
        audit.remove_entries(session, utcnow() - timedelta(days=context.settings.audit_days))
