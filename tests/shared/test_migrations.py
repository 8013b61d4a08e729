"""A database of an earlier version keeps what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlmodel import select

from shared.columns import UtcDateTime
from shared.database import HEAD, MIGRATIONS, Database
from shared.repository import jobs, logs, tallies
from shared.repository.jobs import Page
from shared.repository.logs import StoredEntry
from shared.tables import Job, LogEntry, Metric

pytestmark = pytest.mark.postgresql

CONFIG = Config()
CONFIG.set_main_option("script_location", str(MIGRATIONS))
VERSIONS = sorted(script.revision for script in ScriptDirectory.from_config(CONFIG).walk_revisions())
JOB = "ftjob-1"
# What a migration may look at; any other column gets a value of its type.
TEXTS = {
    "job_id": JOB, "status": "succeeded", "type": "message", "level": "info", "message": "Accepted.",
}  # fmt: skip
OBJECTS = {"spec": {"gpus": 1}, "user_metadata": {"team": "a"}}
# Tables that a migration writes anew, in other columns.
WRITTEN_ANEW = {"log_entry", "metric"}
MADE = datetime(2026, 3, 1, 12, 30, 59, 7, tzinfo=UTC)


def upgrade(connection: sa.Connection, version: str) -> None:
    CONFIG.attributes["connection"] = connection
    command.upgrade(CONFIG, version)


@pytest.fixture
def old(empty_database: str) -> Iterator[Database]:
    """A database as it was before logs had short rows."""
    opened = Database(empty_database)
    with opened.engine.begin() as connection:
        upgrade(connection, "0008")
    yield opened
    opened.close()


def insert(database: Database, table: str, **values: object) -> None:
    kinds = {datetime: UtcDateTime(), dict: sa.JSON(), list: sa.JSON()}
    columns = [sa.column(name, kinds.get(type(value))) for name, value in values.items()]
    with database.write() as session:
        session.connection().execute(sa.table(table, *columns).insert().values(values))


def add_job(database: Database, job_id: str, status: str, minutes: int, **values: object) -> None:
    insert(
        database, "job", id=job_id, owner="ann", status=status, model="m", priority=1, spec={}, place=0,
        user_metadata={"team": "a"}, plan_history=[], attempt=1, losses=0, run_seconds=90.0, last_seq=2,
        created_at=MADE + timedelta(minutes=minutes), started_at=MADE + timedelta(minutes=minutes + 1),
        announced=True, **values,
    )  # fmt: skip


def test_the_version_that_this_code_looks_for_is_the_newest() -> None:
    assert VERSIONS[-1] == HEAD


def test_logs_labels_and_counts_of_before(old: Database) -> None:
    add_job(old, "ftjob-1", "succeeded", 0)
    add_job(old, "ftjob-2", "failed", 1, failure={"code": "diverged", "message": "m", "advice": "a"})
    add_job(old, "ftjob-3", "running", 2)
    said = {"level": "warning", "type": "message", "message": "Ä", "data": {"a": [1, "é"]}}
    counted = {"level": "info", "type": "metrics", "message": "step 1", "data": None}
    for job_id in ("ftjob-2", "ftjob-1"):
        insert(old, "log_entry", job_id=job_id, seq=1, time=MADE, **said)
        insert(old, "log_entry", job_id=job_id, seq=2, time=MADE + timedelta(seconds=61), **counted)
    insert(old, "metric", job_id="ftjob-1", step=7, values={"step": 7, "loss": 0.5})
    old.migrate()
    with old.read() as session:
        assert logs.read_entries(session, "ftjob-1", 0, 10) == [
            StoredEntry(1, MADE, "warning", "message", "Ä", {"a": [1, "é"]}),
            StoredEntry(2, MADE + timedelta(seconds=61), "info", "metrics", "step 1", None),
        ]
        assert len(logs.read_entries(session, "ftjob-2", 0, 10)) == 2
        assert logs.read_metrics(session, "ftjob-1") == [{"step": 7, "loss": 0.5}]
        labelled, more = jobs.list_jobs(session, "ann", Page(limit=2), metadata={"team": "a"})
        assert ([job.id for job in labelled], more) == (["ftjob-3", "ftjob-2"], True)
        assert jobs.count_by_status(session, "ann") == {"running": 1, "succeeded": 1, "failed": 1}
        found = tallies.read(session, None, [tallies.FAILURES, tallies.WAITING, tallies.RUNNING])
        assert found == {
            tallies.FAILURES: {"diverged": (1, 0)},
            tallies.WAITING: {"60": (3, 180)},
            tallies.RUNNING: {"300": (2, 180)},
        }
    with old.write() as session:
        session.delete(session.get(Job, "ftjob-1"))
    with old.read() as session:
        assert logs.read_entries(session, "ftjob-1", 0, 10) == []
        assert [len(session.exec(select(table)).all()) for table in (LogEntry, Metric)] == [2, 0]


def value_of(table: str, column: Any) -> Any:
    if column.name == "id" and table == "job":
        return JOB
    samples = (
        (sa.Boolean, True), (sa.Integer, 1), (sa.Float, 7.5), (sa.DateTime, MADE),
        (sa.JSON, OBJECTS.get(column.name, {"a": [1]})), (sa.String, TEXTS.get(column.name, "row")),
    )  # fmt: skip
    return next(sample for kind, sample in samples if isinstance(column.type, kind))


def rows_of(connection: sa.Connection) -> dict[str, list[dict[str, Any]]]:
    tables = sa.MetaData()
    tables.reflect(connection)
    return {
        table.name: [dict(row) for row in connection.execute(table.select()).mappings()]
        for table in tables.sorted_tables
        if table.name != "alembic_version"
    }


def fill(connection: sa.Connection) -> None:
    """One row into every table."""
    tables = sa.MetaData()
    tables.reflect(connection)
    for table in tables.sorted_tables:
        if table.name != "alembic_version":
            connection.execute(table.insert().values({c: value_of(table.name, c) for c in table.columns}))


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_every_version_are_there_in_the_newest(empty_database: str, version: str) -> None:
    opened = Database(empty_database)
    with opened.engine.begin() as connection:
        upgrade(connection, version)
        fill(connection)
        before = rows_of(connection)
    opened.migrate()
    with opened.engine.connect() as connection:
        after = rows_of(connection)
    for name, (row,) in before.items():
        (kept,) = after[name]
        if name not in WRITTEN_ANEW:
            assert {column: kept[column] for column in row} == row, name
    with opened.read() as session:
        (entry,) = logs.read_entries(session, JOB, 0, 10)
        assert len(logs.read_metrics(session, JOB)) == 1
    assert (entry.seq, entry.message) == (1, "Accepted.")
    opened.close()
