"""Delivers events to webhooks: from the database, again at growing intervals, one by one for each webhook."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta

from anyio import to_thread

from api.outbound import Unreachable
from api.services.v1.webhooks import send
from shared.clock import utcnow
from shared.database import Database
from shared.errors import Unavailable
from shared.repository import webhooks
from shared.repository.webhooks import Due
from shared.settings import Settings
from shared.tables import Delivery

POLL_SECONDS = 1.0
AT_ONCE = 32
# So that an owner whose hosts never answer holds up nobody else.
AT_ONCE_OF_OWNER = 4
# Longer than a delivery takes: another process takes it over if this one has died.
TAKEN = timedelta(seconds=60)
GIVEN_UP = timedelta(hours=72)
LONGEST_PAUSE = 4 * 3600.0

logger = logging.getLogger(__name__)


@asynccontextmanager
async def courier(database: Database, settings: Settings) -> AsyncIterator[None]:
    """Deliver until the block ends; what is under way then is tried again by whoever comes next."""
    running = _Courier(database, settings)
    task = asyncio.create_task(running.run())
    try:
        yield
    finally:
        tasks = [task, *running.tasks]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Courier:
    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._settings = settings
        # Owner by the webhook that something is on its way to.
        self._busy: dict[str, str] = {}
        self._free = asyncio.Event()
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        while True:
            self._free.clear()
            try:
                await to_thread.run_sync(self._announce)
                await self._begin()
            except Exception:
                # The boundary of this task: the database may be away, and the events stay in it.
                logger.exception("Could not look for events to deliver")
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._free.wait()
            except TimeoutError:
                continue

    def _announce(self) -> None:
        with self._database.read() as session:
            if not webhooks.has_news(session):
                return
        with self._database.write() as session:
            webhooks.announce(session)

    async def _begin(self) -> None:
        """Start a delivery to every webhook that waits for one, as far as there is room."""
        owners = Counter(self._busy.values())
        for webhook_id, owner in await to_thread.run_sync(self._waiting):
            if len(self._busy) >= AT_ONCE:
                return
            if owners[owner] < AT_ONCE_OF_OWNER:
                owners[owner] += 1
                self._busy[webhook_id] = owner
                task = asyncio.create_task(self._deliver(webhook_id))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def _waiting(self) -> list[tuple[str, str]]:
        owners = Counter(self._busy.values())
        full = [owner for owner, count in owners.items() if count >= AT_ONCE_OF_OWNER]
        with self._database.read() as session:
            return webhooks.due_webhooks(session, utcnow(), list(self._busy), full, AT_ONCE)

    async def _deliver(self, webhook_id: str) -> None:
        try:
            due = await to_thread.run_sync(self._take, webhook_id)
            if due is not None:
                error = await self._send(due)
                await to_thread.run_sync(self._settle, due, error)
        except Exception:
            # The boundary of one delivery: it is tried again when its time is over.
            logger.exception("Could not deliver to the webhook %s", webhook_id)
        finally:
            del self._busy[webhook_id]
            self._free.set()

    def _take(self, webhook_id: str) -> Due | None:
        now = utcnow()
        with self._database.write() as session:
            return webhooks.take_due(session, webhook_id, now, now + TAKEN)

    async def _send(self, due: Due) -> str | None:
        """Why it failed; None if the webhook has it."""
        try:
            status = await send(due.webhook, due.delivery.event_id, due.delivery.body, self._settings)
        except (Unreachable, Unavailable) as error:
            return str(error)
        # No redirect is followed: it could lead anywhere.
        return None if 200 <= status < 300 else f"The answer was {status}."

    def _settle(self, due: Due, error: str | None) -> None:
        again = next_try(due.delivery, self._settings.webhook_retry_seconds, utcnow()) if error else None
        if error:
            what = f"again at {again:%H:%M:%S}" if again else "given up"
            logger.warning("Webhook %s: %s, %s", due.webhook.id, error.rstrip("."), what)
        with self._database.write() as session:
            webhooks.settle(session, due, error, again)


def next_try(delivery: Delivery, first: float, now: datetime) -> datetime | None:
    """When a delivery that failed is tried again: four times later after each try; None after three days."""
    pause = min(first * 4.0 ** (delivery.attempts - 1), LONGEST_PAUSE)
    again = now + timedelta(seconds=pause * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load, no secret
    return again if again - delivery.created_at < GIVEN_UP else None
