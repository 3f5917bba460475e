"""Whole tensors of a checkpoint that is on this machine, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lading.box import Box
from lading.checkpoint import Checkpoint
from lading.compose import Source, shape_of, tensors_of
from lading.family import Family
from lading.keymap import rename
from lading.transfer.execute import execute
from lading.transfer.plan import Wanted, plan


def read_tensors(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    dtypes: Sequence[str],
    mmap: bool = False,
    *,
    boxes: Sequence[Box] | None = None,
) -> list[Tensor]:
    """Tensors of a checkpoint, or what they make together, on the CPU.

    :param sources: of tensors, their positions in the manifest.
    :param dtypes: of each in memory.
    :param boxes: the part of each; default: all.
    """
    boxes = boxes or [Box.whole(shape_of(source, checkpoint.manifest.shapes)) for source in sources]
    wanted = Wanted(
        tensors=[next(tensors_of(source)) for source in sources],
        boxes=boxes,
        dtypes=dtypes,
        composed={i: source for i, source in enumerate(sources) if not isinstance(source, int)},
    )
    planned = plan(checkpoint.manifest, wanted, mapped=mmap)
    shapes = [(box.sizes, dtype) for box, dtype in zip(boxes, dtypes, strict=True)]

    return execute(planned, checkpoint.here(), shapes, device=torch.device("cpu"))


def iter_tensors(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, *, mmap: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Pairs (parameter name, tensor) of a checkpoint, in the order of its files, one tensor in memory at a time."""
    manifest = checkpoint.manifest
    for i, name in enumerate(rename(manifest.names, family.rules(config))):
        if name is not None:
            (tensor,) = read_tensors(checkpoint, [i], [manifest.dtypes[i]], mmap)
            yield name, tensor
