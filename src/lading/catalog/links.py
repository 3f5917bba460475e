"""The links between cards and checkpoints."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import case, func, insert, literal, select
from sqlalchemy.orm import Session

from lading.cards.card import split_name
from lading.catalog.records import now
from lading.catalog.schema import CardCheckpointRow, CardRow, CheckpointRow


def link_cards(session: Session, names: Collection[str], checkpoint: CheckpointRow) -> None:
    """Link cards to the checkpoint that their models are loaded from, and to no other; ``name@env`` is its card."""
    for name in {split_name(name)[0] for name in names}:
        card = session.scalars(select(CardRow).where(CardRow.name == name, CardRow.env == "")).one_or_none()
        if card is not None and card.link is None:
            card.link = CardCheckpointRow(checkpoint=checkpoint, linked_at=now())
        elif card is not None and card.link is not None:
            card.link.checkpoint, card.link.linked_at = checkpoint, now()


def link_by_uri(session: Session) -> None:
    """Link every card whose checkpoint is known, and which is not linked yet."""
    uri, path = CardRow.checkpoint_uri, CardRow.checkpoint_path
    inside = func.rtrim(uri, "/") + "/" + func.rtrim(func.ltrim(path, "/"), "/")
    key = case((path.is_(None), uri), else_=inside)
    session.execute(
        insert(CardCheckpointRow).from_select(
            ["card_id", "checkpoint_id", "linked_at"],
            select(CardRow.id, CheckpointRow.id, literal(now()))
            .join_from(CheckpointRow, CardRow, key == CheckpointRow.uri)
            .where(CardRow.env == "", ~CardRow.link.has()),
        )
    )
