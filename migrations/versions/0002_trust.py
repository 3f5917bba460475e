"""Knowledge about bytes: digests of blocks of tensors, whose files copies are, checks that recorded a digest."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STRICT = {"sqlite_strict": True}
CLUSTERED = {"sqlite_strict": True, "sqlite_with_rowid": False}


def check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))


def copies(*more: sa.schema.SchemaItem) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("size", INT, nullable=False),
        sa.Column("mtime_ns", INT, nullable=False),
        sa.Column("ctime_ns", INT, nullable=False),
        sa.Column("inode", INT, nullable=False),
        sa.Column("recorded_at", sa.Text(), nullable=False),
        sa.Column("verified_at", sa.Text(), nullable=True),
        check("copies", "numbers", "size >= 0"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_copies_checkpoint_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "file", "place", name=op.f("pk_copies")),
        *more,
    ]


def verifications(results: str) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column("id", INT, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("expected", sa.Text(), nullable=True),
        sa.Column("found", sa.Text(), nullable=True),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("at", sa.Text(), nullable=False),
        check("verifications", "result", results),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_verifications")),
    ]


COPIES = "checkpoint_id, file, place, path, size, mtime_ns, ctime_ns, inode, recorded_at, verified_at"
VERIFICATIONS = "id, uri, file, path, method, expected, found, result, version, at"
KIND = "kind IN ('source', 'cache', 'hub', 'adopted')"
OLD_RESULTS = "result IN ('match', 'mismatch')"
NEW_RESULTS = "result IN ('match', 'mismatch', 'recorded')"


def on_sqlite() -> bool:
    return bool(op.get_context().dialect.name == "sqlite")


def make_anew(table: str, items: list[sa.schema.SchemaItem], columns: str, options: dict[str, bool]) -> None:
    # SQLite changes no constraint. Not by Alembic's batches, which write the constraints in an order of their own.
    op.rename_table(table, f"{table}_before")
    op.create_table(table, *items, **options)
    op.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {table}_before")
    op.drop_table(f"{table}_before")


def change_results(results: str) -> None:
    op.drop_constraint(op.f("ck_verifications_result"), "verifications", type_="check")
    op.create_check_constraint(op.f("ck_verifications_result"), "verifications", results)


def upgrade() -> None:
    op.create_table(
        "digests",
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("position", INT, autoincrement=False, nullable=False),
        sa.Column("dim", INT, nullable=False),
        sa.Column("blocks", sa.LargeBinary(), nullable=False),
        check("digests", "dim", "dim >= 0"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id", "position"],
            ["tensors.checkpoint_id", "tensors.position"],
            name=op.f("fk_digests_checkpoint_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name=op.f("pk_digests")),
        **CLUSTERED,
    )
    known = sa.text("digest IS NOT NULL")
    op.create_index(op.f("ix_tensors_digest"), "tensors", ["digest"], sqlite_where=known, postgresql_where=known)
    known = sa.text("sha256 IS NOT NULL")
    op.create_index(op.f("ix_shards_sha256"), "shards", ["sha256"], sqlite_where=known, postgresql_where=known)

    kind = sa.Column("kind", sa.Text(), server_default="source", nullable=False)
    if on_sqlite():
        make_anew("copies", copies(kind, check("copies", "kind", KIND)), COPIES, CLUSTERED)
        make_anew("verifications", verifications(NEW_RESULTS), VERIFICATIONS, STRICT)
    else:
        op.add_column("copies", kind)
        op.create_check_constraint(op.f("ck_copies_kind"), "copies", KIND)
        change_results(NEW_RESULTS)


def downgrade() -> None:
    # A digest that was only recorded says nothing to the older version.
    op.execute("DELETE FROM verifications WHERE result = 'recorded'")
    if on_sqlite():
        make_anew("verifications", verifications(OLD_RESULTS), VERIFICATIONS, STRICT)
        make_anew("copies", copies(), COPIES, CLUSTERED)
    else:
        change_results(OLD_RESULTS)
        op.drop_column("copies", "kind")

    op.drop_index(op.f("ix_shards_sha256"), "shards")
    op.drop_index(op.f("ix_tensors_digest"), "tensors")
    op.drop_table("digests")
