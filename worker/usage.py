"""What this box's GPUs do, looked at on a thread of its own: the driver's tool may take a second."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

from shared.device import Device
from shared.errors import Unavailable
from worker.gpus import measure_use

LOOK_SECONDS = 10.0

logger = logging.getLogger(__name__)


class Usage:
    """The latest look at the slots' GPUs; empty without any, and while the driver does not answer."""

    def __init__(self, slots: Sequence[Device]) -> None:
        self.gpus: list[dict[str, Any]] = []
        self._slots = [slot for slot in slots if slot.kind == "cuda"]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)

    def start(self) -> None:
        if self._slots:
            self._thread.start()

    def stop(self) -> None:
        """Look no more. A look that is under way is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self.gpus = measure_use(self._slots)
            except Unavailable as error:
                if self.gpus:
                    logger.warning("The GPUs' use is not known: %s", error)
                self.gpus = []
            self._stopped.wait(LOOK_SECONDS)
