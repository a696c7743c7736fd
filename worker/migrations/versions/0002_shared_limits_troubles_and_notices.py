"""Limits that workers share, destinations that refuse, troubles, matters, notices. Tables and indexes are added."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

Number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Go forward."""
    op.create_table(
        "paces",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("ready_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_paces")),
    )
    op.create_table(
        "relay_days",
        sa.Column("relay", sa.Text(), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("mails", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("relay", "day", name=op.f("pk_relay_days")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "domains",
        sa.Column("domain", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("until_at", sa.BigInteger(), nullable=False),
        sa.Column("said", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("domain", name=op.f("pk_domains")),
    )
    op.create_table(
        "troubles",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", Number, nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("since_at", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("kind", "name", "owner", name=op.f("pk_troubles")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "matters",
        sa.Column("event_id", Number, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("owner", Number, nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("first_at", sa.BigInteger(), nullable=False),
        sa.Column("last_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", "reason", "owner", name=op.f("pk_matters")),
        sqlite_with_rowid=False,
    )
    with op.batch_alter_table("matters", schema=None) as batch_op:
        batch_op.create_index("ix_matters_last_at", ["last_at"], unique=False)

    op.create_table(
        "notices",
        sa.Column("id", Number, nullable=False),
        sa.Column("made_at", sa.BigInteger(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("told", sa.Text(), nullable=False),
        sa.Column("claimed_until", sa.BigInteger(), nullable=False),
        sa.Column("sent_at", sa.BigInteger(), nullable=True),
        sa.Column("reply", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notices")),
    )
    deferred = sa.text("due_at IS NOT NULL")
    with op.batch_alter_table("deliveries", schema=None) as batch_op:
        batch_op.create_index(
            "ix_deliveries_event_id", ["event_id"], unique=False, sqlite_where=deferred, postgresql_where=deferred
        )

    queued = sa.text("queued_at IS NOT NULL")
    with op.batch_alter_table("slices", schema=None) as batch_op:
        batch_op.create_index(
            "ix_slices_lane_queued_at",
            ["lane", "queued_at"],
            unique=False,
            sqlite_where=queued,
            postgresql_where=queued,
        )
