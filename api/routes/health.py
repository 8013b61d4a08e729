"""Health: no key needed."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import ContextDep
from api.schemas import HealthOut, ReadyOut
from api.services import system

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> HealthOut:
    """The process is alive. Looks at nothing else."""
    return HealthOut(status="ok")


@router.get("/readyz")
def readyz(context: ContextDep) -> ReadyOut:
    """Jobs can be taken: the database answers and the store can be written; 503 if not.

    Redis being away is told and changes nothing: jobs are accepted and run, a little later.
    """
    return system.readiness(context)
