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
from worker.supervisor import Supervisor

CPU = Device("cpu", 0, "CPU", 8 << 30)
Start = Callable[..., Supervisor]


@pytest.fixture
def doorbell(settings: Settings) -> Iterator[Doorbell]:
    bell = Doorbell(settings.redis())
    yield bell
    bell.close()


@pytest.fixture
def start(settings: Settings, database: Database, doorbell: Doorbell) -> Iterator[Start]:
    """Start supervisors; all are stopped at the end."""
    running: list[tuple[Supervisor, threading.Thread]] = []

    def begin(
        slots: int = 1,
        module: str = "tests.worker.fake_child",
        devices: list[Device] | None = None,
        **changes: object,
    ) -> Supervisor:
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
