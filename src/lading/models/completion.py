"""Configurations that lack what only the ``config.json`` beside a checkpoint tells."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.published import CONFIG_NAME, name_in_source
from lading.checkpoints.recording import fetch_along
from lading.errors import CheckpointNotFoundError, FetchError
from lading.formats.hf_folder import parse_hf_config, read_hf_config, refuse_quantised_config
from lading.models.construct import check_config_type
from lading.models.family import Family
from lading.sources.open import open_source
from lading.sources.source import RemoteFile, Snapshot
from lading.system.settings import Settings
from lading.transfer.dtypes import FLOATS, TORCH_DTYPES, DType

log = logging.getLogger("lading")


def completed(
    config: Any,
    family: Family[Any, Any],
    checkpoint: Checkpoint,
    hf_config: Mapping[str, object] | None = None,
    *,
    store: AssetStore | None = None,
) -> Any:
    """The configuration with what it lacks; the very one, unless the family takes it from beside the checkpoint.

    :param hf_config: the ``config.json`` beside it, where it is known; else it is read, or fetched.
    :param store: whose catalog is told if it is fetched.

    :raises TypeError: ``config`` is not of the family's class.
    :raises FetchError: ``config.json`` cannot be fetched.
    :raises CorruptModelCheckpointError: it is not a JSON object.
    :raises NotSupportedError: it asks for something that the family does not do.
    :raises PolicyError: it asks for code of a repository to be run.
    """
    if family.complete is None:
        return config

    check_config_type(config, family)
    hf_config = _hf_config(checkpoint, store) if hf_config is None else hf_config
    refuse_quantised_config(hf_config, checkpoint.where)

    return family.complete(config, hf_config)


def model_dtype(dtype: DType, checkpoint: Checkpoint, *, store: AssetStore | None = None) -> torch.dtype | None:
    """Return the dtype that a model is to be loaded in; ``None`` for that of each tensor of the checkpoint.

    :param dtype: ``"auto"`` is the one that the ``config.json`` beside the checkpoint states, else the one that most
        elements of the checkpoint have; ``"keep"`` that of each tensor.
    :param store: whose catalog is told if ``config.json`` is fetched.

    :raises CorruptModelCheckpointError: ``config.json`` is not a JSON object.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "keep":
        return None

    try:
        hf_config = _hf_config(checkpoint, store)
    except (FetchError, OSError) as error:
        log.info("config.json of %s cannot be asked for a dtype: %s", checkpoint.name, error)
        hf_config = {}
    stated = hf_config.get("dtype") or hf_config.get("torch_dtype")
    named = {str(TORCH_DTYPES[name]).removeprefix("torch."): TORCH_DTYPES[name] for name in FLOATS}
    if isinstance(stated, str) and (found := named.get(stated.removeprefix("torch."))) is not None:
        return found

    manifest = checkpoint.manifest
    elements = dict.fromkeys(sorted(FLOATS), 0)
    for own, shape in zip(manifest.dtypes, manifest.shapes, strict=True):
        if own in elements:
            elements[own] += math.prod(shape)
    common = max(elements, key=elements.__getitem__)

    return TORCH_DTYPES[common] if elements[common] else torch.get_default_dtype()


def _hf_config(checkpoint: Checkpoint, store: AssetStore | None) -> Mapping[str, object]:
    """The ``config.json`` beside a checkpoint, fetched where it is not here; empty where there is none."""
    ref = checkpoint.ref
    if ref is None:
        return read_hf_config(Path(checkpoint.where))

    source = open_source(
        ref.uri, inner_path=ref.path, revision=checkpoint.revision or None, settings=Settings.from_environment()
    )
    shards = [shard.name for shard in checkpoint.manifest.shards]
    file = RemoteFile(name=name_in_source(source.inner, CONFIG_NAME, shards=shards), size=None)
    snapshot = Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=(file,))
    try:
        (fetched,) = fetch_along(source, snapshot, [file], store, checkpoint.uri, progress=False)
    except CheckpointNotFoundError:
        return {}

    return parse_hf_config(fetched.path)  # in lading's cache it has another name
