"""Questions about models, answered without loading any: what the command line asks, for Python."""

from __future__ import annotations

from pathlib import Path

from lading.cards.card import AssetCard
from lading.catalog.store import AssetStore
from lading.models.fit import CheckReport, check_manifest
from lading.models.resolve import resolve_model


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
    model = resolve_model(target, store, restrict=restrict)

    return check_manifest(model.checkpoint.manifest, model.family, model.config)
