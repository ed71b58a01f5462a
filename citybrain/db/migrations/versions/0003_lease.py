"""The lease: which of several desks writes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    lease = op.create_table(
        "lease",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        comment="who may write: locked and compared in every transaction of a writer",
    )
    # The row is always there, so that it can be locked.
    op.bulk_insert(lease, [{"name": "desk", "holder": "", "generation": 0, "until": 0}])
