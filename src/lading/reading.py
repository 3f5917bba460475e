"""Whole tensors of a checkpoint that is on this machine, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lading.box import Box
from lading.checkpoint import Checkpoint
from lading.family import Family
from lading.keymap import rename
from lading.transfer.execute import execute
from lading.transfer.plan import Wanted, plan


def read_tensors(
    checkpoint: Checkpoint, tensors: Sequence[int], dtypes: Sequence[str], mmap: bool = False
) -> list[Tensor]:
    """Whole tensors of a checkpoint, on the CPU.

    :param tensors: positions in the manifest.
    :param dtypes: of each in memory.
    """
    boxes = [Box.whole(checkpoint.manifest.shapes[i]) for i in tensors]
    planned = plan(checkpoint.manifest, Wanted(tensors=tensors, boxes=boxes, dtypes=dtypes), mapped=mmap)
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
