"""A user's program over the rows of the catalog. `make lint` has mypy check it; a test runs it.

The line that mypy must refuse says so: with ``warn_unused_ignores``, an error that does not come is one.
"""

from __future__ import annotations

from sqlalchemy import select

import lading.catalog
from lading.catalog import CardRow, CheckpointRow, VerificationRow


def sizes(family: str) -> dict[str, int]:
    """Return the bytes of each model of a family whose checkpoint is known and small."""
    with lading.catalog.session() as s:
        small = select(CardRow).where(CardRow.family == family, CardRow.checkpoint.has(CheckpointRow.bytes < 10e9))
        return {card.name: card.checkpoint.bytes for card in s.scalars(small) if card.checkpoint is not None}


def last_results(uri: str) -> dict[str, str]:
    """Return what the last check of each file of a checkpoint found."""
    with lading.catalog.session() as s:
        checks = s.scalars(select(VerificationRow).where(VerificationRow.uri == uri).order_by(VerificationRow.id))
        return {check.file: check.result for check in checks}


def unchecked_size(card: CardRow) -> int:
    """Return the bytes of a card's checkpoint, which may not be known."""
    return card.checkpoint.bytes  # type: ignore[union-attr]
