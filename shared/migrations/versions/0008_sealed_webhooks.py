"""Webhooks' secrets sealed: what is shown of them gets a column; the API seals those that are there"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook", sa.Column("secret_hint", sa.String(), nullable=False, server_default=""))
    op.execute("UPDATE webhook SET secret_hint = substr(secret, 1, 10)")


def downgrade() -> None:
    op.drop_column("webhook", "secret_hint")
