"""Rows of cards and architectures as the entries of card files that they came from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sqlalchemy import ColumnElement, Connection, and_, select

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.schema import ARCHITECTURES, CARDS, SOURCES
from lading.errors import CatalogError, InternalError

T = TypeVar("T")

CHUNK = 5_000
"""Values in one condition: well below what any database takes."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def chunks(values: Iterable[T]) -> Iterator[Sequence[T]]:
    """``values`` in pieces that fit into one statement."""
    at = iter(values)
    while piece := list(islice(at, CHUNK)):
        yield piece


def label(uri: str, position: int) -> str:
    """How messages name a document of a source: ``qwen.yaml[3]``."""
    return f"{uri.rpartition('/')[2]}[{position}]"


def dumps(value: object) -> str:
    """The JSON text that the catalog keeps.

    :raises ValueError: a number that is none in JSON, or text that is not Unicode.
    :raises TypeError: a value that JSON does not know.
    """
    text = _encode(value)
    text.encode()  # half of a surrogate pair passes the line above, but not the database's driver

    return text


@contextmanager
def intact(what: str) -> Iterator[None]:
    """Around the making of values from rows: where that fails, the rows are not what was written.

    :raises CatalogError: it failed.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, OverflowError, InternalError) as error:
        raise CatalogError(
            f"The catalog is damaged: {what} cannot be made of its rows ({error}). `lading db check` says more."
        ) from error


def loads_object(text: str) -> dict[str, object]:
    """What :func:`dumps` made of a mapping.

    :raises ValueError: it is something else.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is not a JSON object")

    return value


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
