"""The first schema of the catalog: its tables, and the views that are its contract."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
STRICT = {"sqlite_strict": True}
CLUSTERED = {"sqlite_strict": True, "sqlite_with_rowid": False}

# Cards with all that is known of them, also those that are no models.
ASSETS = """
CREATE VIEW assets AS
SELECT
    c.name AS name,
    c.family AS family,
    c.arch AS arch,
    c.base AS base,
    CASE
        WHEN c.problem IS NOT NULL THEN 'broken'
        WHEN c.family IS NULL THEN NULL
        WHEN f.entry_point IS NULL THEN 'unknown-family'
        WHEN k.id IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM shards s
            WHERE s.checkpoint_id = k.id AND NOT EXISTS (
                SELECT 1 FROM copies y WHERE y.checkpoint_id = k.id AND y.file = s.name
            )
        ) THEN 'ready'
        WHEN c.gated = 1 THEN 'gated'
        WHEN substr(c.checkpoint_uri, 1, 7) = 'file://' THEN 'ready'
        ELSE 'remote'
    END AS status,
    c.checkpoint_uri AS checkpoint,
    NULLIF(k.revision, '') AS revision,
    k.format AS format,
    k.bytes AS bytes,
    k.parameters AS parameters,
    k.dtypes AS dtypes,
    CASE WHEN k.id IS NOT NULL THEN (SELECT count(*) FROM shards s WHERE s.checkpoint_id = k.id) END AS shards,
    c.license AS license,
    COALESCE(
        (
            SELECT
                CASE
                    WHEN substr(y.path, length(y.path) - length(y.file)) = '/' || y.file
                        AND (k.index_name IS NOT NULL OR EXISTS (
                            SELECT 1 FROM shards s WHERE s.checkpoint_id = k.id AND s.position = 1
                        ))
                    THEN substr(y.path, 1, length(y.path) - length(y.file) - 1)
                    ELSE y.path
                END
            FROM shards s JOIN copies y ON y.checkpoint_id = s.checkpoint_id AND y.file = s.name
            WHERE s.checkpoint_id = k.id AND s.position = 0
            ORDER BY y.recorded_at DESC
            LIMIT 1
        ),
        CASE WHEN substr(c.checkpoint_uri, 1, 7) = 'file://' THEN substr(c.checkpoint_uri, 8) END
    ) AS local_path,
    (
        SELECT CASE WHEN count(*) = count(y.verified_at) THEN min(y.verified_at) END
        FROM shards s JOIN copies y ON y.checkpoint_id = s.checkpoint_id AND y.file = s.name
        WHERE s.checkpoint_id = k.id
    ) AS verified_at,
    o.uri AS source,
    c.problem AS problem
FROM cards c
JOIN sources o ON o.id = c.source_id
LEFT JOIN families f ON f.name = c.family
LEFT JOIN card_checkpoints l ON l.card_id = c.id
LEFT JOIN checkpoints k ON k.id = l.checkpoint_id
WHERE c.env = ''
"""

MODELS = """
CREATE VIEW models AS
SELECT
    name, family, arch, base, status, checkpoint, revision, format, bytes, parameters, dtypes, shards, license,
    local_path, verified_at, source
FROM assets
WHERE family IS NOT NULL OR problem IS NOT NULL
"""

MODEL_TENSORS = """
CREATE VIEW model_tensors AS
SELECT
    c.name AS model,
    t.name AS tensor,
    t.dtype AS dtype,
    t.shape AS shape,
    t.parameters AS parameters,
    t.bytes AS bytes,
    s.name AS shard,
    t."offset" AS "offset",
    t.digest AS digest
FROM cards c
JOIN card_checkpoints l ON l.card_id = c.id
JOIN tensors t ON t.checkpoint_id = l.checkpoint_id
JOIN shards s ON s.checkpoint_id = t.checkpoint_id AND s.position = t.shard
WHERE c.env = ''
"""

MODEL_SHARDS = """
CREATE VIEW model_shards AS
SELECT
    c.name AS model,
    s.name AS shard,
    s.size AS bytes,
    s.sha256 AS sha256,
    (
        SELECT y.path FROM copies y
        WHERE y.checkpoint_id = s.checkpoint_id AND y.file = s.name
        ORDER BY y.recorded_at DESC
        LIMIT 1
    ) AS local_path
