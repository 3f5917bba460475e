"""Rows of cards and architectures as entries of card files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session, joinedload

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.database.statements import chunks, intact, loads_object
from lading.catalog.schema import ArchitectureRow, CardRow, SourceRow


def label(uri: str, position: int) -> str:
    """Return the name of a source's document for messages: ``qwen.yaml[3]``."""
    return f"{uri.rpartition('/')[2]}[{position}]"


def read_cards(session: Session, names: Collection[str] | None = None, *, env: str | None = None) -> list[CardEntry]:
    """Return the entries of cards, in the order of their sources.

    :param names: default: of all cards.
    :param env: the environment. Default: of all environments.
    """
    only = [] if env is None else [CardRow.env == env]
    if names is None:
        return _cards(session, *only)

    return [entry for piece in chunks(names) for entry in _cards(session, CardRow.name.in_(piece), *only)]


def _cards(session: Session, *conditions: ColumnElement[bool]) -> list[CardEntry]:
    # Columns rather than rows: a caller may want all cards of a large catalog.
    rows = session.execute(
        select(CardRow.name, CardRow.env, CardRow.metadata_, CardRow.folder, CardRow.position, SourceRow.uri)
        .join(CardRow.source)
        .where(*conditions)
        .order_by(CardRow.source_id, CardRow.position)
    )

    with intact("a card"):
        return [
            CardEntry(
                name=name,
                env=env,
                metadata=loads_object(metadata),
                folder=None if folder is None else Path(folder),
                source=label(uri, position),
            )
            for name, env, metadata, folder, position, uri in rows
        ]


def read_architectures(
    session: Session, family: str | None = None, name: str | None = None
) -> list[tuple[ArchitectureEntry, str]]:
    """Return the entries of architectures, in the order of their sources, and the URI of the source of each."""
    statement = (
        select(ArchitectureRow)
        .options(joinedload(ArchitectureRow.source))
        .order_by(ArchitectureRow.source_id, ArchitectureRow.position)
    )
    if family is not None:
        statement = statement.where(ArchitectureRow.family == family)
    if name is not None:
        statement = statement.where(ArchitectureRow.name == name)

    with intact("an architecture"):
        return [
            (
                ArchitectureEntry(
                    name=row.name,
                    family=row.family,
                    base=row.base,
                    config=loads_object(row.config),
                    source=label(row.source.uri, row.position),
                ),
                row.source.uri,
            )
            for row in session.scalars(statement)
        ]
