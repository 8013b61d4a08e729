"""What the API does by the clock: files and uploads whose time is over go, and what uploads left behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread

from api.context import Context
from api.services.audit import prune
from shared.expired import remove_expired
from shared.leftovers import leftovers
from shared.settings import Settings

EVERY_SECONDS = 60.0

logger = logging.getLogger(__name__)


@asynccontextmanager
async def housekeeping(context: Context) -> AsyncIterator[None]:
    """Tidy up every minute until the block ends."""
    task = asyncio.create_task(_run(context))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _run(context: Context) -> None:
    while True:
        try:
            await to_thread.run_sync(_remove_leftovers, context.settings)
            await to_thread.run_sync(_remove_expired, context)
            await to_thread.run_sync(prune, context)
        except Exception:
            # The boundary of this task: what the database or the store refuse now, they may take in a minute.
            logger.exception("Could not tidy up")
        await asyncio.sleep(EVERY_SECONDS)


def _remove_expired(context: Context) -> None:
    for gone in remove_expired(context.database, context.store):
        logger.info("Removed %s: %s of %s, %d bytes", gone.what, gone.id, gone.owner, gone.bytes)


def _remove_leftovers(settings: Settings) -> None:
    for path in leftovers(settings.root / "uploads", settings.keep_unfinished_hours):
        logger.info("Removed what an upload left: %s", path.name)
        path.unlink(missing_ok=True)
