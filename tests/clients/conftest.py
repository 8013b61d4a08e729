"""A box as its users' programs see it: `tuneyard serve`, and a worker whose pipeline trains nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from shared.database import Database
from shared.device import Device
from shared.queue import Doorbell
from shared.repository import keys
from shared.settings import Settings
from tests.cli.test_serve import Served
from tests.conftest import Databases
from worker.supervisor import Supervisor

MODEL = "bundled/smollm2-135m-instruct"
ROW = b'{"messages":[{"role":"user","content":"hi"},{"role":"assistant","content":"hello %d"}]}\n'
ROWS = b"".join(ROW % n for n in range(20))

FAKE = "tests.worker.fake_child"
# Webhooks may come back to this machine, and soon.
SERVED = {
    "HF_HUB_OFFLINE": "1",
    "TUNEYARD_WEBHOOK_PRIVATE": "true",
    "TUNEYARD_WEBHOOK_RETRY_SECONDS": "0.05",
}


@dataclass(frozen=True)
class Box:
    """Where it is, and the keys of three owners; eve's jobs are those that webhooks are told of."""

    url: str
    ann: str
    bob: str
    eve: str
    settings: Settings
    database: Database
    served: Served

    def client(self, key: str | None = None, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.ann, timeout=20, **options)


@pytest.fixture(scope="session")
def box(tmp_path_factory: pytest.TempPathFactory, databases: Databases) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("box") / "data"
    database_url = databases.create()
    served = Served(folder, database_url, "--no-worker", **SERVED)
    url = served.ready()
    settings = Settings(data_dir=folder, database_url=database_url, poll_seconds=0.2, standby="off")
    database, doorbell = Database(settings.database()), Doorbell(settings.redis())
    with database.write() as session:
        ann, bob, eve = (keys.create_key(session, name, admin=False) for name in ("ann", "bob", "eve"))
    supervisor = Supervisor(settings, database, doorbell, [Device("cpu", 0, "CPU", 8 << 30)], FAKE)
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    yield Box(url, ann, bob, eve, settings, database, served)
    supervisor.stop()
    thread.join(20)
    doorbell.close()
    database.close()
    served.process.terminate()
    served.process.wait(20)
    if served.process.stdout is not None:
        served.process.stdout.close()


@pytest.fixture
def client(box: Box) -> Iterator[openai.OpenAI]:
    with box.client() as opened:
        yield opened
