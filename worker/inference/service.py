"""The inference process: takes requests on a private unix socket, and gives each to its model's process."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import filelock

from shared.database import Database
from shared.errors import TuneyardError
from shared.inference import Event, Failed, Generation, to_line
from shared.settings import Settings, ensure_private_dir
from shared.storage import Store
from worker.inference.models import Models, Refusal
from worker.inference.placement import Placement

SWEEP_SECONDS = 1.0
# A client that takes nothing for so long has gone.
SEND_SECONDS = 30.0

logger = logging.getLogger(__name__)


class Service:
    """Everything that `tuneyard inference` runs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # JSON may write one character of a body as six.
        self._longest = 6 * settings.max_body_bytes + (1 << 16)
        self._database = Database(settings.database())
        placement = Placement(settings, self._database)
        self._models = Models(settings, Store(settings.artifacts()), placement)
        self._stopping = asyncio.Event()
        self._stop_asked = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Ask `run` to return, also before it began; from any thread."""
        self._stop_asked = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)

    async def run(self) -> None:
        """Serve until asked to stop, then end every model's process.

        Raises:
            TuneyardError: another inference process has this data folder.
        """
        self._loop = asyncio.get_running_loop()
        if self._stop_asked:
            return
        path = self._settings.inference_socket()
        ensure_private_dir(path.parent)
        try:
            lock = filelock.FileLock(self._settings.root / "inference.lock")
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise TuneyardError(
                f"Another `tuneyard inference` already runs on {self._settings.root}."
            ) from None
        try:
            path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._serve, path, limit=self._longest)
            async with asyncio.TaskGroup() as group:
                sweeper = group.create_task(self._sweep())
                await self._stopping.wait()
                server.close()
                sweeper.cancel()
                await self._models.close()
        finally:
            path.unlink(missing_ok=True)
            lock.release()
            self._database.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self._models.sweep()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: a request, its events, and an eye on whether the client is still there."""
        try:
            line = await reader.readline()
            if not line:
                return  # a health check
            asked = Generation.from_line(line)
            answer = asyncio.create_task(self._answer(asked, writer))
            gone = asyncio.create_task(reader.read())
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            for task in (answer, gone):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ConnectionError, TimeoutError):
                    await task
        finally:
            writer.close()

    async def _answer(self, asked: Generation, writer: asyncio.StreamWriter) -> None:
        async def tell(event: Event) -> None:
            writer.write(to_line(event))
            async with asyncio.timeout(SEND_SECONDS):
                await writer.drain()

        try:
            await self._models.answer(asked, tell)
        except Refusal as refusal:
            await tell(refusal.failed)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            # One request's fault is not the others'.
            logger.exception("A request failed")
            await tell(Failed("away", "Something went wrong in the inference process: its log tells more."))
