"""The model's shape, beside the job"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("job", sa.Column("model_shape", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("job", "model_shape")
