from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlmodel import select

from shared.database import Database
from shared.tables import ApiKey, Job

pytestmark = pytest.mark.postgresql


def test_the_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as session:
        context = MigrationContext.configure(session.connection(), opts={"compare_type": False})
        assert compare_metadata(context, Job.metadata) == []


def test_several_processes_may_migrate_at_once(empty_database: str) -> None:
    def migrate() -> None:
        opened = Database(empty_database)
        opened.migrate()
        opened.close()

    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(migrate) for _ in range(4)]
    assert [future.exception() for future in done] == [None] * 4


def test_sqlite_is_set_up_for_several_processes(database: Database) -> None:
    if database.engine.dialect.name != "sqlite":
        pytest.skip("looks at SQLite itself")
    with database.read() as session:
        pragmas = {
            name: session.connection().execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "foreign_keys": 1, "busy_timeout": 15_000}


def test_nothing_of_a_failed_transaction_stays(database: Database) -> None:
    def fail() -> None:
        with database.write() as session:
            session.add(ApiKey(name="x", key_hash="h", hint="h"))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with database.read() as session:
        assert session.exec(select(ApiKey)).all() == []


def test_an_error_does_not_quote_what_was_stored(database: Database) -> None:
    with database.write() as session:
        session.add(ApiKey(name="x", key_hash="the hash", hint="h"))
    with pytest.raises(IntegrityError) as caught, database.write() as session:
        session.add(ApiKey(name="somebody", key_hash="the hash", hint="h"))
    assert "INSERT INTO api_key" in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_times_come_back_in_utc_and_a_time_without_zone_is_refused(database: Database) -> None:
    east = datetime(2026, 5, 4, 12, 0, tzinfo=timezone(timedelta(hours=3)))
    with database.write() as session:
        session.add(ApiKey(name="x", key_hash="h", hint="h", created_at=east))
    with database.read() as session:
        (row,) = session.exec(select(ApiKey)).all()
    assert row.created_at == datetime(2026, 5, 4, 9, 0, tzinfo=UTC)
    assert row.created_at.utcoffset() == timedelta(0)
    naive = datetime(2026, 5, 4, 12, 0)
    with pytest.raises(Exception, match="without a zone"), database.write() as session:
        session.add(ApiKey(name="y", key_hash="i", hint="h", created_at=naive))


def test_a_connection_that_is_in_use_when_all_are_closed_is_closed_afterwards(database: Database) -> None:
    with database.read() as session:
        connection = session.connection().connection.dbapi_connection
        assert connection is not None
        database.close()
        assert session.exec(select(ApiKey)).all() == []
    with pytest.raises(Exception, match="closed"):
        connection.cursor().execute("SELECT 1")
