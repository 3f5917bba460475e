"""The documents that publish the digests of checkpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
NAME = "digest_documents"


def upgrade() -> None:
    op.create_table(
        NAME,
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("taken_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f(f"fk_{NAME}_checkpoint_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f(f"pk_{NAME}")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    # An older version would compare bytes with them as if it had seen these bytes.
    published = f"SELECT checkpoint_id FROM {NAME}"
    op.execute(f"DELETE FROM digests WHERE checkpoint_id IN ({published})")
    op.execute(f"UPDATE tensors SET digest = NULL WHERE checkpoint_id IN ({published})")
    op.drop_table(NAME)
