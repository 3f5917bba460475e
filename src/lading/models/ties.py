"""The comparison of tied parameters that a checkpoint stores more than once.

Equal copies are one parameter; different ones are an error, or are untied if the family supports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import ModelCheckpointMismatchError
from lading.formats.manifest import BITS
from lading.models.fit import Match, name_of
from lading.models.tensors import read_tensors
from lading.planning.box import Box
from lading.planning.composition import tensors_of

_CHUNK = 64 << 20
"""The bytes of each copy to compare at a time."""


def different_copies(checkpoint: Checkpoint, match: Match) -> tuple[str, ...]:
    """Return the other names of tied parameters whose copy in the checkpoint differs from the first.

    Values are compared in the dtype of the target.

    :param checkpoint: a checkpoint with local files.
    """
    targets, routed = match.targets, match.routed
    sources = dict(routed.sources())
    found = []
    for target, copy, name in match.copies():
        own = sources[target]
        dtype = targets.dtypes[target] or checkpoint.manifest.value_dtype(next(tensors_of(own)))
        for box in Box.whole(targets.shapes[target]).slabs(_CHUNK // (BITS[dtype] // 8)):
            a, b = read_tensors(checkpoint, [own, copy], [dtype, dtype], boxes=[box, box])
            if not are_same(a, b):
                found.append(name)
                break

    return tuple(found)


def require_equal_copies(checkpoint: Checkpoint, match: Match) -> None:
    """Require that the copies of each tied parameter are equal.

    :param checkpoint: a checkpoint with local files.

    :raises ModelCheckpointMismatchError: a copy differs.
    """
    different = frozenset(different_copies(checkpoint, match))
    for target, copy, name in match.copies():
        if name in different:
            own = match.targets.names[target]
            raise tied_mismatch_error(checkpoint, match.config, name_of(copy, match.manifest), own)


def are_same(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors of one dtype hold the same values."""
    # Comparing bytes makes equal NaNs equal.
    return torch.equal(a, b) or torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def tied_mismatch_error(checkpoint: Checkpoint, config: Any, copy: str, name: str) -> ModelCheckpointMismatchError:
    """Create the error for a copy that differs from the parameter it is tied to."""
    untied = hasattr(config, "tied_embeddings")

    return ModelCheckpointMismatchError(
        checkpoint.where,
        f"The configuration of {checkpoint.name} ties {copy!r} to {name!r}, but the checkpoint at {checkpoint.where} "
        "holds different values for them. Load it with "
        + ("`tied_embeddings: false`." if untied else "a configuration that does not tie them."),
        [f"tied, but different: {copy} and {name}"],
    )
