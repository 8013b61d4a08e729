"""Starting, asking and ending the child process of one attempt."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from shared.device import Device
from shared.vault import Redactor
from worker.order import Order
from worker.process import Process

# A pause or a job of higher priority wants the GPU within seconds of the end of a step.
BRIEF_SECONDS = 3.0


class Child:
    """A running attempt: one process group in its slots, given its order at once."""

    def __init__(self, process: Process, order: Order, devices: tuple[Device, ...]) -> None:
        self._process = process
        self._redactor = Redactor(order.secrets.values())
        self.job_id = order.job_id
        self.token = order.token
        self.workdir = Path(order.workdir)
        self.devices = devices
        self.started_at = time.monotonic()
        self.stop_asked_at: float | None = None
        self.leave_asked_at: float | None = None
        self.deadline: datetime | None = None
        process.say(order.to_line())

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self._process.exit_code()

    @property
    def asked(self) -> bool:
        """Whether its end is what was wanted of it."""
        return self.stop_asked_at is not None or self.leave_asked_at is not None

    def ask_to_leave(self, copy_seconds: float = BRIEF_SECONDS) -> None:
        """Ask it to end with a checkpoint of its step; asking again changes nothing.

        Args:
            copy_seconds: from now on, after which it no longer waits for the checkpoint's copy.
        """
        if not self.asked:
            self.leave_asked_at = time.monotonic()
            self._process.say(f"leave {copy_seconds:.1f}\n")

    def ask_to_stop(self) -> None:
        """Ask it to end at once; asking again changes nothing."""
        if self.stop_asked_at is None:
            self.stop_asked_at = time.monotonic()
            self._process.say("stop\n")

    def kill(self) -> None:
        """End the whole group at once; `exit_code` tells when it is gone."""
        self._process.kill()

    def await_exit(self, seconds: float) -> None:
        """Wait for its end, though not for one that hangs in a driver."""
        self._process.await_exit(seconds)

    def close(self) -> None:
        """Release what is left of an ended child, and end what it left running."""
        self._process.close()

    def last_words(self) -> str:
        """The last line that it printed, for a death that nothing else explains."""
        return self._redactor.text(self._process.last_words())
