"""What routes need, as type aliases: a route's signature reads as a list of them."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query as QueryInfo
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator

from api.audit import CALLER
from api.context import Caller, Context
from api.middleware import HEADERS
from api.news import Hub
from api.queue_view import QueueView
from shared.database import Database
from shared.errors import InvalidRequest, NotFound, Unauthorized
from shared.hub import HubConfigs
from shared.ids import DATASET_ID, JOB_ID, UPLOAD_ID, WEBHOOK_ID
from shared.queue import Doorbell
from shared.repository.jobs import Page
from shared.repository.keys import find_key
from shared.settings import Settings
from shared.storage import Store

MAX_PAGE = 100

_bearer = HTTPBearer(auto_error=False, description="An API key: `tuneyard keys create NAME` makes one.")


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


ContextDep = Annotated[Context, Depends(_context)]


async def _settings(context: ContextDep) -> Settings:
    return context.settings


async def _database(context: ContextDep) -> Database:
    return context.database


async def _store(context: ContextDep) -> Store:
    return context.store


async def _doorbell(context: ContextDep) -> Doorbell:
    return context.doorbell


async def _hub(context: ContextDep) -> Hub:
    return context.hub


async def _configs(context: ContextDep) -> HubConfigs:
    return context.configs


async def _queue(context: ContextDep) -> QueueView:
    return context.queue


SettingsDep = Annotated[Settings, Depends(_settings)]
DatabaseDep = Annotated[Database, Depends(_database)]
StoreDep = Annotated[Store, Depends(_store)]
ConfigsDep = Annotated[HubConfigs, Depends(_configs)]
DoorbellDep = Annotated[Doorbell, Depends(_doorbell)]
QueueDep = Annotated[QueueView, Depends(_queue)]
HubDep = Annotated[Hub, Depends(_hub)]


def authenticate(
    request: Request,
    database: DatabaseDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Caller:
    """
    Raises:
        Unauthorized: no key, or none that is good here.
    """
    if credentials is None:
        raise Unauthorized(
            "This needs an API key: send the header `Authorization: Bearer KEY`.", code="no_api_key"
        )
    with database.read() as session:
        key = find_key(session, credentials.credentials)
        caller = Caller(key.name, key.admin, key.id, key.admin or key.high)
    request.scope[CALLER] = caller
    return caller


CallerDep = Annotated[Caller, Depends(authenticate)]


async def limit_rate(context: ContextDep, caller: CallerDep, request: Request) -> None:
    """Count the request against its key's limit, and tell in the answer what is left.

    Raises:
        RateLimited: nothing is left.
    """
    request.scope[HEADERS] = context.limiter.take(caller.key_id)


async def count_open(context: ContextDep, caller: CallerDep) -> AsyncIterator[None]:
    """Count the request as its owner's until its answer has been sent.

    Raises:
        QuotaExceeded: the owner has too many open.
    """
    with context.open_requests.one(caller.name):
        yield


def _known(pattern: re.Pattern[str], what: str, value: str, param: str = "id") -> str:
    """An id that can't be one is as absent as one that names nothing.

    Raises:
        NotFound: it can't be one.
    """
    if not pattern.fullmatch(value):
        raise NotFound(f"No such {what}.", param=param, code=f"{what}_not_found")
    return value


JobId = Annotated[str, Path(description="`ftjob-…`"), AfterValidator(partial(_known, JOB_ID, "job"))]
DatasetId = Annotated[
    str, Path(description="`file-…`"), AfterValidator(partial(_known, DATASET_ID, "dataset"))
]
FileId = Annotated[str, Path(description="`file-…`"), AfterValidator(partial(_known, DATASET_ID, "file"))]
UploadId = Annotated[
    str,
    Path(description="`upload_…`"),
    AfterValidator(partial(_known, UPLOAD_ID, "upload", param="upload_id")),
]
WebhookId = Annotated[str, Path(description="`we_…`"), AfterValidator(partial(_known, WEBHOOK_ID, "webhook"))]

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="The same key with the same body gives the same job again, for 24 hours.",
    ),
]


async def _body(request: Request) -> bytes:
    return await request.body()


BodyDep = Annotated[bytes, Depends(_body)]

Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Most items of one page.")]


async def _job_page(
    after: Annotated[
        str | None, Query(pattern=f"^{JOB_ID.pattern}$", description="Id of the last job of the page before.")
    ] = None,
    limit: Limit = 20,
) -> Page:
    return Page(after, limit)


async def _dataset_page(
    after: Annotated[
        str | None,
        Query(pattern=f"^{DATASET_ID.pattern}$", description="Id of the last dataset of the page before."),
    ] = None,
    limit: Limit = 20,
) -> Page:
    return Page(after, limit)


JobPage = Annotated[Page, Depends(_job_page)]
DatasetPage = Annotated[Page, Depends(_dataset_page)]


async def refuse_unknown_query(request: Request) -> None:
    """Refuse query parameters that the route does not know: a typo must not read as "no filter".

    Raises:
        InvalidRequest: names the parameter and those that there are.
    """
    route = request.scope.get("route")
    if not request.query_params or not isinstance(route, APIRoute):
        return
    known = {p.alias for p in get_flat_params(route.dependant) if isinstance(p.field_info, QueryInfo)}
    known |= {p["name"] for p in (route.openapi_extra or {}).get("parameters", [])}
    for name in request.query_params:
        # `metadata[team]` is a key of the parameter `metadata`.
        if name.partition("[")[0] not in known:
            raise InvalidRequest(
                f"There is no query parameter {name[:100]!r} here.",
                param=name[:100],
                code="unknown_parameter",
            )
