"""Listens for the doorbell and wakes the supervisor. Nothing that a message says is executed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from redis import RedisError

from shared.queue import READ_TIMEOUT_SECONDS, Doorbell

WAIT_SECONDS = 1
AWAY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class Listener:
    """A thread that waits for messages; with Redis away it tries again and the supervisor polls alone."""

    def __init__(self, doorbell: Doorbell, answer: Callable[[], None]) -> None:
        self._doorbell = doorbell
        self._answer = answer
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="doorbell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._doorbell.interrupt()
        self._thread.join(timeout=READ_TIMEOUT_SECONDS + 1)

    def _run(self) -> None:
        away = False
        while not self._stopping.is_set():
            try:
                told = self._doorbell.wait(WAIT_SECONDS)
            except RedisError as error:
                if not away:
                    logger.warning("Redis is away, looking into the database alone: %s", error)
                away = True
                self._stopping.wait(AWAY_SECONDS)
                continue
            except Exception:
                # Nothing that stands in the queue may end the thread that listens to it.
                logger.exception("A queue message could not be read")
                self._stopping.wait(AWAY_SECONDS)
                continue
            if away:
                logger.info("Redis is back.")
            if told is not None or away:
                self._answer()
            away = False
