"""The resolution of a card, a name, an address or a path to a family, a configuration and a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lading.cards.adapters import adapter_refs
from lading.cards.card import CONFIG_KEYS, AssetCard
from lading.cards.config import architecture_config, resolve_config
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.adapter import Adapter, card_adapters
from lading.checkpoints.checkpoint import Checkpoint, path_checkpoint
from lading.checkpoints.extra_files import config_here, read_or_fetch_config
from lading.checkpoints.locate import card_checkpoint
from lading.checkpoints.names import find_card
from lading.errors import (
    AssetCardError,
    FetchError,
    ModelArchitectureNotKnownError,
    ModelCheckpointMismatchError,
    ModelFamilyNotKnownError,
    NotSupportedError,
)
from lading.formats.config_json import refuse_quantized_config
from lading.models.family import Family, check_config_type, get_family
from lading.models.hf_config import contradictions, described_config, family_beside, family_of_folder
from lading.system.filesystem import expand_home
from lading.system.settings import Settings

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolveOptions:
    """The options of a resolution: how its checkpoint is looked up."""

    revision: str | None = None
    """The revision of a repository, as :func:`lading.checkpoints.names.find_card` takes it."""
    restrict: bool = True
    """``restrict`` of :func:`lading.formats.index`; for a path."""
    progress: bool = False
    """``True`` to show a bar on stderr if the manifest takes a download."""
    accept_others: bool = False
    """``accept_others`` of :func:`lading.checkpoints.locate.card_checkpoint`."""
    fetches: bool = True
    """``fetches`` of :func:`lading.checkpoints.locate.card_checkpoint`."""


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
    """The card; ``None`` for a path that no card has, likewise below."""
    store: AssetStore | None
    """The store that was asked."""
    adapters: tuple[Adapter, ...] = ()
    """The adapters to merge into the weights."""
    contradictions: tuple[str, ...] = ()
    """The clauses of :func:`lading.models.hf_config.contradictions` about the card."""


_DEFAULT = ResolveOptions()


def resolve_model(
    target: AssetCard | str | Path,
    store: CardStore | None = None,
    *,
    family: Family[Any, Any] | None = None,
    config: Any = None,
    checkpoint: Checkpoint | None = None,
    families: Mapping[str, Family[Any, Any]] | None = None,
    options: ResolveOptions = _DEFAULT,
) -> ResolvedModel:
    """Resolve a card, a name, an address or a path to a family, a configuration and a checkpoint.

    A card states them. Without a family, that is the one of the ``config.json`` beside its checkpoint; without an
    architecture, its overrides apply to the configuration in that file.

    :param target: as :func:`lading.checkpoints.names.find_card` takes it.
    :param store: default: the default store.
    :param family: the family that is asked for; default: that of the card, or of ``config.json``.
    :param config: instead of the card's configuration, or of the one in ``config.json``. A path for which a family and
        a configuration are given is taken as it is, even if a card has it.
    :param checkpoint: the checkpoint of the card, if the caller has found it.
    :param families: the families that a card may name, by name; default: those that are registered.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises AssetCardError: the card is of another family, its family is not registered, or its overrides do not fit.
    :raises ModelGatedError: the card names no checkpoint.
    :raises FetchError: the source of the checkpoint cannot be reached.
    :raises CheckpointNotFoundError: nothing is at the place of the checkpoint (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    :raises NotSupportedError: ``config.json`` says that it is quantized, or no registered family reads it.
    :raises TypeError: ``config`` is not of the family's class.
    """
    if isinstance(target, Path) and family is not None and config is not None:
        found: AssetCard | Path = expand_home(target)
    else:
        found = find_card(target, store, revision=options.revision, family=None if family is None else family.name)
    if isinstance(found, Path):
        return _resolve_path(found, None if store is None else open_store(store), family, config, options)

    card, store = found, open_store(store)
    if card.has_field("model_family"):
        family = family_of_card(card, families) if family is None else family
        check_family(card, family)
        if config is None:
            model_config(card, family, store)  # what is wrong in a card is reported before its source is asked
    if family is not None and config is not None:
        check_config_type(config, family)
    if checkpoint is None:
        checkpoint = card_checkpoint(
            card, store, progress=options.progress, accept_others=options.accept_others, fetches=options.fetches
        )

    clauses: tuple[str, ...] = ()
    if family is None or config is None:
        hf_config = _read_config_json(card, family, checkpoint, store)
        checkpoint = checkpoint if hf_config is None else replace(checkpoint, hf_config=hf_config)
        if not card.has_field("model_family"):
            family = _family_of_config_json(card, family, checkpoint)
    assert family is not None
    if config is None:
        config = model_config(card, family, store, hf_config)
        if hf_config and _states_config(card):
            clauses = contradictions(family, config, hf_config)
    config = _complete(config, family, checkpoint, store)
    adapters = card_adapters(card, checkpoint, store, progress=options.progress, accept_others=options.accept_others)

    return ResolvedModel(
        name=card.name,
        family=family,
        config=config,
        checkpoint=checkpoint,
        card=card,
        store=store,
        adapters=adapters,
        contradictions=clauses,
    )


def _resolve_path(
    path: Path, store: AssetStore | None, family: Family[Any, Any] | None, config: Any, options: ResolveOptions
) -> ResolvedModel:
    if family is None or config is None:
        asked = family
        family, read = family_of_folder(path, asked)
        _require_asked(asked, family, str(path))
        config = read if config is None else config
    check_config_type(config, family)
    checkpoint = _path_checkpoint(path, store, restrict=options.restrict)
    config = _complete(config, family, checkpoint, None)

    return ResolvedModel(name=str(path), family=family, config=config, checkpoint=checkpoint, card=None, store=None)


def _path_checkpoint(path: Path, store: AssetStore | None, *, restrict: bool) -> Checkpoint:
    settings = Settings.from_environment() if store is None else store.settings

    return path_checkpoint(path, cache=settings.cache_dir, restrict=restrict)


def _states_config(card: AssetCard) -> bool:
    return any(card.has_field(name) for name in ("model_arch", *CONFIG_KEYS))


def _read_config_json(
    card: AssetCard, family: Family[Any, Any] | None, checkpoint: Checkpoint, store: AssetStore
) -> Mapping[str, object] | None:
    """Return the ``config.json`` beside the checkpoint of a card; ``None`` if the card does not need it, and it is not
    on this machine.

    :raises FetchError: the card needs it, and it cannot be fetched.
    """
    if family is None or (
        not card.has_field("model_arch") and (family.complete is not None or not _states_config(card))
    ):
        return read_or_fetch_config(checkpoint, store)
    if family.from_hf is None or (family.to_hf is None and card.has_field("model_arch")):
        return None
    try:
        # Files that are here are loaded without a request.
        return read_or_fetch_config(checkpoint, store) if checkpoint.files is None else config_here(checkpoint, store)
    except (FetchError, OSError) as error:
        log.info("config.json of %s cannot be compared with the card: %s", checkpoint.name, error)
        return {}


def _family_of_config_json(card: AssetCard, asked: Family[Any, Any] | None, checkpoint: Checkpoint) -> Family[Any, Any]:
    """Return the family of the ``config.json`` beside the checkpoint of a card that names none.

    :raises AssetCardError: the file does not exist, or is of another family than the one that is asked for.
    :raises NotSupportedError: no registered family reads it.
    """
    if not checkpoint.hf_config and card.source:
        card.field("model_family")  # raises the error for a card of the catalog that lacks it
    family = family_beside(checkpoint.hf_config or {}, checkpoint.where, asked)
    _require_asked(asked, family, card.name)

    return family


def _require_asked(asked: Family[Any, Any] | None, found: Family[Any, Any], name: str) -> None:
    if asked is not None and asked.name != found.name:
        raise AssetCardError(
            name,
            f"The checkpoint at {name} is expected to be of the family {asked.name!r}, but its config.json is of the "
            f"family {found.name!r}. Use the hub of that family, or `lading.load_model`.",
        )


def resolve_checkpoint(
    target: AssetCard | str | Path, store: CardStore | None = None, *, restrict: bool = True
) -> Checkpoint:
    """Resolve a card, a name, an address or a path to a checkpoint, whose family does not matter.

    The parameters and errors are those of :func:`resolve_model`.
    """
    found = find_card(target, store)
    if isinstance(found, Path):
        return _path_checkpoint(found, None if store is None else open_store(store), restrict=restrict)

    if adapter_refs(found):
        log.warning("this is the checkpoint of %s without its adapters", found.title)

    return card_checkpoint(found, open_store(store))


def get_model_family_name(card: AssetCard | str) -> str:
    """Return the name of the family of a card.

    :param card: a card, or its name.

    :raises AssetNotFoundError: no card has this name.
    :raises AssetCardError: the card names no family.
    :raises ModelFamilyNotKnownError: its family is not registered.
    """
    found = get_asset_store().retrieve_card(card) if isinstance(card, str) else card

    return get_family(found.field("model_family").as_(str)).name


def family_of_card(card: AssetCard, families: Mapping[str, Family[Any, Any]] | None = None) -> Family[Any, Any]:
    """Return the family of a card.

    :param families: the families to choose from, by name; default: those that are registered.

    :raises AssetCardError: it is not registered, or the card names no family.
    """
    name = card.field("model_family").as_(str)
    try:
        return get_family(name, families)
    except ModelFamilyNotKnownError as error:
        raise AssetCardError(card.name, f"The card {card.name!r} asks for the model family {name!r}. {error}") from None


def model_config(
    card: AssetCard, family: Family[Any, Any], store: AssetStore, hf_config: Mapping[str, object] | None = None
) -> Any:
    """Return the configuration of a card: that of its architecture, else of ``config.json``, else the defaults of the
    family; with the card's overrides.

    :param hf_config: the ``config.json`` beside its checkpoint, if there is one.

    :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
        overrides that do not fit.
    :raises NotSupportedError: the family does not support what the file says, and the card states nothing else.
    """
    if card.has_field("model_family"):
        check_family(card, family)

    architecture = described = None
    arch = card.maybe_get_field("model_arch")
    if arch is not None:
        try:
            architecture = store.architecture(arch.as_(str), family.name)
        except ModelArchitectureNotKnownError as error:
            raise AssetCardError(card.name, f"The field 'model_arch' of the card {card.name!r}: {error}") from None
    elif hf_config and family.from_hf is not None:
        try:
            described = described_config(family, hf_config)
        except (NotSupportedError, ModelCheckpointMismatchError):
            if not _states_config(card):
                raise
        if described is None and not _states_config(card):
            raise AssetCardError(
                card.name,
                f"The card {card.name!r} is of the family {family.name!r} and states no configuration, but the "
                f"config.json beside its checkpoint is of the model type {hf_config.get('model_type')!r}, which that "
                "family does not read. Correct its `model_family`, or name its architecture in `model_arch`.",
            )

    return resolve_config(card, architecture, family.config_kls, described)


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


def _complete(config: Any, family: Family[Any, Any], checkpoint: Checkpoint, store: AssetStore | None) -> Any:
    """Return the configuration, completed from ``config.json`` if the family needs that."""
    if family.complete is None:
        return config

    check_config_type(config, family)
    hf_config = read_or_fetch_config(checkpoint, store)
    refuse_quantized_config(hf_config, checkpoint.where)

    return family.complete(config, hf_config)
