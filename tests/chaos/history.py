"""What happened, in the order in which it was committed: triggers in the database under test write it down.

Tuneyard itself keeps no record of who held which lease when, nor of which attempt wrote what. SQLite's
writers come one after the other, so the triggers' ids are the order of commits.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

_TABLE = """
CREATE TABLE IF NOT EXISTS chaos_history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    what TEXT NOT NULL,
    job_id TEXT NOT NULL,
    status TEXT,
    attempt INTEGER,
    holders TEXT NOT NULL,
    told TEXT,
    detail TEXT
)
"""
# The tokens that hold a lease on the job, or on an export of it, at the moment of the write.
_HOLDERS = """
    (SELECT coalesce(lease_token, '') FROM job WHERE id = {job})
    || ' ' || coalesce((SELECT group_concat(lease_token, ' ') FROM export_task
                        WHERE job_id = {job} AND status = 'running'), '')
"""
_JOB = "(SELECT status FROM job WHERE id = {job}), (SELECT attempt FROM job WHERE id = {job})"


def _trigger(name: str, event: str, what: str, job: str, told: str, detail: str, when: str = "1") -> str:
    return f"""
    CREATE TRIGGER IF NOT EXISTS chaos_{name} AFTER {event} WHEN {when} BEGIN
        INSERT INTO chaos_history (what, job_id, status, attempt, holders, told, detail)
        VALUES ('{what}', {job}, {_JOB.format(job=job)}, {_HOLDERS.format(job=job)}, {told}, {detail});
    END
    """  # noqa: S608 - constants of this file


_CHANGED = "OLD.status IS NOT NEW.status OR OLD.lease_token IS NOT NEW.lease_token"
_NUMBERED = "(SELECT id FROM job WHERE number = NEW.job_number)"
_TRIGGERS = [
    _trigger("made", "INSERT ON job", "job", "NEW.id", "NULL", "NULL"),
    _trigger("changed", "UPDATE ON job", "job", "NEW.id", "NULL", "NEW.worker", _CHANGED),
    f"""
    CREATE TRIGGER IF NOT EXISTS chaos_deleted BEFORE DELETE ON job BEGIN
        INSERT INTO chaos_history (what, job_id, status, attempt, holders)
        VALUES ('deleted', OLD.id, OLD.status, OLD.attempt, {_HOLDERS.format(job="OLD.id")});
    END
    """,  # noqa: S608 - as above
    _trigger(
        "entry", "INSERT ON log_entry", "entry", _NUMBERED, "json_extract(NEW.data, '$.token')", "NEW.seq"
    ),
    _trigger("artifact", "INSERT ON artifact", "artifact", "NEW.job_id", "NEW.key", "NEW.name"),
    _trigger(
        "metric", "INSERT ON metric", "metric", _NUMBERED, "json_extract(NEW.\"values\", '$.attempt')",
        "NEW.step",
    ),
    _trigger(
        "metric_again", "UPDATE ON metric", "metric", _NUMBERED,
        "json_extract(NEW.\"values\", '$.attempt')", "NEW.step",
    ),
    _trigger(
        "checkpoint", "INSERT ON checkpoint", "checkpoint", "NEW.job_id",
        "json_extract(NEW.metrics, '$.attempt')", "NEW.step",
    ),
    _trigger(
        "checkpoint_again", "UPDATE ON checkpoint", "checkpoint", "NEW.job_id",
        "json_extract(NEW.metrics, '$.attempt')", "NEW.step",
    ),
    _trigger(
        "results", "INSERT ON dataset", "results", "NEW.job_id", "NEW.key", "NEW.id", "NEW.job_id IS NOT NULL"
    ),
    _trigger("export_made", "INSERT ON export_task", "export", "NEW.job_id", "NEW.status", "NEW.id"),
    _trigger(
        "export_changed", "UPDATE ON export_task", "export", "NEW.job_id", "NEW.status", "NEW.id",
        _CHANGED,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One write. `status`, `attempt` and `holders` are the job's at that moment.

    `told` is what the write says of its writer: the token in an entry's data, the attempt in a metric's or a
    checkpoint's row, the key of an artifact or of results (which holds the token), an export's status.
    `detail` is what was written: a worker's name, a seq, an artifact's name, a step, an export's id.
    """

    id: int
    what: str
    job_id: str
    status: str | None
    attempt: int | None
    holders: tuple[str, ...]
    told: str | None
    detail: str | None


def record_history(database: Path) -> None:
    """Make every later write leave a row."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(_TABLE)
        for trigger in _TRIGGERS:
            connection.execute(trigger)


def read_history(database: Path) -> list[Event]:
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute(
            "SELECT id, what, job_id, status, attempt, holders, told, detail FROM chaos_history ORDER BY id"
        ).fetchall()
    return [
        Event(
            number, what, job_id, status, attempt, tuple(holders.split()),
            None if told is None else str(told), None if detail is None else str(detail),
        )
        for number, what, job_id, status, attempt, holders, told, detail in rows
    ]  # fmt: skip
