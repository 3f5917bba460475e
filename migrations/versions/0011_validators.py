"""The HTTP validators of files that were indexed at a source without revisions and digests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = "validators"


def upgrade() -> None:
    op.create_table(
        NAME,
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("position", INT, autoincrement=False, nullable=False),
        sa.Column("validator", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id", "position"],
            ["shards.checkpoint_id", "shards.position"],
            name=op.f(f"fk_{NAME}_checkpoint_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name=op.f(f"pk_{NAME}")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table(NAME)
