"""The application: what it is made of and how it starts and stops."""

from __future__ import annotations

import fnmatch
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import to_thread
from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware

from api import errors
from api.audit import Audit, AuditLog
from api.context import Context
from api.courier import courier
from api.dependencies import authenticate, count_open, limit_rate, refuse_unknown_query
from api.housekeeping import housekeeping
from api.limits import OpenRequests, RateLimiter
from api.metrics import Metrics
from api.middleware import BodyLimit, Guard, PlainPosts, RequestLog
from api.news import Hub
from api.queue_view import QueueView
from api.routes import artifacts, audit, datasets, exports, health, jobs, logs, models, secrets, system
from api.routes.v1 import completions, fine_tuning, webhooks
from api.routes.v1 import files as v1_files
from api.routes.v1 import models as v1_models
from api.routes.v1 import uploads as v1_uploads
from api.schemas import ErrorOut
from api.schemas_chat import ChatRequest, CompletionRequest
from api.services.inspection import Inspector
from api.services.v1.webhooks import seal_old
from shared.database import Database
from shared.hub import HubConfigs
from shared.queue import Doorbell
from shared.settings import Settings
from shared.spec import JobSpec
from shared.storage import Store

V1_ROUTERS = (
    fine_tuning.router, v1_files.router, v1_uploads.router, v1_models.router, completions.router,
    webhooks.router,
)  # fmt: skip
BODIES = (JobSpec, ChatRequest, CompletionRequest)
SCHEMA_REF = "#/components/schemas/{model}"
ROUTERS = (
    jobs.router, logs.router, artifacts.router, exports.router, datasets.router, models.router,
    secrets.router, system.router, audit.router
)  # fmt: skip

# In this order: whoever has no key is told that, and nothing of what else is wrong.
CHECKS = (authenticate, count_open, refuse_unknown_query)


def create_app(settings: Settings) -> FastAPI:
    """The API for these settings. Its database, store and queue are opened when it starts."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _open(settings, metrics) as context:
            app.state.context = context
            yield

    app = _Api(
        title="Tuneyard",
        description="A self-hosted fine-tuning job service.",
        version=version("tuneyard"),
        lifespan=lifespan,
        redoc_url=None,
        responses={"default": {"model": ErrorOut, "description": "Every error has this shape."}},
        generate_unique_id_function=lambda route: route.name,
    )
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(check) for check in CHECKS])
    for router in V1_ROUTERS:
        app.include_router(router, dependencies=[Depends(check) for check in (*CHECKS, limit_rate)])
    app.include_router(health.router, dependencies=[Depends(refuse_unknown_query)])
    # The last one added is the first that a request meets.
    app.add_middleware(PlainPosts)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origin_regex=_any_of(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    app.add_middleware(Audit)
    app.add_middleware(Guard, settings=settings)
    app.add_middleware(RequestLog, metrics=metrics)
    errors.install(app)
    return app


def _any_of(patterns: str) -> str:
    return "|".join(fnmatch.translate(pattern.strip()) for pattern in patterns.split(",") if pattern.strip())


class _Api(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """FastAPI's schema with the bodies that no parameter declares, for they are parsed by themselves."""
        if self.openapi_schema is None:
            known = super().openapi()["components"]["schemas"]
            for body in BODIES:
                schema = body.model_json_schema(ref_template=SCHEMA_REF)
                known |= schema.pop("$defs", {}) | {body.__name__: schema}
        return super().openapi()


@asynccontextmanager
async def _open(settings: Settings, metrics: Metrics) -> AsyncIterator[Context]:
    settings.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    database = Database(settings.database())
    await to_thread.run_sync(database.migrate)
    await to_thread.run_sync(seal_old, database, settings)
    store = Store(settings.artifacts())
    uploads = settings.root / "uploads"
    doorbell = Doorbell(settings.redis())
    hub = Hub(database, settings.redis())
    inspector = Inspector(database, store, uploads)
    audit_log = AuditLog(database)
    audit_log.start()
    hub.start()
    await inspector.start()
    try:
        context = Context(
            settings=settings,
            database=database,
            store=store,
            doorbell=doorbell,
            hub=hub,
            inspector=inspector,
            metrics=metrics,
            configs=HubConfigs(),
            limiter=RateLimiter(settings.rate_limit),
            audit=audit_log,
            open_requests=OpenRequests(settings.max_open_requests),
            queue=QueueView(database, settings),
        )
        async with housekeeping(context), courier(database, settings):
            yield context
    finally:
        await inspector.stop()
        await audit_log.stop()
        await hub.stop()
        doorbell.close()
        database.close()
