"""Whole tensors of a checkpoint that is on this machine, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lading.box import Box
from lading.checkpoint import Checkpoint
from lading.compose import Source, shape_of, tensors_of
from lading.construct import build_on_meta, split
from lading.errors import ModelCheckpointMismatchError
from lading.family import Family
from lading.gangs import Gangs
from lading.keymap import Rule, makes_parts, rename, route
from lading.transfer.execute import execute
from lading.transfer.plan import Wanted, plan
from lading.transfer.targets import targets_of


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
    if boxes is None:
        boxes = [Box.whole(shape_of(source, checkpoint.manifest.shapes)) for source in sources]
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
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, *, gangs: Gangs, mmap: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Pairs (parameter name, tensor) of a checkpoint, in the order of its files, one tensor in memory at a time.

    Of a parameter that is split over ``gangs`` it is the part that this rank owns. What belongs to other stages of a
    pipeline is left out; a table that stages share has the name that the checkpoint gives it.

    :raises ModelCheckpointMismatchError: parts that make a parameter together are missing, or claim the same place; or
        a tensor that would be cut is not of the shape of its parameter.
    """
    manifest = checkpoint.manifest
    rules = family.rules_for(config, manifest.names)
    owned = _owned(family, config, gangs)
    if makes_parts(manifest.names, rules):
        sources = _made(checkpoint, family, config, rules)
    else:
        sources = [(name, i) for i, name in enumerate(rename(manifest.names, rules)) if name is not None]

    for name, source in sources:
        if name in owned and owned[name] is None:
            continue
        shape = shape_of(source, manifest.shapes)
        expected, box = owned.get(name) or (shape, Box.whole(shape))
        if shape != expected:
            problem = f"mis-shaped: {name} is expected to be {expected}, but is {shape}"
            raise ModelCheckpointMismatchError(
                checkpoint.where, f"The checkpoint at {checkpoint.where} does not fit: {problem}.", [problem]
            )

        dtype = manifest.dtypes[next(tensors_of(source))]
        (tensor,) = read_tensors(checkpoint, [source], [dtype], mmap, boxes=[box])
        yield name, tensor


def _owned(family: Family[Any, Any], config: Any, gangs: Gangs) -> Mapping[str, tuple[tuple[int, ...], Box] | None]:
    """The shape of each parameter, under each of its names, and the part that this rank owns; of a rank alone, none.

    ``None`` stands for what other stages of a pipeline hold.
    """
    if gangs.root.size == 1:
        return {}

    module = build_on_meta(family, config)
    targets = split(module, family, config, gangs, dtype=None)
    held = {targets.aliases.get(name, name) for name in module.state_dict()}
    owned = {
        name: (shape, box) if name in held else None
        for name, shape, box in zip(targets.names, targets.shapes, targets.boxes, strict=True)
    }

    return owned | {alias: owned[first] for alias, first in targets.aliases.items()}


def _made(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, rules: Sequence[Rule]
) -> list[tuple[str, Source]]:
    """What the tensors make, those that no parameter needs too."""
    manifest = checkpoint.manifest
    targets = targets_of(build_on_meta(family, config), dtype=None)
    shapes = dict(zip(targets.names, targets.shapes, strict=True))
    names = list(dict.fromkeys(name for name in rename(manifest.names, rules) if name is not None))
    # A further name of a tied parameter has its shape.
    target_shapes = [shapes.get(targets.aliases.get(name, name), ()) for name in names]

    made = route(manifest.names, names, rules, shapes=manifest.shapes, target_shapes=target_shapes)
    problems = [f"claimed by {len(by)} tensors: {name} by {', '.join(by)}" for name, by in made.clashes]
    problems += [f"incomplete: {name}: {why}" for name, why in made.incomplete]
    if problems:
        raise ModelCheckpointMismatchError(
            checkpoint.where,
            f"The checkpoint at {checkpoint.where} does not make the parameters of {checkpoint.name}: "
            + "; ".join(problems[:20]),
            problems,
        )

    return sorted(
        ((names[target], made.composed.get(i, made.tensors[i])) for i, target in enumerate(made.targets)),
        key=lambda pair: next(tensors_of(pair[1])),
    )
