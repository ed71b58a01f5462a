"""The ledger: assets, sensors, organisation, registers, what ingest is asked; cases know all the areas they lie in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("cases") as cases:
        for name in ("workstation", "community", "road", "road_chief"):
            cases.add_column(sa.Column(name, sa.String(), server_default="", nullable=False))
    _assets()
    _sensors()
    op.create_table(
        "organisation",
        _id(),
        *_texts("kind", "key"),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "key"),
        comment="what stands around the assets: read and written whole, looked up by key",
    )
    _registers()
    op.create_table(
        "asked",
        _id(),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        *_texts("actor", "reason"),
        sa.Column("done", sa.Integer(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id"),
        comment="what ingest is to write into the logs; done once it lies in ingest's mailbox",
    )
    waiting = sa.text("done = 0")
    op.create_index("asked_waiting", "asked", ["done"], sqlite_where=waiting, postgresql_where=waiting)


def _id() -> sa.Column[int]:
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False)


def _texts(*names: str) -> list[sa.Column[str]]:
    return [sa.Column(name, sa.String(), nullable=False) for name in names]


def _assets() -> None:
    op.create_table(
        "assets",
        _id(),
        *_texts("code", "kind", "name", "state"),
        sa.Column("lon", sa.Float(), nullable=False),
        sa.Column("lat", sa.Float(), nullable=False),
        *_texts("cell", "grid", "street", "road", "address", "zone", "building", "gateway", "maintainer", "sensor"),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("code"),
    )
    op.create_index("assets_by_kind", "assets", ["kind", "code"])
    op.create_index("assets_by_sensor", "assets", ["sensor"])


def _sensors() -> None:
    op.create_table(
        "sensors",
        _id(),
        *_texts("sensor", "asset"),
        sa.Column("installed_at", sa.BigInteger(), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=True),
        *_texts("reason"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("asset", "sensor", "installed_at"),
    )
    op.create_index("sensors_by_name", "sensors", ["sensor"])


def _registers() -> None:
    op.create_table(
        "registers",
        _id(),
        *_texts("kind", "subject"),
        sa.Column("rules", sa.Text(), nullable=False),
        sa.Column("from_ms", sa.BigInteger(), nullable=False),
        sa.Column("until_ms", sa.BigInteger(), nullable=False),
        *_texts("actor", "reason"),
        sa.Column("entered_at", sa.BigInteger(), nullable=False),
        *_texts("state"),
        sa.Column("cancelled_by", sa.String(), server_default="", nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("registers_by_subject", "registers", ["subject"])
