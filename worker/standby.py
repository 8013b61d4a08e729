"""Children in waiting: processes that have imported the training stack before there is a job for them.

One is used for one job and never again. It holds no job, no secret and no memory of a GPU until it gets its
order, and ends with its supervisor, whose pipe it reads. It also ends when others need the machine's memory,
and when packages have been installed since it imported them.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from shared.device import Device
from shared.plan import EngineName
from worker.gpus import available_bytes
from worker.process import Process
from worker.sweep import STANDBY_PREFIX, remove_in_background

# After a job has started: its own loading has the cores first.
REPLACE_SECONDS = 10.0
# After a standby that died waiting, times the number of deaths in a row.
RETRY_SECONDS = 60.0
# Bytes of the machine's memory that must be available for one more to start, and for those that wait to stay.
START_BYTES, STAY_BYTES = 2 << 30, 1 << 30

logger = logging.getLogger(__name__)


@dataclass
class Standby:
    """A process that waits; on a GPU box it serves jobs of its engine on its own GPU."""

    process: Process
    engine: EngineName
    device: Device
    packages: int

    def serves(self, engine: EngineName, device: Device) -> bool:
        # Unsloth changes what it is imported with, and has to be imported first. The others share a stack.
        alike = self.engine == engine or "unsloth" not in (self.engine, engine)
        return alike and (self.device == device or self.device.kind == device.kind == "cpu")


class Standbys:
    """One for each engine and GPU; on the CPU one for each engine, and only while a slot is free there.

    Args:
        wanted: the setting: `off`, `auto` (the engine of the last job) or engines between commas.
        start: starts a process in this folder, on this device, with these arguments.
    """

    def __init__(
        self,
        wanted: str,
        slots: Sequence[Device],
        work: Path,
        start: Callable[[Path, Device, list[str]], Process],
    ) -> None:
        self._wanted = wanted
        self._slots = slots
        self._work = work
        self._start = start
        self._last_engine = _likely_engine(slots)
        self._waiting: list[Standby] = []
        self._numbers = count(1)
        self._deaths = 0
        self._not_before = 0.0

    def tend(self, free: Sequence[Device]) -> None:
        """Bury the dead and start one that is missing.

        Args:
            free: the slots without a job.
        """
        for standby in [s for s in self._waiting if s.process.exit_code() is not None]:
            self._bury(standby)
        if time.monotonic() < self._not_before:
            return
        engines, available, packages = self._engines(), available_bytes(), packages_of()
        for standby in [s for s in self._waiting if s.engine not in engines or s.packages != packages]:
            self._end(standby)
        if self._waiting and available < STAY_BYTES:
            logger.warning("The standbys end: %d MiB of memory are available", available >> 20)
            self.close()
            self._not_before = time.monotonic() + RETRY_SECONDS
        if available < START_BYTES:
            return
        # On the CPU a job has all cores, and another's imports would only take them away.
        devices = [*free, *(slot for slot in self._slots if slot.kind == "cuda" and slot not in free)]
        for engine in engines:
            for device in devices:
                if not any(s.engine == engine and s.serves(engine, device) for s in self._waiting):
                    self._add(engine, device)
                    return

    def take(self, engine: EngineName, device: Device, folder: Path) -> Process | None:
        """The process that has waited for such a job, now in this folder; None if there is none.

        Raises:
            OSError: the folder can't be made.
        """
        self._last_engine = engine
        self._not_before = max(self._not_before, time.monotonic() + REPLACE_SECONDS)
        packages = packages_of()
        ready = [s for s in self._waiting if s.packages == packages]
        for standby in sorted(ready, key=lambda s: s.engine != engine):
            if standby.serves(engine, device) and standby.process.exit_code() is None:
                standby.process.move_to(folder)
                self._waiting.remove(standby)
                self._deaths = 0
                return standby.process
        return None

    def close(self) -> None:
        for standby in list(self._waiting):
            self._end(standby)

    def _engines(self) -> tuple[EngineName, ...]:
        if self._wanted == "off":
            return ()
        if self._wanted == "auto":
            return (self._last_engine,)
        installed = {engine for slot in self._slots for engine in slot.engines}
        return tuple(engine for engine in self._wanted.split(",") if engine in installed)

    def _add(self, engine: EngineName, device: Device) -> None:
        packages = packages_of()
        folder = self._work / f"{STANDBY_PREFIX}{os.getpid()}-{next(self._numbers)}"
        try:
            process = self._start(folder, device, [engine])
        except OSError as error:
            logger.error("A standby could not be started: %s", error)
            self._not_before = time.monotonic() + RETRY_SECONDS
            return
        self._waiting.append(Standby(process, engine, device, packages))
        logger.info("Standby for %s on %s: process %d", engine, device.name, process.pid)

    def _bury(self, standby: Standby) -> None:
        self._deaths += 1
        self._not_before = time.monotonic() + RETRY_SECONDS * self._deaths
        logger.warning(
            "The standby for %s ended while it waited (exit code %s: %s)",
            standby.engine,
            standby.process.exit_code(),
            standby.process.last_words(),
        )
        self._end(standby)

    def _end(self, standby: Standby) -> None:
        standby.process.close()
        self._waiting.remove(standby)
        remove_in_background(standby.process.folder)


def packages_of() -> int:
    """Changes when a package of this Python is installed, upgraded or removed."""
    return max(Path(sysconfig.get_path(name)).stat().st_mtime_ns for name in ("purelib", "platlib"))


def _likely_engine(slots: Sequence[Device]) -> EngineName:
    """What the first job will probably run on: the fastest engine that is installed."""
    installed = {engine for slot in slots for engine in slot.engines}
    for engine in ("compiled", "unsloth", "reference"):
        if engine in installed:
            return engine
    return "reference"
