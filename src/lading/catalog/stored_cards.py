"""Rows of cards and architectures as entries of card files."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.database.statements import chunks, intact, loads_object
from lading.catalog.schema import ARCHITECTURES, CARDS, SOURCES
from lading.system.filesystem import text_path


def label(uri: str, position: int) -> str:
    """Return the name of a source's document for messages: ``qwen.yaml[3]``."""
    return f"{uri.rpartition('/')[2]}[{position}]"


def read_cards(session: Session, names: Collection[str] | None = None, *, env: str | None = None) -> list[CardEntry]:
    """Return the entries of cards, in the order of their sources.

    :param names: default: of all cards.
    :param env: the environment. Default: of all environments.
    """
    only = [] if env is None else [CARDS.c.env == env]
    if names is None:
        return _cards(session, *only)

    return [entry for piece in chunks(names) for entry in _cards(session, CARDS.c.name.in_(piece), *only)]


def _cards(session: Session, *conditions: ColumnElement[bool]) -> list[CardEntry]:
    # Columns rather than rows: a caller may want all cards of a large catalog.
    c = CARDS.c
    rows = session.execute(
        select(c.name, c.env, c.metadata_, c.folder, c.position, SOURCES.c.uri)
        .join_from(CARDS, SOURCES)
        .where(*conditions)
        .order_by(c.source_id, c.position)
    )

    with intact("a card"):
        return [entry_of(*row) for row in rows]


def entry_of(name: str, env: str, metadata: str, folder: str | None, position: int, uri: str) -> CardEntry:
    """Return the entry of a row.

    :param uri: that of its source.

    :raises ValueError: the row is damaged.
    """
    return CardEntry(
        name=name,
        env=env,
        metadata=loads_object(metadata),
        folder=None if folder is None else text_path(folder),
        source=label(uri, position),
    )


def read_architectures(
    session: Session, family: str | None = None, name: str | None = None
) -> list[tuple[ArchitectureEntry, str]]:
    """Return the entries of architectures, in the order of their sources, and the URI of the source of each."""
    c = ARCHITECTURES.c
    statement = (
        select(c.name, c.family, c.base, c.config, c.position, SOURCES.c.uri)
        .join_from(ARCHITECTURES, SOURCES)
        .order_by(c.source_id, c.position)
    )
    if family is not None:
        statement = statement.where(c.family == family)
    if name is not None:
        statement = statement.where(c.name == name)

    with intact("an architecture"):
        return [
            (
                ArchitectureEntry(
                    name=name, family=family, base=base, config=loads_object(config), source=label(uri, position)
                ),
                uri,
            )
            for name, family, base, config, position, uri in session.execute(statement)
        ]
