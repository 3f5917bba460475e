"""Weights on this machine that lading does not load, and a view of all that is here without a card."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

UNREGISTERED = """
CREATE VIEW unregistered AS
SELECT
    CASE WHEN substr(k.uri, 1, 7) = 'file://' THEN substr(k.uri, 8) ELSE k.uri END AS name,
    'checkpoint' AS kind,
    'unregistered' AS status,
    k.uri AS checkpoint,
    NULLIF(k.revision, '') AS revision,
    k.format AS format,
    k.bytes AS bytes,
    k.parameters AS parameters,
    k.tensors AS tensors,
    k.dtypes AS dtypes,
    (SELECT count(*) FROM shards s WHERE s.checkpoint_id = k.id) AS shards,
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
    ) AS local_path,
    (
        SELECT CASE WHEN count(*) = count(y.verified_at) THEN min(y.verified_at) END
        FROM shards s JOIN copies y ON y.checkpoint_id = s.checkpoint_id AND y.file = s.name
        WHERE s.checkpoint_id = k.id
    ) AS verified_at,
    NULL AS problem
FROM checkpoints k
WHERE k.uri NOT LIKE '%/adapter_model.safetensors'
    AND NOT EXISTS (SELECT 1 FROM card_checkpoints l WHERE l.checkpoint_id = k.id)
    AND NOT EXISTS (SELECT 1 FROM cards c WHERE c.checkpoint_uri = k.uri)
    AND NOT EXISTS (SELECT 1 FROM artifacts a WHERE a.uri = k.uri AND a.kind LIKE 'quantized%')
    AND EXISTS (
        SELECT 1 FROM shards s JOIN copies y ON y.checkpoint_id = s.checkpoint_id AND y.file = s.name
        WHERE s.checkpoint_id = k.id AND y.kind <> 'cache'
    )
UNION ALL
SELECT
    substr(a.uri, 8),
    a.kind,
    CASE a.kind WHEN 'lora adapter' THEN 'unregistered' ELSE 'unloadable' END,
    a.uri,
    NULL,
    NULL,
    a.bytes,
    NULL,
    a.tensors,
    NULLIF(a.dtypes, ''),
    a.files,
    substr(a.uri, 8),
    NULL,
    a.reason
FROM artifacts a
"""


def upgrade() -> None:
    op.create_table(
        "artifacts",
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("place", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("files", INT, nullable=False),
        sa.Column("bytes", INT, nullable=False),
        sa.Column("tensors", INT, nullable=True),
        sa.Column("dtypes", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("found_at", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.CheckConstraint("bytes >= 0 AND files >= 0 AND tensors >= 0", name=op.f("ck_artifacts_counts")),
        sa.PrimaryKeyConstraint("uri", "place", "kind", name=op.f("pk_artifacts")),
        sqlite_strict=True,
        sqlite_with_rowid=False,
    )
    op.execute(UNREGISTERED.strip())


def downgrade() -> None:
    op.execute("DROP VIEW unregistered")
    op.drop_table("artifacts")
