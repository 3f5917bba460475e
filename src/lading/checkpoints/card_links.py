"""The cards of a checkpoint: the URI by which the catalog knows it, and the cards that name that URI."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable

from lading import formats
from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.catalog.store import AssetStore
from lading.errors import AssetCardError
from lading.system.uris import path_uri, uri_path

log = logging.getLogger("lading")


def catalog_uri(ref: CheckpointRef, store: AssetStore) -> str:
    """Return the URI by which the catalog of ``store`` knows the checkpoint of a card."""
    path = uri_path(ref.uri)
    if path is None:
        return ref.key
    path = path if ref.path is None else path / ref.path

    return path_uri(formats.rewritten(path, cache=store.settings.cache_dir) or path)


def cards_with(
    store: AssetStore, uris: Collection[str], *, below: tuple[str, ...] = (), adapters: bool = True
) -> list[tuple[AssetCard, CheckpointRef]]:
    """Return the cards, with their overlays, that state one of these URIs as their checkpoint; log bad cards.

    A card with adapters counts for each of them, too.

    :param uris: of ``checkpoint`` alone, without the ``checkpoint_path`` inside.
    :param below: beginnings of further URIs.
    :param adapters: whether adapters may be wanted.
    """
    found = []
    for name in store.names_at(uris, below=below):
        found += _stated(name, store, lambda card: [checkpoint_ref(card)])
    for name in store.names_stating("adapter", "adapters") if adapters else ():
        found += _stated(name, store, lambda card: [checkpoint_ref(each.card) for each in adapter_refs(card)])

    return [(card, ref) for card, ref in found if ref.uri in uris or ref.uri.startswith(below)]


def _stated(
    name: str, store: AssetStore, refs: Callable[[AssetCard], list[CheckpointRef]]
) -> list[tuple[AssetCard, CheckpointRef]]:
    """Return what ``refs`` finds in a card; log a bad one.

    A card whose base is missing still has the checkpoint that it states itself.
    """
    try:
        card = store.maybe_retrieve_card(name)
    except AssetCardError as error:
        log.warning("A card of the catalog cannot be used: %s", error)
        card = store.own_card(name)
    try:
        return [] if card is None else [(card, ref) for ref in refs(card)]
    except AssetCardError as error:
        log.warning("A card of the catalog cannot be used: %s", error)
        return []


def names_of(store: AssetStore, uris: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the cards whose models are loaded from each of these checkpoints."""
    wanted = set(uris)
    heads = {stated for uri in wanted for head in heads_of(uri) for stated in (head, f"{head}/")}
    paths = filter(None, map(uri_path, wanted))
    # The address of an original does not lead to its rewrite.
    any_rewritten = any(formats.is_rewritten(path, store.settings.cache_dir) for path in paths)
    below = ("file://",) if any_rewritten else ()
    names: dict[str, list[str]] = {}
    # The address of an adapter is that of its file.
    adapters = any(uri.endswith(".safetensors") for uri in wanted)
    for card, ref in cards_with(store, heads, below=below, adapters=adapters):
        uri = catalog_uri(ref, store)
        if uri in wanted:
            names.setdefault(uri, []).append(card.name)

    return names


def heads_of(uri: str) -> list[str]:
    """Return a URI and those that contain it, as a card may state them with a ``checkpoint_path`` inside."""
    heads = [uri.rstrip("/")]
    while "/" in heads[-1].partition("://")[2]:
        heads.append(heads[-1].rpartition("/")[0])

    return heads
