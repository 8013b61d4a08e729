"""Owners' secrets, and who did what"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from shared.columns import BIG_ID, UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "owner_secret",
        sa.Column("owner", sa.String(), primary_key=True),
        sa.Column("name", sa.String(), primary_key=True),
        sa.Column("sealed", sa.String(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
    )
    op.create_table(
        "audit_entry",
        sa.Column("id", BIG_ID, primary_key=True, autoincrement=True),
        sa.Column("time", UtcDateTime(), nullable=False),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("key_id", sa.Integer(), nullable=True),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("object", sa.String(), nullable=True),
        sa.Column("result", sa.Integer(), nullable=False),
        sa.Column("address", sa.String(), nullable=True),
    )
    op.create_index("ix_audit_entry_time", "audit_entry", ["time"])
    op.create_index("ix_audit_entry_owner", "audit_entry", ["owner"])


def downgrade() -> None:
    for table in ("audit_entry", "owner_secret"):
        op.drop_table(table)
