"""Stores of a program's own cards, over the catalog."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Set
from difflib import get_close_matches
from functools import cached_property
from typing import Protocol

from lading.cards.card import AssetCard, checkpoint_ref
from lading.catalog.database.database import Database
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import AssetCardError


class CardStore(Protocol):
    """The part of :class:`AssetStore` that finds cards, which a program may write by itself.

    lading takes any object with these members wherever it takes a store: cards come from it alone, architectures and
    what is known about checkpoints from the catalog.
    """

    def retrieve_card(self, name: str) -> AssetCard:
        """Return the card of a name.

        :raises AssetNotFoundError: no card has this name.
        """

    def maybe_retrieve_card(self, name: str) -> AssetCard | None:
        """Return the card of a name, or ``None``."""

    def find_cards(self, field: str, value: object) -> Iterator[AssetCard]:
        """Yield all cards whose field ``field``, their own or a base's, equals ``value``."""

    @property
    def asset_names(self) -> Set[str]:
        """The names of all cards."""


def open_store(cards: CardStore | None = None) -> AssetStore:
    """Return the default store, or a store with the cards of a program's own; an :class:`AssetStore` as it is."""
    if cards is None:
        return get_asset_store()

    return cards if type(cards) in (AssetStore, _OwnStore) else _OwnStore(cards)  # type: ignore[return-value]


class _OwnStore(AssetStore):
    """A program's cards over the default catalog, or over that of the subclass of :class:`AssetStore` they are of."""

    def __init__(self, cards: CardStore) -> None:
        self._cards = cards

    @cached_property
    def _database(self) -> Database:  # type: ignore[override]  # only rank 0 opens a catalog
        return getattr(self._cards, "_database", None) or get_asset_store().database

    def retrieve_card(self, name: str) -> AssetCard:
        return self._cards.retrieve_card(name)

    def maybe_retrieve_card(self, name: str) -> AssetCard | None:
        return self._cards.maybe_retrieve_card(name)

    def find_cards(self, field: str, value: object) -> Iterator[AssetCard]:
        return self._cards.find_cards(field, value)

    @property
    def asset_names(self) -> Set[str]:
        return self._cards.asset_names

    def own_card(self, name: str) -> AssetCard:
        return self._cards.retrieve_card(name)

    def cards_at(self, uris: Collection[str]) -> Iterator[AssetCard]:
        folded = {uri.lower() for uri in uris}
        return (card for card, uri in self._checkpoints() if uri.lower() in folded)

    def names_at(self, uris: Collection[str], *, below: tuple[str, ...] = ()) -> list[str]:
        return sorted(card.name for card, uri in self._checkpoints() if uri in uris or uri.startswith(below))

    def names_stating(self, *fields: str) -> list[str]:
        return sorted(card.name for card in self._all() if any(card.has_field(field) for field in fields))

    def _near(self, name: str, *, models: bool) -> list[str]:
        return get_close_matches(name, self.asset_names)

    def _all(self) -> Iterator[AssetCard]:
        return (card for name in self.asset_names if (card := self.maybe_retrieve_card(name)) is not None)

    def _checkpoints(self) -> Iterator[tuple[AssetCard, str]]:
        for card in self._all():
            try:
                yield card, checkpoint_ref(card).uri
            except AssetCardError:
                continue  # a bad card, which a use of it reports
