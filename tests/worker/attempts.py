"""An attempt without a process: a lease, a sink, a folder of checkpoints, and a store that can be held up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared.database import Database
from shared.events import Checkpoint
from shared.repository import logs
from shared.storage import Store
from tests.conftest import wait_for
from worker.checkpoints import checkpoint_folder, complete_checkpoints, discard
from worker.copies import Copies, fetch_copy
from worker.order import Order
from worker.sink import DatabaseSink

FILES = {"adapter.safetensors": bytes(range(256)) * 5000, "checkpoint.json": b"{}", "deep/state": b"s"}


class Stalling(Store):
    """A store that can be held up, and can refuse."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.flows = threading.Event()
        self.flows.set()
        self.begun: list[str] = []
        self.refuses = False

    @contextmanager
    def writing(self, key: str) -> Iterator[IO[bytes]]:
        self.begun.append(key)
        if self.refuses:
            raise PermissionError("s3://secret-bucket is closed")
        with super().writing(key) as file:
            wait_for(self.flows.is_set)
            yield file


@dataclass
class Attempt:
    """An attempt that holds its job's lease, with a folder of checkpoints on a machine of its own."""

    order: Order
    database: Database
    store: Stalling
    sink: DatabaseSink
    folder: Path

    def fetch(self) -> int | None:
        return fetch_copy(self.order, self.database, self.store, self.sink, self.cache)

    @property
    def cache(self) -> Path:
        return self.folder.parents[1] / "cache"

    @contextmanager
    def copies(self, copied: int | None = None) -> Iterator[Copies]:
        running = Copies(self.order, self.store, self.sink, copied)
        self.sink.on_checkpoint = running.offer
        yield running
        running.end(lambda: 0.0)

    def save(self, step: int, content: bytes = b"") -> Path:
        """As the trainer does: it appears whole, and the one before goes."""
        folder = checkpoint_folder(self.folder, step)
        aside = self.folder / ".writing"
        for name, data in FILES.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(data + content)
        aside.rename(folder)
        for old in list(complete_checkpoints(self.folder).values())[:-1]:
            discard(old)
        self.sink.checkpoint(Checkpoint(step=step, path=folder, bytes=1, metrics={}))
        return folder

    def log(self) -> list[str]:
        self.sink._flush()
        with self.database.read() as session:
            return [entry.message for entry in logs.read_entries(session, self.order.job_id, 0, 100)]
