"""Owners with what they have used and their quotas, and a job's place among its owner's"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from shared.clock import month_of, utcnow
from shared.columns import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_key", sa.Column("high", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "owner",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("counted_at", UtcDateTime(), nullable=False),
        sa.Column("month", UtcDateTime(), nullable=False),
        sa.Column("month_gpu_seconds", sa.Float(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("max_queued_jobs", sa.Integer(), nullable=True),
        sa.Column("max_running_jobs", sa.Integer(), nullable=True),
        sa.Column("max_gpu_hours", sa.Float(), nullable=True),
        sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
    )
    op.add_column("job", sa.Column("expected_seconds", sa.Float(), nullable=True))
    op.add_column("job", sa.Column("place", sa.BigInteger(), nullable=False, server_default="0"))
    op.drop_index("ix_job_claim", "job")
    op.create_index("ix_job_claim", "job", ["status", "priority", "owner", "place", "id"])
    _place_waiting_jobs()
    _count_stored_bytes()


def downgrade() -> None:
    op.drop_index("ix_job_claim", "job")
    op.create_index("ix_job_claim", "job", ["status", "priority", "created_at"])
    op.drop_column("job", "place")
    op.drop_column("job", "expected_seconds")
    op.drop_table("owner")
    op.drop_column("api_key", "high")


def _place_waiting_jobs() -> None:
    job = sa.table(
        "job",
        sa.column("id"),
        sa.column("place"),
        sa.column("status"),
        sa.column("created_at", UtcDateTime()),
    )
    ended = ("succeeded", "failed", "cancelled")
    connection = op.get_bind()
    found = connection.execute(sa.select(job.c.id, job.c.created_at).where(job.c.status.not_in(ended)))
    for job_id, created_at in found.all():
        place = int(created_at.timestamp() * 1e9)
        connection.execute(job.update().where(job.c.id == job_id).values(place=place))


def _count_stored_bytes() -> None:
    job = sa.table("job", sa.column("id"), sa.column("owner"))
    dataset = sa.table("dataset", sa.column("owner"), sa.column("bytes"))
    artifact = sa.table("artifact", sa.column("job_id"), sa.column("bytes"))
    owner = sa.table(
        "owner",
        sa.column("name"),
        sa.column("gpu_seconds"),
        sa.column("counted_at", UtcDateTime()),
        sa.column("month", UtcDateTime()),
        sa.column("month_gpu_seconds"),
        sa.column("stored_bytes"),
    )
    held = sa.union_all(
        sa.select(dataset.c.owner, dataset.c.bytes),
        sa.select(job.c.owner, artifact.c.bytes).join_from(job, artifact, job.c.id == artifact.c.job_id),
    ).subquery()
    connection = op.get_bind()
    now = utcnow()
    used = {"gpu_seconds": 0, "counted_at": now, "month": month_of(now), "month_gpu_seconds": 0}
    total = sa.select(held.c.owner, sa.func.sum(held.c.bytes)).group_by(held.c.owner)
    for name, stored in connection.execute(total).all():
        connection.execute(owner.insert().values(name=name, stored_bytes=int(stored), **used))
