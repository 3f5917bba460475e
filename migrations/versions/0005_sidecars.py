"""The end of sidecars: checkpoints that held the columns of another one's matrices, cut for tensor parallelism.

Their files stay in lading's cache, where ``lading rm --orphans`` finds them. What was checked of them stays, too.
"""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

SIDECARS = "SELECT id FROM checkpoints WHERE substr(uri, 1, 10) = 'repack+tp='"


def upgrade() -> None:
    # From the leaves up: on SQLite, migrations run without the foreign keys that would cascade.
    for table in ("digests", "tensors", "copies", "card_checkpoints", "shards"):
        op.execute(f"DELETE FROM {table} WHERE checkpoint_id IN ({SIDECARS})")
    op.execute(f"DELETE FROM checkpoints WHERE id IN ({SIDECARS})")


def downgrade() -> None:
    """Do nothing: the older version makes its sidecars when it is asked for them."""
