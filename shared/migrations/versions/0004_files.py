"""Files of other purposes, uploads in parts"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from shared.columns import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("dataset", sa.Column("purpose", sa.String(), nullable=False, server_default="fine-tune"))
    op.add_column("dataset", sa.Column("job_id", sa.String(), nullable=True))
    op.add_column("dataset", sa.Column("expires_at", UtcDateTime(), nullable=True))
    op.create_index("ix_dataset_job_id", "dataset", ["job_id"])
    op.create_index("ix_dataset_expires_at", "dataset", ["expires_at"])
    op.create_table(
        "upload",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("mime_type", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("file_seconds", sa.Integer(), nullable=True),
        sa.Column("file_id", sa.String(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
    )
    op.create_index("ix_upload_owner_status", "upload", ["owner", "status"])
    op.create_table(
        "upload_part",
        sa.Column("id", sa.String(), primary_key=True),
        sa.Column("upload_id", sa.String(), sa.ForeignKey("upload.id", ondelete="CASCADE"), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
    )
    op.create_index("ix_upload_part_upload_id", "upload_part", ["upload_id"])


def downgrade() -> None:
    for table in ("upload_part", "upload"):
        op.drop_table(table)
    for index in ("ix_dataset_expires_at", "ix_dataset_job_id"):
        op.drop_index(index, "dataset")
    for column in ("expires_at", "job_id", "purpose"):
        op.drop_column("dataset", column)
