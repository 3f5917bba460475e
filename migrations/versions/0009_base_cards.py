"""Models without the cards that only serve as bases, and have neither an architecture nor a checkpoint."""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

MODELS = """
CREATE VIEW models AS
SELECT
    name, family, arch, base, status, checkpoint, revision, format, bytes, parameters, dtypes, shards, license,
    local_path, verified_at, source
FROM assets
WHERE problem IS NOT NULL OR (family IS NOT NULL AND (
    arch IS NOT NULL OR checkpoint IS NOT NULL OR status <> 'gated'
    OR NOT EXISTS (SELECT 1 FROM cards b WHERE b.base = assets.name)
))
"""

BEFORE = """
CREATE VIEW models AS
SELECT
    name, family, arch, base, status, checkpoint, revision, format, bytes, parameters, dtypes, shards, license,
    local_path, verified_at, source
FROM assets
WHERE family IS NOT NULL OR problem IS NOT NULL
"""


def upgrade() -> None:
    make_view(MODELS)


def downgrade() -> None:
    make_view(BEFORE)


def make_view(statement: str) -> None:
    op.execute("DROP VIEW models")
    op.execute(statement.strip())
