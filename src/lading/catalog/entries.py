"""Rows of cards and architectures as the entries of card files that they came from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, and_, select

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.database.statements import chunks, intact, loads_object
from lading.catalog.schema import ARCHITECTURES, CARDS, SOURCES


def label(uri: str, position: int) -> str:
    """How messages name a document of a source: ``qwen.yaml[3]``."""
    return f"{uri.rpartition('/')[2]}[{position}]"


def read_cards(
    connection: Connection, names: Collection[str] | None = None, *, env: str | None = None
) -> list[CardEntry]:
    """The entries of these cards (default: of all), of one environment or of all, in the order of their sources."""
    only = [] if env is None else [CARDS.c.env == env]
    if names is None:
        return _cards(connection, *only)

    return [entry for piece in chunks(names) for entry in _cards(connection, CARDS.c.name.in_(piece), *only)]


def _cards(connection: Connection, *conditions: ColumnElement[bool]) -> list[CardEntry]:
    rows = connection.execute(
        select(CARDS.c.name, CARDS.c.env, CARDS.c.metadata_, CARDS.c.folder, CARDS.c.position, SOURCES.c.uri)
        .join_from(CARDS, SOURCES, CARDS.c.source_id == SOURCES.c.id)
        .where(*conditions)
        .order_by(CARDS.c.source_id, CARDS.c.position)
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
    connection: Connection, family: str | None = None, name: str | None = None
) -> list[tuple[ArchitectureEntry, str]]:
    """The entries of architectures, in the order of their sources, and the URI of the source of each."""
    conditions = [
        *([] if family is None else [ARCHITECTURES.c.family == family]),
        *([] if name is None else [ARCHITECTURES.c.name == name]),
    ]
    rows = connection.execute(
        select(
            ARCHITECTURES.c.family,
            ARCHITECTURES.c.name,
            ARCHITECTURES.c.base,
            ARCHITECTURES.c.config,
            ARCHITECTURES.c.position,
            SOURCES.c.uri,
        )
        .join_from(ARCHITECTURES, SOURCES, ARCHITECTURES.c.source_id == SOURCES.c.id)
        .where(and_(True, *conditions))
        .order_by(ARCHITECTURES.c.source_id, ARCHITECTURES.c.position)
    )

    with intact("an architecture"):
        return [
            (
                ArchitectureEntry(
                    name=row_name,
                    family=row_family,
                    base=base,
                    config=loads_object(config),
                    source=label(uri, position),
                ),
                uri,
            )
            for row_family, row_name, base, config, position, uri in rows
        ]
