"""The adapters that a card states: ``adapter``, the address of one, or ``adapters``, a list with weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lading.cards.card import AssetCard, AssetCardField, checkpoint_ref, is_sha256, split_gated
from lading.cards.documents.document import show
from lading.errors import AssetCardError
from lading.formats.adapter_config import ADAPTER_NAME

_MAX_WEIGHT = 1e30

_KEYS = ("checkpoint", "weight", "sha256")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """An adapter as a card states it."""

    card: AssetCard
    """A card of its own, which has the adapter as its checkpoint, and the address as its name."""
    weight: float = 1.0
    """The factor of what it adds to the weights."""


def adapter_refs(card: AssetCard) -> tuple[AdapterRef, ...]:
    """Return the adapters of a card, in the order in which they are merged.

    The nearest card of the chain that states ``adapter`` or ``adapters`` counts; a null means none.

    :raises AssetCardError: a card states both, or a field or an address of another form.
    """
    owner = next((each for each in card.chain() if "adapter" in each.metadata or "adapters" in each.metadata), None)
    if owner is None:
        return ()
    one, several = owner.metadata.get("adapter"), owner.metadata.get("adapters")
    if one is not None and several is not None:
        raise AssetCardError(
            card.name,
            f"The card {owner.name!r} states both `adapter` and `adapters` ({owner.source}). State one of them, and "
            "`null` for the other.",
        )
    if one is not None:
        return (_ref(owner, "adapter", one),)
    if several is None:
        return ()

    if problem := next(adapter_problems(several), None):
        raise AssetCardError(card.name, f"The field 'adapters' of the card {owner.name!r} ({owner.source}){problem}.")
    assert isinstance(several, list)

    return tuple(
        _ref(owner, f"adapters[{i}].checkpoint", entry["checkpoint"], entry.get("weight", 1), entry.get("sha256"))
        for i, entry in enumerate(several)
    )


def adapter_problems(value: object) -> Iterator[str]:
    """Yield what is wrong with a value of ``adapters``: ``[0].weight: expected …, found …``."""
    if not isinstance(value, list):
        yield f": expected a list of mappings with 'checkpoint' and 'weight', found {show(value)}"
        return
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            yield f"[{i}]: expected a mapping with 'checkpoint' and 'weight', found {show(entry)}"
            continue
        if unknown := [key for key in entry if key not in _KEYS]:
            yield f"[{i}]: expected the fields {', '.join(_KEYS)}, found {show(unknown[0])}"
        if not isinstance(entry.get("checkpoint"), str):
            yield f"[{i}].checkpoint: expected a string, found {show(entry.get('checkpoint'))}"
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= _MAX_WEIGHT:
            yield f"[{i}].weight: expected a finite number, found {show(weight)}"
        if (digest := entry.get("sha256")) is not None and not is_sha256(digest):
            yield f"[{i}].sha256: expected 64 hexadecimal digits, found {show(digest)}"


def _ref(owner: AssetCard, field: str, address: object, weight: float = 1, sha256: str | None = None) -> AdapterRef:
    folder = owner.folders.get(field.partition("[")[0])
    address = AssetCardField(field, owner, address, folder).as_uri()
    uri, _ = split_gated(address)
    metadata: dict[str, object] = {"checkpoint": address}
    if sha256 is not None:
        metadata["sha256"] = sha256
    if not uri.endswith(".safetensors") and uri.partition(":")[0].lower() not in ("http", "https"):
        metadata["checkpoint_path"] = ADAPTER_NAME
    card = AssetCard("", metadata, None, {}, owner.source)

    return AdapterRef(card=replace(card, name=checkpoint_ref(card).shown.removeprefix("file://")), weight=float(weight))
