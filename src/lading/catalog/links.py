"""The links between cards and checkpoints."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, delete, exists, insert, literal, select

from lading.cards.card import split_name
from lading.catalog.database.database import Database
from lading.catalog.records import now
from lading.catalog.schema import (
    CHECKPOINTS,
    CardCheckpointRow,
    CardRow,
    CheckpointRow,
)


def link_card(connection: Connection, card_name: str, checkpoint_id: int) -> None:
    """Link a card to the checkpoint that its models are loaded from, and to no other."""
    card_id = connection.scalar(select(CardRow.id).where(CardRow.name == card_name, CardRow.env == ""))
    if card_id is None:
        return

    connection.execute(delete(CardCheckpointRow).where(CardCheckpointRow.card_id == card_id))
    connection.execute(insert(CardCheckpointRow).values(card_id=card_id, checkpoint_id=checkpoint_id, linked_at=now()))


def link_cards(database: Database, names: Collection[str], *, uri: str) -> None:
    """Link cards to the checkpoint that their models are loaded from."""
    with database.write() as connection:
        checkpoint_id = connection.scalar(select(CHECKPOINTS.c.id).where(CHECKPOINTS.c.uri == uri))
        if checkpoint_id is not None:
            for name in names:
                link_card(connection, split_name(name)[0], checkpoint_id)


def link_by_uri(connection: Connection) -> None:
    """Link every card whose checkpoint is known, and which is not linked yet."""
    linked = exists().where(CardCheckpointRow.card_id == CardRow.id)
    connection.execute(
        insert(CardCheckpointRow).from_select(
            ["card_id", "checkpoint_id", "linked_at"],
            select(CardRow.id, CheckpointRow.id, literal(now()))
            .join_from(CheckpointRow, CardRow, CardRow.checkpoint_uri == CheckpointRow.uri)
            .where(CardRow.env == "", CardRow.checkpoint_path.is_(None), ~linked),
        )
    )
