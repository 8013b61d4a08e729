"""The system and its metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from api.dependencies import CallerDep, ContextDep
from api.schemas import SystemOut
from api.services import system

router = APIRouter(tags=["system"])


@router.get("/system")
def get_system(context: ContextDep, caller: CallerDep) -> SystemOut:
    """GPUs, workers and queue. An owner sees its own jobs only, an admin everybody's."""
    return system.overview(context, caller)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def get_prometheus_metrics(context: ContextDep, caller: CallerDep) -> Response:
    """Prometheus metrics. An owner sees its own jobs by status, an admin the whole service."""
    return Response(system.prometheus(context, caller), media_type=CONTENT_TYPE_LATEST)
