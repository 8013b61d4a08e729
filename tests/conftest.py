"""Fixtures for everything: a data folder, a database, a real Valkey, and waiting with a deadline."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import hypothesis
import pytest
from sqlalchemy.engine import make_url

from shared.database import Database
from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.postgresql import MISSING, PostgreSQL, find_program
from tests.s3 import S3Server

T = TypeVar("T")
# How long a test waits for what must come, which is soon: a machine that others use makes no test fail.
PATIENCE = 60.0
# Its own deadlines are of wall time, 0.2 s for an example.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")
SQLITE, POSTGRESQL = "sqlite", "postgresql"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--database",
        choices=(SQLITE, POSTGRESQL),
        default=SQLITE,
        help="what tests with a database run on; those marked `postgresql` run on it besides. With "
        "postgresql, tests without a database are left out",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `postgresql` run once on each database, or with `only=True` on that one."""
    if "databases" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--database")
        marker = metafunc.definition.get_closest_marker("postgresql")
        if marker is None:
            kinds = [chosen]
        elif marker.kwargs.get("only"):
            kinds = [POSTGRESQL]
        else:
            kinds = [SQLITE, POSTGRESQL] if chosen == SQLITE else [chosen]
        ids = [pytest.HIDDEN_PARAM if kind == chosen else kind for kind in kinds]
        metafunc.parametrize("databases", kinds, ids=ids, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that train come first: workers that share files out end together if the last are short."""
    long = {item.path for item in items if item.get_closest_marker("train")}
    items.sort(key=lambda item: item.path not in long)
    if config.getoption("--database") != SQLITE:
        without = [item for item in items if "databases" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("TUNEYARD_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    folder = tmp_path_factory.mktemp("vk")
    with EmbeddedValkey(folder / "run" / "v.sock", folder / "data") as server:
        yield server


class Databases:
    """New databases for boxes: files in their data folders, or on a server. Migrations run once for all."""

    def __init__(self, folder: Path, server: PostgreSQL | None) -> None:
        self.server = server
        self._template = folder / "migrated.db"
        if server is None:
            opened = Database(f"sqlite:///{self._template}")
            opened.migrate()
            opened.close()

    def create(self) -> str | None:
        """The URL of an empty database that a box is to be given; None for a file in its data folder."""
        return self.server.create() if self.server else None

    def open(self, settings: Settings) -> Database:
        """A box's database, with all tables and no rows; a server's as `create` made it."""
        settings.root.mkdir(parents=True, exist_ok=True)
        if self.server is None:
            shutil.copyfile(self._template, str(make_url(settings.database()).database))
        return Database(settings.database())

    def create_empty(self, folder: Path) -> str:
        """The URL of a database without tables."""
        return self.server.create("template0") if self.server else f"sqlite:///{folder}/empty.db"

    def drop(self, url: str | None) -> None:
        if self.server and url:
            self.server.drop(url)


@pytest.fixture(scope="session")
def databases(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Databases]:
    """Which kind it is is what `pytest_generate_tests` says."""
    folder = tmp_path_factory.mktemp("databases")
    if request.param == SQLITE:
        yield Databases(folder, None)
        return
    if find_program("pg_ctl") is None:
        pytest.skip(MISSING)
    server = PostgreSQL()
    yield Databases(folder, server)
    server.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server(tmp_path_factory.mktemp("s3"))
    wait_for(server.is_ready, 30)
    yield server
    server.close()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, that this process and those it starts find by their environment."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server.bucket()


@pytest.fixture
def database_url(databases: Databases) -> Iterator[str | None]:
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def empty_database(databases: Databases, tmp_path: Path) -> Iterator[str]:
    """SQLAlchemy's URL of a database that no migration has seen."""
    url = databases.create_empty(tmp_path)
    yield Settings(database_url=url).database()
    databases.drop(url)


@pytest.fixture
def settings(tmp_path: Path, valkey: EmbeddedValkey, database_url: str | None) -> Settings:
    """Settings of a box of its own, with short times so that tests are quick."""
    return Settings(
        data_dir=tmp_path / "data",
        database_url=database_url,
        redis_url=valkey.url,
        lease_seconds=5,
        poll_seconds=0.2,
        stop_grace_seconds=2,
        checkpoint_grace_seconds=10,
        retry_seconds=0.1,
        standby="off",
    )


@pytest.fixture
def database(databases: Databases, settings: Settings) -> Iterator[Database]:
    """An empty, migrated database."""
    opened = databases.open(settings)
    yield opened
    opened.close()


def wait_for(look: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Look until what is seen is true; fail after the deadline with the last thing seen."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s; last seen: {seen!r}")
        time.sleep(0.01)
    return seen
