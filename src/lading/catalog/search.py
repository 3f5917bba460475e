"""Full-text search: the text that the catalog keeps of a card, and conditions that find words in it.

The catalog keeps a card's text as *folded* words, separated by single blanks. SQLite searches an index over them
(FTS5), other databases the column itself. Only this module folds, so that both find the same, and no special character
of a question reaches the database.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from sqlalchemy import ColumnElement, Connection, Select, column, exists, false, func, insert, literal, select, table
from sqlalchemy.orm import aliased

from lading.cards.card import CONFIG_KEYS
from lading.catalog.schema import CardRow

MAX_TEXT: Final = 4_000
"""The most characters to keep of a card: each card that is built on a base repeats the text of the base."""

INDEX: Final = "card_search"
"""The name of the index, and the prefix of the tables in which SQLite keeps it."""

_MANY_NEW = 1_000
_MANY_HITS = 10_000
_MOST_CONDITIONS = 100
"""The most conditions of one statement: SQLite allows 1,000 levels of an expression."""

_UNSEARCHED = frozenset({*CONFIG_KEYS, "base"})

_SIGNS = re.compile(r"[\W_]+")

_index = table(INDEX, column("rowid"), column("search_text"), column(INDEX))


def fold(text: str) -> str:
    """Return the words of ``text`` without case and accents: ``Qwen3_0.6B`` is ``qwen3 0 6b``."""
    if not text.isascii():
        text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))

    return _SIGNS.sub(" ", text.casefold()).strip()


def fold_fields(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return the words of each field of a card, for the cards that inherit it."""
    return {name: text for name, value in _searched(metadata) if (text := fold(" ".join(_texts(value))))}


def search_text(name: str, metadata: Mapping[str, object], inherited: Mapping[str, str]) -> str:
    """Return the text to keep of a card: the words of its name, of its own fields, and of those that it inherits.

    :param inherited: the results of :func:`fold_fields` for its bases, the nearest first.
    """
    own = fold(" ".join([name, *(text for _, value in _searched(metadata) for text in _texts(value))]))
    text = " ".join([own, *(text for field, text in inherited.items() if field not in metadata)])

    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT + 1].rpartition(" ")[0]


