"""The places of the parts of tensors that several ranks saved together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    def check(name: str, condition: str) -> sa.CheckConstraint:
        return sa.CheckConstraint(condition, name=op.f(f"ck_pieces_{name}"))

    # PostgreSQL has no such function before version 16.
    on_sqlite = op.get_context().dialect.name == "sqlite"
    json = [check(f"{name}_is_json", f"json_valid({name})") for name in ("starts", "shape")] if on_sqlite else []
    op.create_table(
        "pieces",
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("position", INT, autoincrement=False, nullable=False),
        sa.Column("number", INT, autoincrement=False, nullable=False),
        sa.Column("shard", INT, nullable=False),
        sa.Column("offset", INT, nullable=False),
        sa.Column("starts", sa.Text(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        check("numbers", 'number >= 0 AND "offset" >= 0'),
        *json,
        sa.ForeignKeyConstraint(
            ["checkpoint_id", "position"],
            ["tensors.checkpoint_id", "tensors.position"],
            name=op.f("fk_pieces_tensor"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id", "shard"],
            ["shards.checkpoint_id", "shards.position"],
            name=op.f("fk_pieces_shard"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", "number", name=op.f("pk_pieces")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )


def downgrade() -> None:
    op.drop_table("pieces")
