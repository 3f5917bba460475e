"""The dtype of a loaded model, and of each of its tensors."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence

import torch

from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.extra_files import read_or_fetch_config
from lading.errors import FetchError
from lading.models.fit import Match
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES, DType, dtype_by_name

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

    common = checkpoint.manifest.plain_dtype

    return torch.get_default_dtype() if common is None else TORCH_DTYPES[common]


def resolve_dtypes(match: Match, *, sdp: int) -> list[str]:
    """Return the dtype in memory of each routed tensor: the requested dtype, or the one in the checkpoint.

    Parameters that are gathered together must have one dtype: if ``sdp`` ranks shard them, all parameters without a
    requested dtype get the checkpoint's most common one. Buffers are not sharded.
    """
    targets, routed = match.targets, match.routed
    free = [targets.dtypes[i] is None and targets.names[i] in targets.parameters for i in routed.targets]
    own = [match.manifest.value_dtype(t) for t in routed.tensors]

    if sdp > 1:
        elements = _count_elements(match, only=targets.parameters)
        if len(elements) > 1:
            common = max(elements, key=elements.__getitem__)
            log.warning(
                "the checkpoint holds weights as %s, but parameters that are sharded together must have one dtype: "
                "all are loaded as %s, the most common one",
                ", ".join(sorted(elements)),
                common,
            )
            own = [common if is_free else dtype for is_free, dtype in zip(free, own, strict=True)]

    return [targets.dtypes[i] or dtype for i, dtype in zip(routed.targets, own, strict=True)]


def dtypes_of_others(match: Match, names: Sequence[str]) -> dict[str, torch.dtype]:
    """Return the dtypes of targets that the checkpoint does not make: the requested one, or its most common one."""
    if not names:
        return {}

    common = DTYPE_NAMES[common_dtype_of_targets(match)]
    own = dict(zip(match.targets.names, match.targets.dtypes, strict=True))

    return {name: TORCH_DTYPES[own[name] or common] for name in names}


def common_dtype_of_targets(match: Match) -> torch.dtype:
    """Return the most common dtype in the checkpoint among targets without a requested dtype."""
    elements = _count_elements(match)

    return TORCH_DTYPES[max(elements, key=elements.__getitem__, default="F32")]


def _count_elements(match: Match, only: Collection[str] | None = None) -> dict[str, int]:
    """Count the elements of tensors without a requested dtype, by their dtype in the checkpoint.

    :param only: the names of the targets to count; by default all.
    """
    targets, routed = match.targets, match.routed
    elements: dict[str, int] = {}
    for i, tensor in zip(routed.targets, routed.tensors, strict=True):
        if targets.dtypes[i] is None and (only is None or targets.names[i] in only):
            dtype = match.manifest.value_dtype(tensor)
            elements[dtype] = elements.get(dtype, 0) + math.prod(targets.shapes[i])

    return elements
