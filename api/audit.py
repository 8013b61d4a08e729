"""The audit log: requests that change something, and those that were forbidden, by whom they came from.

Entries are written by a task of its own, many in one transaction, within a fraction of a second: a request
doesn't wait for its entry, and a kill of the process can lose the last ones.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared.clock import utcnow
from shared.database import Database
from shared.errors import Forbidden
from shared.repository import audit
from shared.tables import AuditEntry

if TYPE_CHECKING:
    from api.context import Caller

# Where in the scope `authenticate` says who asks.
CALLER = "tuneyard.caller"
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
FLUSH_SECONDS = 0.2
RETRY_SECONDS = 2.0
# With the database away for long, the oldest go first.
MOST_WAITING = 100_000
MAX_OBJECT = 300

logger = logging.getLogger(__name__)


class AuditLog:
    """Takes entries on the event loop and writes them in a thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: deque[AuditEntry] = deque(maxlen=MOST_WAITING)
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def add(self, entry: AuditEntry) -> None:
        if len(self._waiting) == MOST_WAITING:
            logger.error("The audit log can't be written: its oldest entry is lost")
        self._waiting.append(entry)
        self._news.set()

    async def stop(self) -> None:
        """Write what is left."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._flush()

    async def _run(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            await asyncio.sleep(FLUSH_SECONDS)
            if not await self._flush():
                self._news.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def _flush(self) -> bool:
        batch = list(self._waiting)
        if not batch:
            return True
        try:
            await to_thread.run_sync(self._write, batch)
        except SQLAlchemyError as error:
            logger.warning("The audit log could not be written: %s", error)
            return False
        for _ in batch:
            self._waiting.popleft()
        return True

    def _write(self, batch: list[AuditEntry]) -> None:
        with self._database.write() as session:
            audit.add_entries(session, batch)


class Audit:
    """Middleware: tells the log of each request that changes something, once its status is known."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_and_tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                _tell(scope, message["status"], Headers(raw=message.get("headers", [])))
            await send(message)

        await self._app(scope, receive, send_and_tell)


def _tell(scope: Scope, status: int, headers: Mapping[str, str]) -> None:
    caller: Caller | None = scope.get(CALLER)
    # Who has no key did nothing; and anybody could fill the table.
    if caller is None or (scope["method"] in SAFE and status != Forbidden.status):
        return
    route = getattr(scope.get("route"), "path", "unmatched")
    client = scope.get("client")
    log: AuditLog = scope["app"].state.context.audit
    log.add(
        AuditEntry(
            time=utcnow(),
            owner=caller.name,
            key_id=caller.key_id,
            action=f"{scope['method']} {route}",
            object=_object(scope, headers),
            result=status,
            address=client[0] if client else None,
        )
    )


def _object(scope: Scope, headers: Mapping[str, str]) -> str | None:
    """What it was done to: the path's ids, or the id of what was made."""
    named = "/".join(str(value) for value in scope.get("path_params", {}).values())
    made = headers.get("location", "").rsplit("/", 1)[-1]
    # Ids of the path may be anything that a client writes.
    return "".join(c for c in named or made if c.isprintable())[:MAX_OBJECT] or None
