"""The number of parameters that a card states, for a model whose checkpoint is not known."""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# A version before this one may have imported a card whose field of that name holds anything.
STATED = {
    "sqlite": """CASE
        WHEN json_type(c.metadata, '$.parameters') = 'integer' THEN json_extract(c.metadata, '$.parameters')
    END""",
    "postgresql": """CASE
        WHEN (c.metadata::json ->> 'parameters') ~ '^[0-9]{1,18}$' THEN (c.metadata::json ->> 'parameters')::bigint
    END""",
}
OF_CHECKPOINT = "k.parameters AS parameters"

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


def upgrade() -> None:
    stated = STATED[op.get_context().dialect.name]
    make_views(ASSETS.replace(OF_CHECKPOINT, f"COALESCE(k.parameters, {stated}) AS parameters"))


def downgrade() -> None:
    make_views(ASSETS)


def make_views(assets: str) -> None:
    for view in ("models", "assets"):
        op.execute(f"DROP VIEW {view}")
    for statement in (assets, MODELS):
        op.execute(statement.strip())
