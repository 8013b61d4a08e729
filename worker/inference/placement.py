"""Whether a model may have a GPU: only while no job wants one, and what is free suffices."""

from __future__ import annotations

import logging

from shared.database import Database
from shared.errors import Unavailable
from shared.lifecycle import LEASED, JobStatus
from shared.repository.jobs import count_by_status
from shared.settings import Settings
from worker.gpus import measure_free, probe_gpus

# Beside the model and its context: CUDA itself and its buffers.
CUDA_BYTES = 1 << 30

logger = logging.getLogger(__name__)


class Placement:
    """Looks at the queue and at the GPUs of this machine. Slow: for a thread."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._off = settings.inference_gpu == "off"
        self._database = database

    def find_gpu(self, need: int) -> int | None:
        """The GPU with the most free memory, if that holds `need` bytes and no job waits or runs; else None.

        A job of any machine counts: which one takes it is not known before.
        """
        if self._off or self.is_wanted():
            return None
        try:
            devices = measure_free(probe_gpus())
        except Unavailable as error:
            logger.warning("Models answer on the CPU: %s", error)
            return None
        best = max(devices, key=lambda device: device.memory_bytes, default=None)
        return best.index if best is not None and best.memory_bytes >= need + CUDA_BYTES else None

    def is_wanted(self) -> bool:
        """Whether a job waits or runs, which models must make way for."""
        with self._database.read() as session:
            counts = count_by_status(session, None)
        return any(counts.get(status) for status in (JobStatus.QUEUED, *LEASED))
