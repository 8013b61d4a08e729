"""What the API does by the clock: files and uploads whose time is over go, and what uploads left behind."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import to_thread

from api.context import Context
from api.services.uploads import sweep as sweep_left
from api.services.v1.uploads import sweep

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
            await to_thread.run_sync(sweep_left, context.settings.root / "uploads")
            await to_thread.run_sync(sweep, context)
        except Exception:
            # The boundary of this task: what the database or the store refuse now, they may take in a minute.
            logger.exception("Could not tidy up")
        await asyncio.sleep(EVERY_SECONDS)
