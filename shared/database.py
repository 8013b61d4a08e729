"""The database: engine, transactions, migrations.

A transaction is opened and committed here, at the boundary: `read()` sees one snapshot, `write()` takes
SQLite's write lock at once, so that no reader has to be upgraded to a writer half way and fail. On PostgreSQL
rows are locked, and no process that is frozen or cut off can hold a lock or a connection for long.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sqlalchemy import event, inspect
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session, create_engine

BUSY_TIMEOUT_MS = 15_000
MIGRATIONS = Path(__file__).parent / "migrations"
# The revision that this code needs: the number in the last migration's name.
HEAD = max(path.name for path in (MIGRATIONS / "versions").glob("[0-9]*.py")).partition("_")[0]
# A network that swallows packets without a word is noticed after this many seconds, on both sides: by default
# it takes a quarter of an hour here and two hours there.
SILENT_SECONDS = 60
POSTGRESQL_CLIENT = {
    "connect_timeout": 10,
    "keepalives_idle": SILENT_SECONDS // 2,
    "keepalives_interval": SILENT_SECONDS // 6,
    "keepalives_count": 3,
    "tcp_user_timeout": SILENT_SECONDS * 1000,
}
POSTGRESQL_SESSION = {
    "tcp_keepalives_idle": f"{SILENT_SECONDS // 2}s",
    "tcp_keepalives_interval": f"{SILENT_SECONDS // 6}s",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": f"{SILENT_SECONDS}s",
    # A process that is stopped in mid-transaction would keep the rows of its job from whoever recovers it.
    "idle_in_transaction_session_timeout": f"{SILENT_SECONDS}s",
    "lock_timeout": f"{BUSY_TIMEOUT_MS}ms",
    "timezone": "UTC",
}


class Database:
    """Connections to one database, safe to share between threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _create_engine(url)
        self._writer = self.engine.execution_options(tuneyard_write=True)
        self._reader = self.engine
        # SQLite lets waiting writers try again at growing intervals, and newcomers overtake them: threads of
        # one process had better queue here (measured with 40 of them: p99 of 1.2 s against 0.3 s).
        sqlite = self.engine.dialect.name == "sqlite"
        self._turn: AbstractContextManager[Any] = threading.Lock() if sqlite else nullcontext()
        if not sqlite:
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session for reading; nothing is committed, and no row locked."""
        with Session(self._reader, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session whose changes are committed together at the end, or not at all."""
        with self._turn, Session(self._writer, expire_on_commit=False) as session, session.begin():
            yield session

    def migrate(self) -> None:
        """Bring the schema up to date. Safe to call from several processes at once."""
        if self._revision() == HEAD:
            return
        # Of a box's processes one finds something to do; alembic takes each a tenth of its start to import.
        from alembic import command  # noqa: PLC0415
        from alembic.config import Config  # noqa: PLC0415

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self._writer.begin() as connection:
            if connection.dialect.name == "postgresql":
                # SQLite's write lock is held already; PostgreSQL needs one of its own.
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
                connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7461726480)")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _revision(self) -> str | None:
        with self._reader.connect() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
            return found

    def close(self) -> None:
        """Close the connections; that of a thread which is still at work, when it is done."""
        event.listen(self.engine, "checkin", _close_connection)
        self.engine.dispose()


def _create_engine(url: str) -> Engine:
    # Parameters are hidden: errors go into logs, and what owners store is not to be read there.
    if not make_url(url).drivername.startswith("sqlite"):
        engine = create_engine(
            url,
            connect_args=POSTGRESQL_CLIENT,
            pool_size=20,
            max_overflow=30,
            pool_pre_ping=True,
            json_serializer=_compact_json,
            hide_parameters=True,
        )
        event.listen(engine, "connect", _configure_postgresql)
        return engine
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_TIMEOUT_MS / 1000, "check_same_thread": False},
        pool_size=20,
        max_overflow=30,
        json_serializer=_compact_json,
        hide_parameters=True,
    )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _compact_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _configure_sqlite(connection: Any, _record: ConnectionPoolEntry) -> None:
    # The driver's own BEGIN comes too late and is never IMMEDIATE: _begin_sqlite sends ours.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _configure_postgresql(connection: Any, _record: ConnectionPoolEntry) -> None:
    # Not as options of the connection: poolers in between refuse those.
    settings = ", ".join(
        f"set_config('{name}', '{value}', false)" for name, value in POSTGRESQL_SESSION.items()
    )
    connection.execute(f"SELECT {settings}")
    connection.commit()


def _close_connection(_connection: Any, record: ConnectionPoolEntry) -> None:
    record.invalidate()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("tuneyard_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


__all__ = ["Database", "Session"]
