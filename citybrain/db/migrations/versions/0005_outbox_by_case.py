"""The messages of a case by index: without it each message of a case reads the whole outbox."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("outbox_by_case", "outbox", ["case_id"])
