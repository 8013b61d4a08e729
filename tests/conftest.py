"""Fixtures for everything: a data folder, a database, a real Valkey, and waiting with a deadline."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
from sqlalchemy import text

from shared.database import Database
from shared.settings import Settings
from shared.valkey import EmbeddedValkey

T = TypeVar("T")
# How long a test waits for what must come, which is soon: a machine that others use makes no test fail.
PATIENCE = 60.0
# Its own deadlines are of wall time, 0.2 s for an example.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")
TEST_DATABASE = os.environ.get("TUNEYARD_TEST_DATABASE_URL")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that train come first: workers that share files out end together if the last are short."""
    long = {item.path for item in items if item.get_closest_marker("train")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("TUNEYARD_") and n != "TUNEYARD_TEST_DATABASE_URL"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    folder = tmp_path_factory.mktemp("vk")
    with EmbeddedValkey(folder / "run" / "v.sock", folder / "data") as server:
        yield server


@pytest.fixture
def settings(tmp_path: Path, valkey: EmbeddedValkey) -> Settings:
    """Settings of a box of its own, with short times so that tests are quick."""
    return Settings(
        data_dir=tmp_path / "data",
        database_url=TEST_DATABASE,
        redis_url=valkey.url,
        lease_seconds=5,
        poll_seconds=0.2,
        stop_grace_seconds=2,
        checkpoint_grace_seconds=10,
        retry_seconds=0.1,
        standby="off",
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """An empty, migrated database: SQLite in a file, or PostgreSQL where a URL is given."""
    settings.root.mkdir(parents=True, exist_ok=True)
    empty_database()
    opened = Database(settings.database())
    opened.migrate()
    yield opened
    opened.close()


def empty_database() -> None:
    """Forget what earlier tests left in the one PostgreSQL database; a SQLite file is each test's own."""
    if TEST_DATABASE:
        opened = Database(Settings(database_url=TEST_DATABASE).database())
        with opened.write() as session:
            session.connection().execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))
        opened.close()


def wait_for(look: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Look until what is seen is true; fail after the deadline with the last thing seen."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s; last seen: {seen!r}")
        time.sleep(0.01)
    return seen
