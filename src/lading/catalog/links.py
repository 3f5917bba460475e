"""The links between cards and checkpoints."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import insert, literal, select
from sqlalchemy.orm import Session

from lading.cards.card import split_name
from lading.catalog.database.database import Database
from lading.catalog.records import now
from lading.catalog.schema import CardCheckpointRow, CardRow, CheckpointRow


def link_card(session: Session, card_name: str, checkpoint: CheckpointRow) -> None:
    """Link a card to the checkpoint that its models are loaded from, and to no other."""
    card = session.scalars(select(CardRow).where(CardRow.name == card_name, CardRow.env == "")).one_or_none()
    if card is None:
        return

    if card.link is None:
        card.link = CardCheckpointRow(checkpoint=checkpoint, linked_at=now())
    else:
        card.link.checkpoint, card.link.linked_at = checkpoint, now()


def link_cards(database: Database, names: Collection[str], *, uri: str) -> None:
    """Link cards to the checkpoint that their models are loaded from."""
    with database.session(write=True) as session:
        checkpoint = session.scalars(select(CheckpointRow).where(CheckpointRow.uri == uri)).one_or_none()
        if checkpoint is not None:
            for name in names:
                link_card(session, split_name(name)[0], checkpoint)


def link_by_uri(session: Session) -> None:
    """Link every card whose checkpoint is known, and which is not linked yet."""
    session.execute(
        insert(CardCheckpointRow).from_select(
            ["card_id", "checkpoint_id", "linked_at"],
            select(CardRow.id, CheckpointRow.id, literal(now()))
            .join_from(CheckpointRow, CardRow, CardRow.checkpoint_uri == CheckpointRow.uri)
            .where(CardRow.env == "", CardRow.checkpoint_path.is_(None), ~CardRow.link.has()),
        )
    )
