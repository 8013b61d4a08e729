"""A supervisor that runs in a thread of the test, with children that are real processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from shared.database import Database
from shared.device import Device
from shared.queue import Doorbell
from shared.settings import Settings
from tests.conftest import PATIENCE
from tests.worker.training.warm import fork_programs
from worker.supervisor import Supervisor

CPU = Device("cpu", 0, "CPU", 8 << 30)
Start = Callable[..., Supervisor]


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    bell = Doorbell(settings.redis())
    yield bell
    bell.close()


@pytest.fixture
def start(
    settings: Settings, database: Database, doorbell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Start]:
    """Start supervisors; all are stopped at the end. Their children are forked from a process that has made
    the imports, or with `forked=False` started from nothing, as a worker's are."""
    running: list[tuple[Supervisor, threading.Thread]] = []

    def begin(
        slots: int = 1,
        module: str = "tests.worker.fake_child",
        devices: list[Device] | None = None,
        *,
        forked: bool = True,
        **changes: object,
    ) -> Supervisor:
        if forked:
            monkeypatch.setattr("worker.process.subprocess", fork_programs())
        devices = devices or [Device("cpu", n, "CPU", 8 << 30) for n in range(slots)]
        supervisor = Supervisor(settings.model_copy(update=changes), database, doorbell, devices, module)
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        running.append((supervisor, thread))
        return supervisor

    yield begin
    for supervisor, thread in running:
        supervisor.stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()
