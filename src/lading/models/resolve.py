"""The resolution of a card, a name or a path to a family, a configuration and a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lading.cards.card import AssetCard
from lading.cards.config import architecture_config, resolve_config
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.adapter import Adapter, card_adapters
from lading.checkpoints.checkpoint import Checkpoint, path_checkpoint
from lading.checkpoints.extra_files import read_or_fetch_config
from lading.checkpoints.locate import card_checkpoint
from lading.errors import (
    AssetCardError,
    CheckpointNotFoundError,
    ModelArchitectureNotKnownError,
    ModelFamilyNotKnownError,
    NotSupportedError,
)
from lading.formats.config_json import read_hf_config, refuse_quantized_config
from lading.formats.folder import container_of
from lading.models.family import Family, check_config_type, family_of_model_type, get_family
from lading.system.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel:
    """A name, a card or a path, resolved to everything that a load needs."""

    name: str
    """The name of the card, or the path."""
    family: Family[Any, Any]
    config: Any
    """The complete configuration, of the family's class."""
    checkpoint: Checkpoint
    card: AssetCard | None
    """The card; ``None`` for a path, likewise below."""
    store: AssetStore | None
    """The store that was asked."""
    adapters: tuple[Adapter, ...] = ()
    """The adapters to merge into the weights."""


def resolve_model(
    target: AssetCard | str | Path,
    store: AssetStore | None = None,
    *,
    family: Family[Any, Any] | None = None,
    config: Any = None,
    checkpoint: Checkpoint | None = None,
    restrict: bool = True,
    progress: bool = False,
    accept_others: bool = False,
) -> ResolvedModel:
    """Resolve a card, the name of a card, or a path to a family, a configuration and a checkpoint.

    :param store: default: the default store; not asked about a path.
    :param family: the family that is asked for; default: that of the card, or of ``config.json``.
    :param config: instead of the card's configuration, or of the one in ``config.json``.
    :param checkpoint: the checkpoint of the card, if the caller has found it.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.
    :param progress: show a bar on stderr if the manifest takes a download.
    :param accept_others: as :func:`lading.checkpoints.locate.card_checkpoint` takes it.

    :raises AssetNotFoundError: no card has that name.
    :raises AssetCardError: the card is of another family, its family is not registered, or its overrides do not fit.
    :raises ModelGatedError: the card names no checkpoint.
    :raises FetchError: the source of the checkpoint cannot be reached.
    :raises CheckpointNotFoundError: nothing is at the place of the checkpoint (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    :raises NotSupportedError: ``config.json`` says that it is quantized, or no registered family reads it.
    """
    if isinstance(target, Path):
        if config is None or family is None:
            family, config = family_of_folder(target, family)
        checkpoint = resolve_checkpoint(target, store, restrict=restrict)
        config = _complete(config, family, checkpoint, None)
        return ResolvedModel(
            name=str(target), family=family, config=config, checkpoint=checkpoint, card=None, store=None
        )

    store = store or get_asset_store()
    card = target if isinstance(target, AssetCard) else store.retrieve_card(target)
    family = family_of_card(card) if family is None else family
    check_family(card, family)
    config = model_config(card, family, store) if config is None else config
    if checkpoint is None:
        checkpoint = card_checkpoint(card, store, progress=progress, accept_others=accept_others)
    config = _complete(config, family, checkpoint, store)
    adapters = card_adapters(card, checkpoint, store, progress=progress, accept_others=accept_others)

    return ResolvedModel(
        name=card.name,
        family=family,
        config=config,
        checkpoint=checkpoint,
        card=card,
        store=store,
        adapters=adapters,
    )


def resolve_checkpoint(
    target: AssetCard | str | Path, store: AssetStore | None = None, *, restrict: bool = True
) -> Checkpoint:
    """Resolve a card, the name of a card, or a path to a checkpoint, whose family does not matter.

    The parameters and errors are those of :func:`resolve_model`.
    """
    if isinstance(target, Path):
        settings = Settings.from_environment() if store is None else store.settings
        return path_checkpoint(target, cache=settings.cache_dir, restrict=restrict)

    store = store or get_asset_store()

    return card_checkpoint(target if isinstance(target, AssetCard) else store.retrieve_card(target), store)


