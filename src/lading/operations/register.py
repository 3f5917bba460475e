"""Registration of one checkpoint under a name, from Python: the last line of a training script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lading.cards.card import AssetCard
from lading.catalog.added_cards import card_entry, record_additions
from lading.catalog.importing.changes import ADDED
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import AssetCardError
from lading.operations.add import resolve_target
from lading.operations.describe_checkpoint import Describer
from lading.operations.find_checkpoints import find_at


def register_model(name: str, path: str | Path, *, base: str | None = None, **fields: object) -> AssetCard:
    """Write a card for a checkpoint to the catalog, so that ``load_model(name)`` loads it from now on.

    The card is as :func:`lading.add_checkpoints` writes it. It replaces an earlier one of this name that either of the
    two has written; ``lading remove-card`` removes it. The files are taken as they are now, as by
    :func:`lading.index_checkpoint`: the catalog forgets the digests of other bytes. In a gang, call this on one rank.

    :param path: a folder or a file, or an address such as ``hg://org/name``; only headers are read there.
    :param base: the name of a card that this one inherits from, such as that of the model that was fine-tuned. The card
        states its own family and architecture where ``config.json`` describes others.
    :param fields: further fields of the card, and those that take the place of others: ``license="mit"``,
        ``model_config={"dropout_p": 0.1}``.

    :returns: the card.

    :raises CheckpointNotFoundError: nothing is at the path (also a ``FileNotFoundError``).
    :raises AssetNotFoundError: the card ``base`` does not exist.
    :raises AssetCardError: another source has a card of this name; or the name or a field is not valid.
    :raises NotSupportedError: the checkpoint is quantized, or of a format or a model type that lading does not support;
        or its folder has no ``config.json``, and neither ``base`` nor ``model_family`` is given.
    :raises ModelCheckpointError: it is damaged.
    :raises FetchError: its source cannot be reached.
    :raises CatalogError: the catalog cannot be written; nothing was written then.
    """
    store = get_asset_store()
    store.database.require_writable()
    require_own_name(name, store)
    # Who has trained a model again has changed its files on purpose.
    describer = Describer(store, restrict=True, accept=True)
    target = resolve_target(path)
    if isinstance(target, Path):
        described = describer.at_path(find_at(target), fields.get("state_dict"))
    else:
        described = describer.at_address(target)

    own = described.fields if base is None else _unlike_base(described.fields, base, store)
    stated = {**({} if base is None else {"base": base}), **own, **fields}
    described.require_family(stated)
    entry = card_entry(name, stated)
    record_additions(store.database, [entry], [] if described.contents is None else [described.contents])

    return store.retrieve_card(entry.name)


def require_own_name(name: str, store: AssetStore) -> None:
    """Require that a name is valid, and that of no card from another source.

    :raises AssetCardError: it is not.
    """
    before = store.maybe_retrieve_card(f"{card_entry(name, {}).name}@")
    summary = None if before is None else store.summary(before)
    if summary is not None and summary.source != ADDED:
        raise AssetCardError(
            name, f"The name {name!r} is that of a card from another source ({summary.source}). Choose another name."
        )


def _unlike_base(fields: Mapping[str, object], base: str, store: AssetStore) -> dict[str, object]:
    """Return the fields of a card, without the family and the architecture that its base states.

    :raises AssetNotFoundError: no card has this name.
    """
    card = store.retrieve_card(base)
    model = {"model_family": fields.get("model_family"), "model_arch": fields.get("model_arch")}
    inherited = {name: None if (field := card.maybe_get_field(name)) is None else field.value for name in model}
    if fields.get("model_family") is not None and model != inherited:
        # A null takes back the architecture of the base, whose numbers are others.
        return {**fields, **model}

    return {name: value for name, value in fields.items() if name not in model}
