"""Short rows for logs, an index for every page, and tallies of what has happened"""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa
from alembic import op

from shared.columns import Microseconds, UtcDateTime, Word

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

LEVELS = ("info", "debug", "warning", "error")
ENTRY_TYPES = ("message", "metrics", "phase")
ENDED = ("succeeded", "failed", "cancelled")
# As they were when this was written.
WAITING = (1, 10, 60, 300, 900, 3600, 14_400, 86_400, 604_800)
RUNNING = (60, 300, 900, 3600, 14_400, 43_200, 86_400, 259_200, 604_800)
AT_A_TIME = 1000

job = sa.table(
    "job",
    *[sa.column(name) for name in ("id", "number", "owner", "status", "failure", "attempt", "run_seconds")],
    sa.column("created_at", UtcDateTime()),
    sa.column("started_at", UtcDateTime()),
    sa.column("user_metadata", sa.JSON()),
    sa.column("failure", sa.JSON()),
)


def upgrade() -> None:
    op.add_column("worker", sa.Column("gpus", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("job", sa.Column("number", sa.BigInteger(), nullable=False, server_default="0"))
    _create_labels_and_tallies()
    _go_over_jobs()
    _change_indexes()
    _shorten_logs()


def _create_labels_and_tallies() -> None:
    op.create_table(
        "job_label",
        sa.Column("job_id", sa.String(), sa.ForeignKey("job.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(), primary_key=True),
        sa.Column("value", sa.String(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
    )
    op.create_index("ix_job_label_owner_page", "job_label", ["owner", "key", "value", "created_at", "job_id"])
    op.create_index("ix_job_label_page", "job_label", ["key", "value", "created_at", "job_id"])
    op.create_table(
        "tally",
        sa.Column("owner", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("label", sa.String(), primary_key=True),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.Float(), nullable=False),
    )


def _go_over_jobs() -> None:
    """Give each job its number, write out its metadata, and count what has happened to it."""
    connection = op.get_bind()
    numbered = job.update().where(job.c.id == sa.bindparam("of")).values(number=sa.bindparam("given"))
    label = sa.table("job_label", *[sa.column(n) for n in ("job_id", "key", "value", "owner")],
                     sa.column("created_at", UtcDateTime()))  # fmt: skip
    tallies: dict[tuple[str, str, str], list[float]] = {}
    after = ""
    while rows := connection.execute(
        sa.select(job).where(job.c.id > after).order_by(job.c.id).limit(AT_A_TIME)
    ).all():
        after = rows[-1].id
        connection.execute(numbered, [{"of": row.id, "given": secrets.randbits(63)} for row in rows])
        labels = [
            {"job_id": row.id, "key": k, "value": v, "owner": row.owner, "created_at": row.created_at}
            for row in rows
            for k, v in row.user_metadata.items()
        ]
        if labels:
            connection.execute(label.insert(), labels)
        for row in rows:
            _count(row, tallies)
    tally = sa.table("tally", *[sa.column(n) for n in ("owner", "name", "label", "count", "total")])
    for (owner, name, of), (count, total) in tallies.items():
        connection.execute(
            tally.insert().values(owner=owner, name=name, label=of, count=int(count), total=total)
        )


def _count(row: Any, tallies: dict[tuple[str, str, str], list[float]]) -> None:
    found = []
    if row.started_at is not None:
        waited = (row.started_at - row.created_at).total_seconds()
        found.append(("waiting_seconds", _bucket(WAITING, waited), waited))
    if row.status in ENDED:
        found.append(("jobs", row.status, 0.0))
        if row.started_at is not None:
            found.append(("running_seconds", _bucket(RUNNING, row.run_seconds), row.run_seconds))
        if row.status == "failed" and row.failure:
            found.append(("failures", row.failure["code"], 0.0))
    for name, label, seconds in found:
        counted = tallies.setdefault((row.owner, name, label), [0, 0.0])
        counted[0] += 1
        counted[1] += seconds


def _bucket(bounds: tuple[int, ...], seconds: float) -> str:
    return next((str(bound) for bound in bounds if seconds <= bound), "+Inf")


def _change_indexes() -> None:
    op.create_index("ix_job_number", "job", ["number"], unique=True)
    for index in ("ix_job_owner_status", "ix_job_model", "ix_job_announced"):
        op.drop_index(index, "job")
    op.create_index("ix_job_news", "job", ["announced", "status"])
    op.create_index("ix_job_page", "job", ["created_at", "id"])
    for column in ("status", "model"):
        op.create_index(f"ix_job_{column}_page", "job", [column, "created_at", "id"])
        op.create_index(f"ix_job_owner_{column}_page", "job", ["owner", column, "created_at", "id"])
    op.create_index("ix_idempotency_key_job_id", "idempotency_key", ["job_id"])
    op.create_index("ix_dataset_page", "dataset", ["created_at", "id"])
    op.create_index("ix_dataset_purpose_page", "dataset", ["purpose", "created_at", "id"])
    op.create_index("ix_dataset_owner_purpose_page", "dataset", ["owner", "purpose", "created_at", "id"])


def _shorten_logs() -> None:
    """Write both tables anew: a key cannot be changed in place."""
    op.create_table(
        "new_log_entry",
        _number(),
        sa.Column("seq", sa.BigInteger(), primary_key=True, autoincrement=False),
        sa.Column("time", Microseconds(), nullable=False),
        sa.Column("level", Word(*LEVELS), nullable=False),
        sa.Column("type", Word(*ENTRY_TYPES), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=True),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "new_metric",
        _number(),
        sa.Column("step", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("values", sa.JSON(), nullable=False),
        sqlite_with_rowid=False,
    )
    sqlite = op.get_bind().dialect.name == "sqlite"
    # SQLite has the time as text, always with its microseconds.
    time = (
        "CAST(strftime('%s', time) AS INTEGER) * 1000000 + CAST(substr(time, 21) AS INTEGER)"
        if sqlite
        else "CAST(round(extract(epoch FROM time) * 1000000) AS bigint)"
    )
    level, kind = _place("level", LEVELS), _place("type", ENTRY_TYPES)
    op.execute(
        "INSERT INTO new_log_entry (job_number, seq, time, level, type, message, data) "  # noqa: S608
        f"SELECT number, seq, {time}, {level}, {kind}, message, data "
        "FROM log_entry JOIN job ON job.id = job_id ORDER BY number, seq"
    )
    op.execute(
        'INSERT INTO new_metric (job_number, step, "values") SELECT number, step, "values" '
        "FROM metric JOIN job ON job.id = job_id ORDER BY number, step"
    )
    for table in ("log_entry", "metric"):
        op.drop_table(table)
        op.rename_table(f"new_{table}", table)


def _number() -> sa.Column[int]:
    key = sa.ForeignKey("job.number", ondelete="CASCADE")
    return sa.Column("job_number", sa.BigInteger(), key, primary_key=True, autoincrement=False)


def _place(column: str, words: tuple[str, ...]) -> str:
    cases = " ".join(f"WHEN '{word}' THEN {place}" for place, word in enumerate(words))
    return f"CASE {column} {cases} ELSE 0 END"