FROM cards c
JOIN card_checkpoints l ON l.card_id = c.id
JOIN shards s ON s.checkpoint_id = l.checkpoint_id
WHERE c.env = ''
"""

SEARCH = """
CREATE VIRTUAL TABLE card_search USING fts5(
    search_text, content='cards', content_rowid='id', tokenize='ascii', columnsize=0
)
"""

# A later migration that recreates the table of cards recreates this, too.
SEARCH_TRIGGER = """
CREATE TRIGGER card_search_delete AFTER DELETE ON cards WHEN old.search_text IS NOT NULL BEGIN
    INSERT INTO card_search (card_search, rowid, search_text) VALUES ('delete', old.id, old.search_text);
END
"""


def is_json(table: str, column: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(f"json_valid({column})", name=op.f(f"ck_{table}_{column}_is_json")).ddl_if("sqlite")


def check(table: str, name: str, condition: str) -> sa.CheckConstraint:
    return sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))


def upgrade() -> None:
    op.create_table(
        "sources",
        sa.Column("id", INT, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("size", INT, nullable=True),
        sa.Column("mtime_ns", INT, nullable=True),
        sa.Column("imported_at", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("problems", sa.Text(), nullable=True),
        check("sources", "kind", "kind IN ('seed', 'user', 'import')"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sources")),
        sa.UniqueConstraint("uri", name=op.f("uq_sources_uri")),
        **STRICT,
    )
    op.create_table(
        "families",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("entry_point", sa.Text(), nullable=True),
        check("families", "name", "name <> ''"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_families")),
        **CLUSTERED,
    )
    op.create_table(
        "architectures",
        sa.Column("family", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("base", sa.Text(), nullable=True),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("source_id", INT, nullable=False),
        sa.Column("position", INT, nullable=False),
        check("architectures", "name", "name <> ''"),
        is_json("architectures", "config"),
        sa.ForeignKeyConstraint(["family"], ["families.name"], name=op.f("fk_architectures_family")),
        sa.ForeignKeyConstraint(
            ["source_id"], ["sources.id"], name=op.f("fk_architectures_source_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("family", "name", name=op.f("pk_architectures")),
        **CLUSTERED,
    )
    op.create_index(op.f("ix_architectures_source_id"), "architectures", ["source_id"])
    op.create_table(
        "cards",
        sa.Column("id", INT, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("env", sa.Text(), server_default="", nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("source_id", INT, nullable=False),
        sa.Column("position", INT, nullable=False),
        sa.Column("folder", sa.Text(), nullable=True),
        sa.Column("base", sa.Text(), nullable=True),
        sa.Column("family", sa.Text(), nullable=True),
        sa.Column("arch", sa.Text(), nullable=True),
        sa.Column("checkpoint_uri", sa.Text(), nullable=True),
        sa.Column("checkpoint_path", sa.Text(), nullable=True),
        sa.Column("license", sa.Text(), nullable=True),
        sa.Column("gated", INT, server_default="0", nullable=False),
        sa.Column("info_url", sa.Text(), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("search_text", sa.Text(), nullable=True),
        check("cards", "name", "name <> ''"),
        check("cards", "gated", "gated IN (0, 1)"),
        is_json("cards", "metadata"),
        sa.ForeignKeyConstraint(["family"], ["families.name"], name=op.f("fk_cards_family")),
        sa.ForeignKeyConstraint(["source_id"], ["sources.id"], name=op.f("fk_cards_source_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cards")),
        sa.UniqueConstraint("name", "env", name=op.f("uq_cards_name")),
        **STRICT,
    )
    op.create_index(op.f("ix_cards_env"), "cards", ["env"], sqlite_where=sa.text("env <> ''"))
    op.create_index(op.f("ix_cards_family"), "cards", ["family", "name"])
    op.create_index(op.f("ix_cards_arch"), "cards", ["arch"])
    op.create_index(op.f("ix_cards_source_id"), "cards", ["source_id"])
    op.create_index(op.f("ix_cards_base"), "cards", ["base"])
    op.create_index(op.f("ix_cards_checkpoint_uri"), "cards", ["checkpoint_uri"])
    op.create_table(
        "checkpoints",
        sa.Column("id", INT, nullable=False),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), server_default="", nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("bytes", INT, nullable=False),
        sa.Column("parameters", INT, nullable=False),
        sa.Column("dtypes", sa.Text(), nullable=False),
        sa.Column("tensors", INT, nullable=False),
        sa.Column("index_name", sa.Text(), nullable=True),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("indexed_at", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        check("checkpoints", "counts", "bytes >= 0 AND parameters >= 0 AND tensors >= 0"),
        is_json("checkpoints", "metadata"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("uri", name=op.f("uq_checkpoints_uri")),
        **STRICT,
    )
    op.create_table(
        "shards",
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("position", INT, autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("size", INT, nullable=False),
        sa.Column("sha256", sa.Text(), nullable=True),
        check("shards", "numbers", "position >= 0 AND size >= 0"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_shards_checkpoint_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name=op.f("pk_shards")),
        sa.UniqueConstraint("checkpoint_id", "name", name=op.f("uq_shards_checkpoint_id")),
        **CLUSTERED,
    )
    op.create_table(
        "tensors",
        sa.Column("checkpoint_id", INT, autoincrement=False, nullable=False),
        sa.Column("position", INT, autoincrement=False, nullable=False),
        sa.Column("shard", INT, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("shape", sa.Text(), nullable=False),
        sa.Column("parameters", INT, nullable=False),
        sa.Column("bytes", INT, nullable=False),
        sa.Column("offset", INT, nullable=False),
        sa.Column("digest", sa.Text(), nullable=True),
        check("tensors", "numbers", 'parameters >= 0 AND bytes >= 0 AND "offset" >= 0'),
        is_json("tensors", "shape"),
        sa.ForeignKeyConstraint(
            ["checkpoint_id", "shard"],
            ["shards.checkpoint_id", "shards.position"],
            name=op.f("fk_tensors_checkpoint_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "position", name=op.f("pk_tensors")),
        sa.UniqueConstraint("checkpoint_id", "name", name=op.f("uq_tensors_checkpoint_id")),
        **CLUSTERED,
    )
    op.create_table(
        "copies",
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
        **CLUSTERED,
    )
    op.create_table(
        "verifications",
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
        check("verifications", "result", "result IN ('match', 'mismatch')"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_verifications")),
        **STRICT,
    )
    op.create_table(
        "card_checkpoints",
        sa.Column("card_id", INT, autoincrement=False, nullable=False),
        sa.Column("checkpoint_id", INT, nullable=False),
        sa.Column("linked_at", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["card_id"], ["cards.id"], name=op.f("fk_card_checkpoints_card_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_card_checkpoints_checkpoint_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("card_id", name=op.f("pk_card_checkpoints")),
        **STRICT,
    )
    op.create_index(op.f("ix_card_checkpoints_checkpoint_id"), "card_checkpoints", ["checkpoint_id"])

    for view in (ASSETS, MODELS, MODEL_TENSORS, MODEL_SHARDS):
        op.execute(view.strip())
    if op.get_context().dialect.name == "sqlite":
        for statement in (SEARCH, SEARCH_TRIGGER):
            op.execute(statement.strip())


def downgrade() -> None:
    for view in ("model_shards", "model_tensors", "models", "assets"):
        op.execute(f"DROP VIEW {view}")
    if op.get_context().dialect.name == "sqlite":
        op.execute("DROP TRIGGER card_search_delete")
        op.execute("DROP TABLE card_search")
    for table in (
        "card_checkpoints", "verifications", "copies", "tensors", "shards", "checkpoints", "cards", "architectures",
        "families", "sources",
    ):  # fmt: skip
        op.drop_table(table)
