"""The resolved values of cards in columns, so that listing a million cards climbs no chain of bases.

:mod:`lading.cards.card` resolves, here without overlays. This module decides when, and for which cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CardEntry, checkpoint_ref, resolve_card
from lading.catalog.database.statements import chunks
from lading.catalog.schema import CARDS, CardRow
from lading.catalog.search import fold_fields, search_text
from lading.catalog.stored_cards import read_cards
from lading.errors import AssetCardError

COLUMNS = (
    CardRow.base,
    CardRow.family,
    CardRow.arch,
    CardRow.checkpoint_uri,
    CardRow.checkpoint_path,
    CardRow.license,
    CardRow.gated,
    CardRow.info_url,
    CardRow.problem,
    CardRow.search_text,
)
"""The columns of a card with its resolved values."""


class Entries:
    """The cards of a catalog after an import: its rows with ``changes`` applied (``None``: removed)."""

    def __init__(self, session: Session, changes: Mapping[str, CardEntry | None]) -> None:
        self._session = session
        self._entries: dict[str, CardEntry | None] = dict(changes)
        self._climbed: set[str] = set()
        self._cards: dict[str, AssetCard] = {}
        self._words: dict[str, Mapping[str, str]] = {}

    def load(self, names: Iterable[str]) -> None:
        """Read these cards and all their bases: level by level rather than card by card."""
        level = set(names)
        while level:
            unknown = level - self._entries.keys()
            self._entries.update(dict.fromkeys(unknown))
            self._entries.update((entry.name, entry) for entry in read_cards(self._session, unknown, env=""))
            self._climbed |= level
            bases = {entry.base for name in level if (entry := self._entries[name]) is not None}
            level = {base for base in bases if base is not None} - self._climbed

    def get(self, name: str) -> CardEntry | None:
        """Return a card that was loaded; ``None`` for an unknown name."""
        return self._entries.get(name)

    def look_up(self, name: str) -> Mapping[str, CardEntry]:
        """Return the overlays of a card as :func:`lading.cards.card.resolve_card` takes them."""
        entry = self._entries.get(name)

        return {} if entry is None else {"": entry}

    def card(self, entry: CardEntry) -> AssetCard:
        """Return the card that ``entry`` states.

        :raises AssetCardError: as :func:`lading.cards.card.resolve_card`.
        """
        if entry.base is not None and entry.base not in self._cards:
            card = resolve_card(entry.name, (), self.look_up)
            while card is not None:
                card = self._cards.setdefault(card.name, card).base

        # Few bases have many cards on them: this resolves each once.
        return card_of(entry, None if entry.base is None else self._cards[entry.base])

    def words(self, name: str | None) -> Mapping[str, str]:
        """Return the words of each field of a card, its own or inherited; no words for a missing card."""
        if name is None:
            return {}
        found = self._words.get(name)
        if found is None:
            self._words[name] = {}  # until the result is known: bases may form a cycle
            entry = self._entries.get(name)
            found = {} if entry is None else fold_fields(entry.metadata)
            if entry is not None:
                found |= {k: v for k, v in self.words(entry.base).items() if k not in entry.metadata}
            self._words[name] = found

        return found


def card_of(entry: CardEntry, base: AssetCard | None = None) -> AssetCard:
    """Return the card that ``entry`` states, based on ``base``."""
    return AssetCard(entry.name, entry.metadata, base, dict.fromkeys(entry.metadata, entry.folder), entry.source)


def resolve_columns(entry: CardEntry, entries: Entries) -> dict[str, str | int | None]:
    """Return the values of :data:`COLUMNS` for the card that ``entry`` states and whose bases ``entries`` has loaded.

    The problem of a card is one of them, so that it breaks neither an import nor a listing.
    """
    problems: list[str] = []
    try:
        card = entries.card(entry)
    except AssetCardError as error:
        problems.append(error.message)
        card = card_of(entry)  # its own fields are known all the same

    found: dict[str, str | int | None] = {
        "base": entry.base,
        "family": _text(card, "model_family", problems),
        "arch": _text(card, "model_arch", problems),
        "checkpoint_uri": None,
        "checkpoint_path": None,
        "license": _text(card, "license", []),
        "gated": 0,
        "info_url": None,
    }
    try:
        ref = checkpoint_ref(card)
    except AssetCardError as error:
        problems.append(error.message)
    else:
        found["checkpoint_uri"] = ref.uri or None
        found["checkpoint_path"] = ref.path
        found["gated"] = int(ref.gated)
        found["info_url"] = ref.info_url
    try:
        adapter_refs(card)
    except AssetCardError as error:
        problems.append(error.message)
    found["problem"] = "\n".join(problems) or None
    found["search_text"] = search_text(entry.name, entry.metadata, entries.words(entry.base))

    return found


def _text(card: AssetCard, name: str, problems: list[str]) -> str | None:
    field = card.maybe_get_field(name)
    if field is None:
        return None
    try:
        return field.as_(str) or None
    except AssetCardError as error:
        problems.append(error.message)
        return None


def descendants(session: Session, names: Iterable[str]) -> set[str]:
    """Return the cards of the catalog whose chain of bases, overlays apart, leads through one of ``names``."""
    found: set[str] = set()
    level = set(names)
    while level:
        children: set[str] = set()
        for piece in chunks(level):
            statement = select(CARDS.c.name).where(CARDS.c.env == "", CARDS.c.base.in_(piece))
            children.update(session.scalars(statement))
        level = children - found
        found |= level

    return found


def stale_columns(session: Session) -> list[str]:
    """Return the cards whose columns differ from their resolved values, one line each; a sound catalog has no such."""
    entries = Entries(session, {})
    rows = session.execute(select(CardRow.name, *COLUMNS).where(CardRow.env == "").order_by(CardRow.name)).all()
    entries.load(row[0] for row in rows)

    problems = []
    for name, *kept in rows:
        entry = entries.get(name)
        resolved = {} if entry is None else resolve_columns(entry, entries)
        for column, value in zip(COLUMNS, kept, strict=True):
            expected = resolved.get(column.key)
            if value != expected:
                problems.append(f"drift: the card {name!r} has {column.key} {value!r}, but resolves to {expected!r}")

    return problems
