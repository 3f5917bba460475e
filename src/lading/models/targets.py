"""What this rank needs: a box of each distinct parameter and persistent buffer of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn import Module, Parameter

from lading.planning.box import Box
from lading.transfer.dtypes import DTYPE_NAMES, FLOATS

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Columns of equal length, one entry for each distinct tensor of the module's state; no torch tensors."""

    names: tuple[str, ...]
    """The first name of each."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the global tensor."""
    boxes: tuple[Box, ...]
    """The part of the global tensor that this rank owns."""
    dtypes: tuple[str | None, ...]
    """What memory is to hold, by the manifest's names; ``None`` keeps the checkpoint's own."""
    parameters: frozenset[str]
    """The names of those that are parameters; the others are buffers."""
    aliases: Mapping[str, str]
    """Further names of tied tensors → the first."""

    def held_by(self, stage: Targets) -> Targets:
        """These, as one stage of a pipeline holds them: of a tensor that it lacks it owns an empty part.

        A scalar has no empty part. One that the stage lacks is read with the others, and dropped.

        :param stage: the targets of the stage, which has some of these names.
        """
        held = dict(zip(stage.names, stage.boxes, strict=True))
        by_first = {self.aliases.get(name, name): box for name, box in held.items()}
        boxes = tuple(by_first.get(name) or box.empty() for name, box in zip(self.names, self.boxes, strict=True))

        return replace(self, boxes=boxes)


def targets_of(
    module: Module, *, dtype: torch.dtype | None, others: Mapping[str, torch.dtype] = MappingProxyType({})
) -> Targets:
    """The targets of ``module``, which may be on the meta device, and whose parameters may be ``DTensor``s.

    :param dtype: of floating-point parameters and persistent buffers; ``None`` keeps the checkpoint's own.
    :param others: by name, those that are of another one.

    :raises NotSupportedError: the part of a parameter that this rank owns is no box.
    """
    box_of = _boxes()
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    boxes: list[Box] = []
    dtypes: list[str | None] = []
    parameters: list[str] = []

    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # the extra state of a module is not in any checkpoint that lading reads
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue

        first[id(tensor)] = name
        names.append(name)
        shapes.append(tuple(tensor.shape))
        boxes.append(box_of(tensor))
        own = DTYPE_NAMES[tensor.dtype]
        asked = others.get(name, dtype)
        dtypes.append(own if own not in FLOATS else None if asked is None else DTYPE_NAMES[asked])
        if isinstance(tensor, Parameter):
            parameters.append(name)

    return Targets(
        names=tuple(names),
        shapes=tuple(shapes),
        boxes=tuple(boxes),
        dtypes=tuple(dtypes),
        parameters=frozenset(parameters),
        aliases=aliases,
    )


def is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether ``tensor`` is a ``DTensor``, told without importing what makes them, which takes half a second."""
    return hasattr(tensor, "device_mesh")


def _boxes() -> Callable[[torch.Tensor], Box]:
    """A function that gives the box of a tensor that this rank owns."""
    distributed: list[Callable[[torch.Tensor], Box]] = []

    def box_of(tensor: torch.Tensor) -> Box:
        if not is_distributed(tensor):
            return Box.whole(tensor.shape)
        if not distributed:
            from lading.models.placements import BoxCache

            distributed.append(BoxCache().box_of)

        return distributed[0](tensor)

    return box_of