def family_of_card(card: AssetCard) -> Family[Any, Any]:
    """Return the family of a card.

    :raises AssetCardError: it is not registered, or the card names no family.
    """
    name = card.field("model_family").as_(str)
    try:
        return get_family(name)
    except ModelFamilyNotKnownError as error:
        raise AssetCardError(card.name, f"The card {card.name!r} asks for the model family {name!r}. {error}") from None


def model_config(card: AssetCard, family: Family[Any, Any], store: AssetStore) -> Any:
    """Return the configuration of a card: the defaults of the family, its architecture's, and the card's overrides.

    :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
        overrides that do not fit.
    """
    check_family(card, family)

    architecture = None
    arch = card.maybe_get_field("model_arch")
    if arch is not None:
        try:
            architecture = store.architecture(arch.as_(str), family.name)
        except ModelArchitectureNotKnownError as error:
            raise AssetCardError(card.name, f"The field 'model_arch' of the card {card.name!r}: {error}") from None

    return resolve_config(card, architecture, family.config_kls)


def check_family(card: AssetCard, family: Family[Any, Any]) -> None:
    """Require that the card is of ``family``.

    :raises AssetCardError: it is of another family.
    """
    stated = card.field("model_family").as_(str)
    if stated != family.name:
        raise AssetCardError(
            card.name,
            f"The card {card.name!r} is expected to be of the family {family.name!r}, but its `model_family` is "
            f"{stated!r}.",
        )


def arch_config(arch: str, family: Family[Any, Any], store: AssetStore) -> Any:
    """Return the configuration of an architecture.

    :raises ModelArchitectureNotKnownError: the family has none of this name.
    """
    return architecture_config(store.architecture(arch, family.name), family.config_kls)


def family_of_folder(path: Path, asked: Family[Any, Any] | None = None) -> tuple[Family[Any, Any], Any]:
    """Return the family and the configuration of a Hugging Face style folder, from its ``config.json``.

    :param asked: the requested family; it may also read its part of a larger model, and a family for all model types
        those of other families.

    :raises CheckpointNotFoundError: there is no such folder (also a ``FileNotFoundError``).
    :raises NotSupportedError: no ``config.json``, or a model type that no registered family reads.
    """
    if not path.exists() and container_of(path) is None:
        raise CheckpointNotFoundError(path, f"No checkpoint is at {path}: there is no such file or folder.")

    hf_config = read_hf_config(path)
    if not hf_config:
        raise NotSupportedError(
            f"{path} has no config.json, so the family of the model is unknown. Load it with "
            "`get_<family>_model_hub().load_custom_model(path, config)`, or name it in a card."
        )

    model_type = hf_config.get("model_type")
    stated = hf_config.get("architectures")
    architectures = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    if asked is not None and (asked.reads_other_model_types or model_type in asked.hf_part_of):
        family: Family[Any, Any] | None = asked
    else:
        family = family_of_model_type(model_type, architectures) if isinstance(model_type, str) else None
    if family is None or family.from_hf is None:
        of = f" with the architectures {architectures}" if architectures else ""
        raise NotSupportedError(
            f"{path}/config.json is of the model type {model_type!r}{of}, which no registered family reads "
            "(`lading families` shows them)."
        )

    refuse_quantized_config(hf_config, path)

    return family, family.from_hf(hf_config)


def _complete(config: Any, family: Family[Any, Any], checkpoint: Checkpoint, store: AssetStore | None) -> Any:
    """Return the configuration, completed from ``config.json`` if the family needs that."""
    if family.complete is None:
        return config

    check_config_type(config, family)
    hf_config = read_or_fetch_config(checkpoint, store)
    refuse_quantized_config(hf_config, checkpoint.where)

    return family.complete(config, hf_config)
