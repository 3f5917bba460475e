"""Targets: the box that this rank owns of each distinct parameter and persistent buffer of a module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from lading.formats.manifest import FLOATS
from lading.planning.box import Box

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor
    from torch.nn import Module

    from lading.models.placements import BoxCache


@dataclass(frozen=True, slots=True)
class Buffer:
    """A persistent buffer, such as the mean in a batch normalization."""

    shape: tuple[int, ...]
    dtype: str | None = None
    """The dtype of one that holds no floating-point numbers, by the name of the manifest."""


Shape: TypeAlias = tuple[int, ...] | Buffer | str
"""The shape of a parameter, a persistent buffer, or the first name of a tied parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Columns of equal length, with one entry per distinct tensor of the state dict; they hold no torch tensors."""

    names: tuple[str, ...]
    """The first name of each tensor."""
    shapes: tuple[tuple[int, ...], ...]
    """The shape of the global tensor."""
    boxes: tuple[Box, ...]
    """The part of the global tensor that this rank owns."""
    dtypes: tuple[str | None, ...]
    """The dtype in memory, by the names of the manifest; ``None`` keeps that of the checkpoint."""
    parameters: frozenset[str]
    """The names of the parameters; all others are buffers."""
    aliases: Mapping[str, str]
    """The other names of tied tensors → the first."""

    def aliases_of(self, name: str) -> list[str]:
        """Return the further names of a tied tensor."""
        return [alias for alias, first in self.aliases.items() if first == name]

    def on_stage(self, stage: Targets) -> Targets:
        """Return the targets as a pipeline stage owns them, with an empty box for each tensor that it lacks.

        A scalar has no empty box. One that the stage lacks is read with the others, and dropped.

        :param stage: the targets of the stage, which has some of these names.
        """
        held = dict(zip(stage.names, stage.boxes, strict=True))
        by_first = {self.aliases.get(name, name): box for name, box in held.items()}
        boxes = tuple(by_first.get(name) or box.empty() for name, box in zip(self.names, self.boxes, strict=True))

        return replace(self, boxes=boxes)


def whole_targets(shapes: Mapping[str, Shape]) -> Targets:
    """Return the targets of a whole model of floating-point parameters, without building it.

    :param shapes: as :attr:`lading.models.family.Family.shapes` returns them.
    """
    buffers = {name: shape for name, shape in shapes.items() if isinstance(shape, Buffer)}
    first = {
        name: shape.shape if isinstance(shape, Buffer) else shape
        for name, shape in shapes.items()
        if not isinstance(shape, str)
    }

    return Targets(
        names=tuple(first),
        shapes=tuple(first.values()),
        boxes=tuple(map(Box.whole, first.values())),
        dtypes=tuple(buffers[name].dtype if name in buffers else None for name in first),
        parameters=frozenset(first.keys() - buffers.keys()),
        aliases={name: shape for name, shape in shapes.items() if isinstance(shape, str)},
    )


def targets_of(
    module: Module, *, dtype: torch.dtype | None, others: Mapping[str, torch.dtype] = MappingProxyType({})
) -> Targets:
    """Return the targets of ``module``, which may be on the meta device, and whose parameters may be ``DTensor``s.

    :param dtype: the dtype of floating-point parameters and persistent buffers; ``None`` keeps that of the checkpoint.
    :param others: the tensors with another dtype, by name.

    :raises NotSupportedError: the part of a parameter that this rank owns is not a box.
    """
    import torch
    from torch.nn import Parameter

    from lading.transfer.dtypes import DTYPE_NAMES

    cache: BoxCache | None = None
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    names: list[str] = []
    shapes: list[tuple[int, ...]] = []
    boxes: list[Box] = []
    dtypes: list[str | None] = []
    parameters: list[str] = []

    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            continue  # extra state, which is in no checkpoint that lading reads
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue

        first[id(tensor)] = name
        names.append(name)
        shapes.append(tuple(tensor.shape))
        if not is_distributed(tensor):
            boxes.append(Box.whole(tensor.shape))
        else:
            if cache is None:
                from lading.models.placements import BoxCache  # this import takes half a second

                cache = BoxCache()
            boxes.append(cache.box_of(tensor))
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
    """Return whether ``tensor`` is a ``DTensor``, without importing the class, which takes half a second."""
    return hasattr(tensor, "device_mesh")
