"""The addresses that a card states: of its checkpoint, the digests of it, its tokenizer and its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from lading.cards.card import AssetCard, AssetCardField, CardEntry, split_gated
from lading.errors import AssetCardError

_FIELDS = ("checkpoint", "digests", "tokenizer", "adapter")


def stated_addresses(metadata: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield the addresses in the fields of a card, each after its place: ``adapters[1].checkpoint``."""
    for name in _FIELDS:
        if isinstance(value := metadata.get(name), str) and value.strip():
            yield name, value
    adapters = metadata.get("adapters")
    for i, adapter in enumerate(adapters if isinstance(adapters, list) else ()):
        value = adapter.get("checkpoint") if isinstance(adapter, Mapping) else None
        if isinstance(value, str) and value.strip():
            yield f"adapters[{i}].checkpoint", value


def stated_uris(entry: CardEntry) -> Iterator[tuple[str, str, str]]:
    """Yield the place, the address and its URI for each address that a card or an overlay states.

    This skips addresses that lead nowhere, such as a relative path in a card that is not from a file.
    """
    card = AssetCard(entry.name, entry.metadata)
    for place, address in stated_addresses(entry.metadata):
        with suppress(AssetCardError):
            yield place, address, split_gated(AssetCardField(place, card, address, entry.folder).as_uri())[0]


def with_addresses(metadata: Mapping[str, object], addresses: Mapping[str, str]) -> dict[str, object]:
    """Return the fields of a card with other addresses, by the places that :func:`stated_addresses` gives them."""
    changed = {**metadata, **{name: value for name, value in addresses.items() if name in _FIELDS}}
    adapters = metadata.get("adapters")
    if isinstance(adapters, list):
        places = [addresses.get(f"adapters[{i}].checkpoint") for i in range(len(adapters))]
        changed["adapters"] = [
            adapter if place is None else {**adapter, "checkpoint": place}
            for adapter, place in zip(adapters, places, strict=True)
        ]

    return changed
