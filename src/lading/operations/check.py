"""The check that a checkpoint fits its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lading.cards.card import AssetCard
from lading.catalog.own_store import CardStore
from lading.models.fit import CheckReport, check_manifest
from lading.models.resolve import ResolveOptions, resolve_model


def check_model(
    target: AssetCard | str | Path,
    *,
    revision: str | None = None,
    restrict: bool = True,
    store: CardStore | None = None,
) -> CheckReport:
    """Check that a model's checkpoint, and the adapters of its card, fit its architecture, by the names, shapes and
    dtypes of their tensors.

    This also compares the numbers of a card with the ``config.json`` beside its weights.

    :param target: as ``load_model`` takes it; likewise ``revision``. The checkpoint may be remote; if it is not
        indexed, its headers are read from the source.
    :param restrict: see :func:`lading.formats.index`; for a path.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises AssetCardError: the card's family is not registered, or its overrides do not fit.
    :raises ModelGatedError: the card names no checkpoint.
    :raises FetchError: the source of the checkpoint cannot be reached.
    :raises CheckpointNotFoundError: the checkpoint does not exist (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    :raises NotSupportedError: its ``config.json`` says that it is quantized, or no registered family reads it.
    """
    model = resolve_model(target, store, options=ResolveOptions(revision=revision, restrict=restrict))
    report = check_manifest(model.checkpoint.manifest, model.family, model.config, model.adapters)

    return replace(report, contradictions=model.contradictions)
