"""What happened, in the order in which it was committed: triggers in the database under test write it down.

Tuneyard itself keeps no record of who held which lease when, nor of which attempt wrote what. SQLite's
writers come one after the other, so the triggers' ids are the order of commits. PostgreSQL's do so for each
job: whoever writes for it has its row locked until the commit.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import text

from shared.database import Database

_TABLE = """
CREATE TABLE chaos_history (
    id {number},
    what TEXT NOT NULL,
    job_id TEXT NOT NULL,
    status TEXT,
    attempt INTEGER,
    holders TEXT NOT NULL,
    told TEXT,
    detail TEXT
)
"""
_NUMBER = {
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}
# The tokens that hold a lease on the job, or on an export of it, at the moment of the write.
_HOLDERS = """
    (SELECT coalesce(lease_token, '') FROM job WHERE id = {job})
    || ' ' || coalesce((SELECT {concat}(lease_token, ' ') FROM export_task
                        WHERE job_id = {job} AND status = 'running'), '')
"""
_CONCAT = {"sqlite": "group_concat", "postgresql": "string_agg"}
_INSERT = """
    INSERT INTO chaos_history (what, job_id, status, attempt, holders, told, detail)
    VALUES ('{what}', {job}, (SELECT status FROM job WHERE id = {job}),
            (SELECT attempt FROM job WHERE id = {job}), {holders}, {told}, {detail});
"""
_TRIGGER = {
    "sqlite": "CREATE TRIGGER chaos_{name} {event} WHEN {when} BEGIN {insert} END",
    "postgresql": """
        CREATE FUNCTION chaos_{name}() RETURNS trigger LANGUAGE plpgsql AS $body$
        BEGIN {insert} RETURN NULL; END $body$;
        CREATE TRIGGER chaos_{name} {event} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION chaos_{name}();
    """,
}


def _json(column: str, name: str) -> dict[str, str]:
    return {
        "sqlite": f"json_extract(NEW.{column}, '$.{name}')",
        "postgresql": f"(NEW.{column} ->> '{name}')",
    }


def _plain(expression: str) -> dict[str, str]:
    return dict.fromkeys(_NUMBER, expression)


def _changes(*columns: str) -> dict[str, str]:
    return {
        "sqlite": " OR ".join(f"OLD.{c} IS NOT NEW.{c}" for c in columns),
        "postgresql": " OR ".join(f"OLD.{c}::text IS DISTINCT FROM NEW.{c}::text" for c in columns),
    }


@dataclass(frozen=True)
class _Trigger:
    """One write that leaves a row: the expressions, by dialect where they differ."""

    name: str
    event: str
    what: str
    job: str
    told: dict[str, str]
    detail: str
    when: dict[str, str]

    def statement(self, dialect: str) -> str:
        holders = _HOLDERS.format(job=self.job, concat=_CONCAT[dialect])
        insert = _INSERT.format(
            what=self.what, job=self.job, holders=holders, told=self.told[dialect], detail=self.detail
        )
        return _TRIGGER[dialect].format(
            name=self.name, event=self.event, when=self.when[dialect], insert=insert
        )


_ALWAYS = _plain("1 = 1")
_NUMBERED = "(SELECT id FROM job WHERE number = NEW.job_number)"
_LEASED = _changes("status", "lease_token")


def _either(table: str, what: str, job: str, told: dict[str, str], detail: str) -> list[_Trigger]:
    """A row of the table is written, or written again."""
    return [
        _Trigger(f"{what}_{number}", f"AFTER {event} ON {table}", what, job, told, detail, _ALWAYS)
        for number, event in enumerate(("INSERT", "UPDATE"))
    ]


_TRIGGERS = [
    _Trigger("made", "AFTER INSERT ON job", "job", "NEW.id", _plain("NULL"), "NULL", _ALWAYS),
    _Trigger("changed", "AFTER UPDATE ON job", "job", "NEW.id", _plain("NULL"), "NEW.worker", _LEASED),
    _Trigger(
        "report", "AFTER UPDATE ON job", "report", "NEW.id", _json("data_report", "token"), "NULL",
        _changes("data_report"),
    ),
    _Trigger(
        "entry", "AFTER INSERT ON log_entry", "entry", _NUMBERED, _json("data", "token"), "NEW.seq", _ALWAYS
    ),
    _Trigger(
        "artifact", "AFTER INSERT ON artifact", "artifact", "NEW.job_id", _plain("NEW.key"), "NEW.name",
        _ALWAYS,
    ),
    *_either("metric", "metric", _NUMBERED, _json('"values"', "attempt"), "NEW.step"),
    *_either("checkpoint", "checkpoint", "NEW.job_id", _json("metrics", "attempt"), "NEW.step"),
    *_either("checkpoint_copy", "copy", "NEW.job_id", _plain("NEW.key"), "NEW.step"),
    _Trigger(
        "results", "AFTER INSERT ON dataset", "results", "NEW.job_id", _plain("NEW.key"), "NEW.id",
        _plain("NEW.job_id IS NOT NULL"),
    ),
    _Trigger(
        "export_made", "AFTER INSERT ON export_task", "export", "NEW.job_id", _plain("NEW.status"), "NEW.id",
        _ALWAYS,
    ),
    _Trigger(
        "export_changed", "AFTER UPDATE ON export_task", "export", "NEW.job_id", _plain("NEW.status"),
        "NEW.id", _LEASED,
    ),
]  # fmt: skip
# After it there is no row to look into.
_DELETED = """
    INSERT INTO chaos_history (what, job_id, status, attempt, holders)
    VALUES ('deleted', OLD.id, OLD.status, OLD.attempt, coalesce(OLD.lease_token, ''));
"""


@dataclass(frozen=True)
class Event:
    """One write. `status`, `attempt` and `holders` are the job's at that moment.

    `told` is what the write says of its writer: the token in an entry's data or a report, the attempt in a
    metric's or a checkpoint's row, the key of an artifact, a copy or results (with the token), an export's
    status. `detail` is what was written: a worker's name, a seq, an artifact's name, a step, an export's id.
    """

    id: int
    what: str
    job_id: str
    status: str | None
    attempt: int | None
    holders: tuple[str, ...]
    told: str | None
    detail: str | None


def record_history(database: Database) -> None:
    """Make every later write leave a row."""
    dialect = database.engine.dialect.name
    deleted = _TRIGGER[dialect].format(
        name="deleted", event="AFTER DELETE ON job", when="1 = 1", insert=_DELETED
    )
    with database.engine.begin() as connection:
        connection.exec_driver_sql(_TABLE.format(number=_NUMBER[dialect]))
        for statement in (*(trigger.statement(dialect) for trigger in _TRIGGERS), deleted):
            connection.exec_driver_sql(statement)


def read_history(database: Database) -> list[Event]:
    statement = (
        "SELECT id, what, job_id, status, attempt, holders, told, detail FROM chaos_history ORDER BY id"
    )
    with database.read() as session:
        rows = session.connection().execute(text(statement)).all()
    return [
        Event(
            number, what, job_id, status, attempt, tuple(holders.split()),
            None if told is None else str(told), None if detail is None else str(detail),
        )
        for number, what, job_id, status, attempt, holders, told, detail in rows
    ]  # fmt: skip