def _searched(metadata: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Return the fields to search: not the numbers of a configuration."""
    return ((name, value) for name, value in metadata.items() if name not in _UNSEARCHED)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield str(value)


# --- the index in step with the cards ---------------------------------------------------------------------------------


def index_new(connection: Connection, last: int) -> None:
    """Index the cards that were added after the row number ``last``."""
    if connection.dialect.name != "sqlite":
        return

    _add(connection, CardRow.id > last)
    newest = connection.scalar(select(func.max(CardRow.id))) or 0
    if newest - last > max(_MANY_NEW, newest // 10):
        # A bulk leaves a dozen parts behind, and every query would have to search each of them.
        connection.execute(insert(_index).values({INDEX: "optimize"}))


@contextmanager
def reindexed(connection: Connection, ids: Collection[object]) -> Iterator[None]:
    """Index the changes that the body makes to the text of these cards."""
    if connection.dialect.name == "sqlite":
        # The index keeps no text: a removal has to state the text.
        gone = select(literal("delete"), CardRow.id, CardRow.search_text).where(*_kept(CardRow.id.in_(ids)))
        connection.execute(insert(_index).from_select([INDEX, "rowid", "search_text"], gone))
        yield
        _add(connection, CardRow.id.in_(ids))
    else:
        yield


def _add(connection: Connection, which: ColumnElement[bool]) -> None:
    added = select(CardRow.id, CardRow.search_text).where(*_kept(which)).order_by(CardRow.id)
    connection.execute(insert(_index).from_select(["rowid", "search_text"], added))


def _kept(which: ColumnElement[bool]) -> tuple[ColumnElement[bool], ...]:
    return which, CardRow.search_text.is_not(None)


# --- questions --------------------------------------------------------------------------------------------------------


def phrases(search: str) -> list[str]:
    """Return the words of a question, folded; a word such as ``0.6b`` becomes a phrase of several."""
    return list(filter(None, map(fold, search.split())))


def _hits(wanted: list[str]) -> Select[int]:
    # https://www.sqlite.org/fts5.html#full_text_query_syntax
    expression = " ".join(f'"{phrase}"' for phrase in wanted) + " *"

    return select(_index.c.rowid).where(_index.c[INDEX].op("MATCH")(expression))


def found_by_index(name: ColumnElement[str], wanted: list[str]) -> ColumnElement[bool]:
    """Return the condition that all phrases occur in the card ``name``, by SQLite's index; the last may be a prefix."""
    return name.in_(select(CardRow.name).where(CardRow.env == "", CardRow.id.in_(_hits(wanted))))


def found_by_text(name: ColumnElement[str], wanted: list[str]) -> ColumnElement[bool]:
    """Return the same condition for any database, one name at a time."""
    text = literal(" ") + CardRow.search_text + literal(" ")
    *whole, last = wanted

    # Folded words have no character that is special in a pattern.
    patterns = [*(f"% {phrase} %" for phrase in whole), f"% {last}%"]

    return exists().where(CardRow.name == name, CardRow.env == "", *map(text.like, patterns))


def found(connection: Connection, name: ColumnElement[str], search: str) -> ColumnElement[bool]:
    """Return the condition that all words of ``search`` occur, in any order, in the card ``name``.

    A question without a word finds nothing.
    """
    wanted = phrases(search)
    if not wanted or max(map(len, wanted)) > MAX_TEXT:
        return false()
    if connection.dialect.name != "sqlite":
        return found_by_text(name, wanted)

    # With many hits, looking at each card in the order of the list finds the first ones sooner than all hits.
    hits = _hits(wanted).limit(_MANY_HITS)
    many = len(wanted) <= _MOST_CONDITIONS and connection.scalar(select(func.count()).select_from(hits.subquery()))

    return (found_by_text if many == _MANY_HITS else found_by_index)(name, wanted)


def names_found(connection: Connection, search: str) -> list[str]:
    """Return the names of the cards in which all words of ``search`` occur, in any order."""
    cards = aliased(CardRow)
    name = cards.name.expression
    which = found(connection, name, search)

    return list(connection.scalars(select(name).where(cards.env == "", which).order_by(name)))


# --- is it as it should be? -------------------------------------------------------------------------------------------


def is_not_index(name: str | None, kind: str, parents: object) -> bool:
    """Return whether an object is not a table in which SQLite keeps the index, for comparisons of schemas."""
    return kind != "table" or name is None or not name.startswith(INDEX)


def stale_index(connection: Connection) -> list[str]:
    """Return a line if the index and the cards have different words; a sound catalog has no such line."""
    if connection.dialect.name != "sqlite":
        return []

    # SQLite's own check is a statement that writes. This compares word by word: how often, and in which rows.
    connection.exec_driver_sql(f"CREATE VIRTUAL TABLE temp.words_found USING fts5vocab(main, {INDEX}, instance)")
    rows = connection.exec_driver_sql("SELECT term, count(*), sum(doc) FROM temp.words_found GROUP BY term")
    indexed = {word: (places, ids) for word, places, ids in rows}
    connection.exec_driver_sql("DROP TABLE temp.words_found")

    kept: dict[str, tuple[int, int]] = {}
    for row_id, text in connection.execute(select(CardRow.id, CardRow.search_text)):
        for word in (text or "").split():
            places, ids = kept.get(word, (0, 0))
            kept[word] = places + 1, ids + row_id

    words = sorted(word for word in indexed.keys() | kept.keys() if indexed.get(word) != kept.get(word))
    if not words:
        return []

    return [
        f"drift: the search index does not have the words of the cards: {', '.join(words[:5])}, {len(words)} in all"
    ]
