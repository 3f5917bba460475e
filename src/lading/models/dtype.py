"""The dtype of a loaded model."""

from __future__ import annotations

import logging
import math

import torch

from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.extra_files import read_or_fetch_config
from lading.errors import FetchError
from lading.formats.manifest import FLOATS
from lading.transfer.dtypes import TORCH_DTYPES, DType, dtype_by_name

log = logging.getLogger("lading")


def model_dtype(dtype: DType, checkpoint: Checkpoint, *, store: AssetStore | None = None) -> torch.dtype | None:
    """Return the dtype of a loaded model; ``None`` for that of each tensor of the checkpoint.

    :param dtype: ``"auto"`` is the one that the ``config.json`` beside the checkpoint states, else the one that most
        elements of the checkpoint have; ``"keep"`` that of each tensor.
    :param store: the store whose catalog records a fetch of ``config.json``.

    :raises CorruptModelCheckpointError: ``config.json`` is not a JSON object.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "keep":
        return None

    try:
        hf_config = read_or_fetch_config(checkpoint, store)
    except (FetchError, OSError) as error:
        log.info("the dtype cannot be read from config.json of %s: %s", checkpoint.name, error)
        hf_config = {}
    stated = hf_config.get("dtype") or hf_config.get("torch_dtype")
    if isinstance(stated, str) and (found := dtype_by_name(stated)) is not None:
        return found

    manifest = checkpoint.manifest
    elements = dict.fromkeys(sorted(FLOATS), 0)
    for own, shape in zip(manifest.dtypes, manifest.shapes, strict=True):
        if own in elements:
            elements[own] += math.prod(shape)
    common = max(elements, key=elements.__getitem__)

    return TORCH_DTYPES[common] if elements[common] else torch.get_default_dtype()
