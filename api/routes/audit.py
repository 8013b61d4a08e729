"""The audit log."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.dependencies import CallerDep, DatabaseDep, Limit
from api.schemas import AuditOut, ListOut
from api.services import audit

router = APIRouter(tags=["audit"])


@router.get("/audit")
def get_audit(
    database: DatabaseDep,
    caller: CallerDep,
    owner: Annotated[str | None, Query(max_length=100, description="Only what this owner did.")] = None,
    after: Annotated[
        int | None, Query(ge=1, le=2**63 - 1, description="Id of the last entry of the page before.")
    ] = None,
    limit: Limit = 20,
) -> ListOut[AuditOut]:
    """Who changed what, from where and with which result, newest first. For admin keys alone."""
    return audit.list_page(database, caller, owner, after, limit)
