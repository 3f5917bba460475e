"""Questions about models, answered without loading any: what the command line asks, for Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lading.cards.card import Architecture, AssetCard
from lading.cards.config import architecture_config
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.checkpoint import Checkpoint, path_checkpoint
from lading.checkpoints.locate import card_checkpoint
from lading.checkpoints.sidecar_lookup import with_sidecar
from lading.errors import NotSupportedError
from lading.formats.hf_folder import family_of_folder
from lading.models.completion import completed, model_dtype
from lading.models.construct import build_on_meta
from lading.models.family import Family, get_family
from lading.models.fit import CheckReport, check_manifest
from lading.models.resolve import family_of_card, model_config
from lading.models.targets import targets_of
from lading.operations.diff import DiffReport, Side, diff
from lading.transfer.dtypes import DType

if TYPE_CHECKING:
    from lading.operations.plan import LoadPlan


def check_model(
    target: AssetCard | str | Path, *, restrict: bool = True, store: AssetStore | None = None
) -> CheckReport:
    """Whether a model's checkpoint fits its architecture, by the names, shapes and dtypes of its tensors.

    :param target: a card, the name of one, or the path of a Hugging Face style folder. The checkpoint of a card need
        not be on this machine: of one that the catalog does not know yet, the headers are read where it is.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.

    :raises AssetNotFoundError: no card has that name.
    :raises AssetCardError: the card's family is not registered, or its overrides do not fit.
    :raises ModelGatedError: the card names no checkpoint.
    :raises FetchError: the source of the checkpoint cannot be reached.
    :raises CheckpointNotFoundError: nothing is where the checkpoint should be (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    :raises NotSupportedError: its ``config.json`` says that it is quantised, or is of no family that is registered.
    """
    family, config, checkpoint = _model_of(target, store, restrict=restrict)

    return check_manifest(checkpoint.manifest, family, config)


def plan_load(
    target: AssetCard | str | Path,
    *,
    tp: int = 1,
    sdp: int = 1,
    pp: int = 1,
    rdp: int = 1,
    dtype: DType = "auto",
    ranks: Sequence[int] | None = None,
    restrict: bool = True,
    store: AssetStore | None = None,
) -> LoadPlan:
    """What each rank of gangs of these sizes would read and hold of a model, were it loaded; no weight is read.

    :param target: as :func:`check_model` takes it.
    :param dtype: as ``load_model`` takes it.
    :param ranks: to tell of, from 0 to ``pp × rdp × sdp × tp - 1``; default: all.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.

    :raises ValueError: a size that is less than 1; a rank that the world does not have.
    :raises ModelCheckpointMismatchError: the checkpoint does not fit the model's architecture.
    :raises NotSupportedError: a size of the architecture does not divide over ``tp``; the checkpoint is quantised.

    Otherwise what :func:`check_model` does.
    """
    from lading.operations.plan import plan_checkpoint  # what knows of placements takes its time to import

    family, config, checkpoint = _model_of(target, store, restrict=restrict)
    if not isinstance(target, Path):
        checkpoint = with_sidecar(checkpoint, store or get_asset_store(), tp)

    return plan_checkpoint(
        checkpoint,
        family,
        config,
        sizes={"pp": pp, "rdp": rdp, "sdp": sdp, "tp": tp},
        dtype=model_dtype(dtype, checkpoint, store=None if isinstance(target, Path) else store or get_asset_store()),
        ranks=ranks,
    )


def _model_of(
    target: AssetCard | str | Path, store: AssetStore | None, *, restrict: bool
) -> tuple[Family[Any, Any], Any, Checkpoint]:
    if isinstance(target, Path):
        family, config = family_of_folder(target)
        return family, config, path_checkpoint(target, restrict=restrict)

    store = store or get_asset_store()
    card = target if isinstance(target, AssetCard) else store.retrieve_card(target)
    family = family_of_card(card)
    config = model_config(card, family, store)

    checkpoint = card_checkpoint(card, store)

    return family, completed(config, family, checkpoint, store=store), checkpoint


def diff_models(
    a: AssetCard | str | Path, b: AssetCard | str | Path, *, restrict: bool = True, store: AssetStore | None = None
) -> DiffReport:
    """In what two checkpoints, or two architectures, differ.

    Of checkpoints, the tensors are compared: names, shapes, dtypes, and values where the catalog knows the digests of
    both. Of architectures, the fields of their configurations, and names and shapes of the parameters.

    :param a: a card, the name of one, the path of a checkpoint, or an architecture as ``"family/architecture"``.
    :param b: likewise; an architecture if ``a`` is one.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.

    :raises AssetNotFoundError: no card has that name.
    :raises ModelFamilyNotKnownError: the family of an architecture is not registered.
    :raises ModelArchitectureNotKnownError: the family has no such architecture.
    :raises NotSupportedError: a checkpoint and an architecture.

    Otherwise what :func:`check_model` does of checkpoints.
    """
    store = store or get_asset_store()
    things = [_retrieve(target, store) for target in (a, b)]
    if len({isinstance(thing, Architecture) for thing in things}) > 1:
        raise NotSupportedError(
            "Expected two checkpoints or two architectures to compare, but found one of each. `lading check NAME` says "
            "whether the checkpoint of a model fits its architecture."
        )

    return diff(*(_side(thing, store, restrict=restrict) for thing in things))


def _retrieve(target: AssetCard | str | Path, store: AssetStore) -> AssetCard | Architecture | Path:
    if not isinstance(target, str):
        return target

    family, slash, arch = target.partition("/")
    if slash and store.maybe_retrieve_card(target) is None:
        return store.architecture(arch, family)

    return store.retrieve_card(target)


def _side(thing: AssetCard | Architecture | Path, store: AssetStore, *, restrict: bool) -> Side:
    if isinstance(thing, Architecture):
        return _architecture_side(thing)

    if isinstance(thing, Path):
        checkpoint = path_checkpoint(thing, restrict=restrict)
    else:
        checkpoint = card_checkpoint(thing, store)

    return Side.of_manifest(checkpoint.manifest, _digests(checkpoint, store))


def _architecture_side(architecture: Architecture) -> Side:
    family = get_family(architecture.family)
    config = architecture_config(architecture, family.config_kls)
    targets = targets_of(build_on_meta(family, config), dtype=None)

    return Side(
        names=targets.names, shapes=targets.shapes, dtypes=targets.dtypes, config=asdict(config), has_values=False
    )


def _digests(checkpoint: Checkpoint, store: AssetStore) -> Mapping[str, str]:
    """The digests of a checkpoint's tensors, if the catalog knows them and they are those of its files as they are."""
    # What a source publishes is pinned. Files that others look after are those that were verified while they look so.
    if checkpoint.ref is None and not checkpoint.trusted:
        stored = store.checkpoint(checkpoint.uri)
        copies = () if stored is None else stored.copies
        verified = {copy.path: copy.stat for copy in copies if copy.verified_at is not None}
        if any(verified.get(file.path.absolute()) != file.stat for file in checkpoint.here()):
            return {}

    return store.tensor_digests(checkpoint.uri)
