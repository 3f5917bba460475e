"""Tensors of a checkpoint that is on this machine, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lading.box import Box
from lading.checkpoint import Checkpoint
from lading.construct import build_on_meta, parallelize
from lading.errors import ModelCheckpointMismatchError
from lading.family import Family
from lading.gangs import Gangs
from lading.keymap import rename
from lading.transfer.execute import execute
from lading.transfer.plan import Wanted, plan
from lading.transfer.targets import targets_of


def read_tensors(
    checkpoint: Checkpoint,
    tensors: Sequence[int],
    dtypes: Sequence[str],
    mmap: bool = False,
    *,
    boxes: Sequence[Box] | None = None,
) -> list[Tensor]:
    """Tensors of a checkpoint, on the CPU.

    :param tensors: positions in the manifest.
    :param dtypes: of each in memory.
    :param boxes: the part of each; all of it by default.
    """
    if boxes is None:
        boxes = [Box.whole(checkpoint.manifest.shapes[i]) for i in tensors]
    planned = plan(checkpoint.manifest, Wanted(tensors=tensors, boxes=boxes, dtypes=dtypes), mapped=mmap)
    shapes = [(box.sizes, dtype) for box, dtype in zip(boxes, dtypes, strict=True)]

    return execute(planned, checkpoint.here(), shapes, device=torch.device("cpu"))


def iter_tensors(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, *, gangs: Gangs, mmap: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Pairs (parameter name, tensor) of a checkpoint, in the order of its files, one tensor in memory at a time.

    Of a parameter that is split over ``gangs`` it is the part that this rank owns.

    :raises ModelCheckpointMismatchError: a tensor that would be cut is not of the shape of its parameter.
    """
    manifest = checkpoint.manifest
    owned = _owned(family, config, gangs)

    for i, name in enumerate(rename(manifest.names, family.rules(config))):
        if name is None:
            continue
        expected, box = owned.get(name, (manifest.shapes[i], Box.whole(manifest.shapes[i])))
        if manifest.shapes[i] != expected:
            problem = f"mis-shaped: {manifest.names[i]} is expected to be {expected}, but is {manifest.shapes[i]}"
            raise ModelCheckpointMismatchError(
                checkpoint.where, f"The checkpoint at {checkpoint.where} does not fit: {problem}.", [problem]
            )

        (tensor,) = read_tensors(checkpoint, [i], [manifest.dtypes[i]], mmap, boxes=[box])
        yield name, tensor


def _owned(family: Family[Any, Any], config: Any, gangs: Gangs) -> Mapping[str, tuple[tuple[int, ...], Box]]:
    """The shape of each parameter, under each of its names, and the part that this rank owns; of a rank alone, none."""
    if gangs.root.size == 1:
        return {}

    module = build_on_meta(family, config)
    parallelize(module, family, config, gangs)
    targets = targets_of(module, dtype=None)
    owned = dict(zip(targets.names, zip(targets.shapes, targets.boxes, strict=True), strict=True))

    return owned | {alias: owned[first] for alias, first in targets.aliases.items()}
