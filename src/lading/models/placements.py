"""The parts of distributed tensors on each rank. This module alone uses torch's private functions for them.

It works with torch 2.6 to 2.14; ``tests/unit/test_placements.py`` checks the expectations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import _utils as torch_utils
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn import Parameter

from lading.errors import NotSupportedError
from lading.planning.box import Box

Ints = npt.NDArray[np.int64]

_local_shape_and_offset = cast(
    Callable[[Sequence[int], DeviceMesh, Sequence[Placement]], tuple[Sequence[int], Sequence[int]]],
    torch_utils.compute_local_shape_and_global_offset,
)


class BoxCache:
    """A cache of the boxes of this rank: models have many parameters of few shapes, and torch is slow for each."""

    def __init__(self) -> None:
        self._known: dict[Any, Box] = {}

    def box_of(self, tensor: Tensor) -> Box:
        """Return the part of a tensor that this rank holds: all of it, unless it is a ``DTensor``.

        :raises NotSupportedError: the part is not a box.
        """
        shape = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return Box.whole(shape)

        mesh, placements = tensor.device_mesh, tuple(tensor.placements)
        key = (shape, id(mesh), placements)
        if key not in self._known:
            _check_box(shape, tuple(mesh.shape), placements)
            sizes, starts = _local_shape_and_offset(shape, mesh, placements)
            self._known[key] = Box(tuple(map(int, starts)), tuple(map(int, sizes)))

        return self._known[key]


class DTensorFactory:
    """A factory of distributed tensors from the parts that this rank holds.

    ``DTensor.from_local`` creates the same tensors, but with a new spec for each, and through autograd. Models have
    many parameters of few shapes; those of one shape share a spec here.
    """

    def __init__(self) -> None:
        self._specs: dict[Any, DTensorSpec] = {}

    def placed_as(self, local: Tensor, own: DTensor) -> DTensor:
        """Return the tensor with ``local`` as this rank's part, placed as ``own``; a parameter if ``own`` is one."""
        return self._placed(local, own, own.device_mesh, own.placements)

    def on_meta(self, parameter: Parameter, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> Parameter:
        """Return a parameter on the meta device, placed on a mesh without communication."""
        shape = list(parameter.shape)
        for count, placement in zip(mesh.shape, placements, strict=True):
            if not isinstance(placement, Shard):
                continue
            size, odd = divmod(shape[placement.dim], count)
            if odd:
                shape[:] = _local_shape_and_offset(parameter.shape, mesh, placements)[0]
                break
            shape[placement.dim] = size
        part = parameter.detach().new_empty(shape)

        return cast(Parameter, self._placed(part, parameter, mesh, placements))

    def _placed(self, local: Tensor, whole: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
        """Return ``local`` placed as a part of a tensor like ``whole``."""
        # Equal meshes may have different process groups.
        key = id(mesh), placements, whole.shape, whole.stride(), local.dtype
        if key not in self._specs:
            meta = TensorMeta(whole.shape, whole.stride(), local.dtype)
            self._specs[key] = DTensorSpec(mesh, placements, tensor_meta=meta)
        tensor = DTensor(local, self._specs[key], requires_grad=whole.requires_grad)  # type: ignore[no-untyped-call]
        if isinstance(whole, Parameter):
            # `Parameter(…)` sets this mark on tensors of other classes too, but detaches them first: 0.1 ms for each,
            # and a millisecond for the first of each shape.
            tensor._is_param = True

        return tensor


def boxes_for_all_ranks(
    placements: Sequence[Placement], mesh_shape: Sequence[int], shapes: Sequence[Sequence[int]]
) -> tuple[list[Ints], list[Ints]]:
    """Return the boxes of many tensors with equal placements on all ranks of a mesh at once.

    For very many tensors, pass a thousand at a time: the numbers for all of them on all ranks may take gigabytes.

    :param shapes: the shapes of the global tensors, all with the same number of dims.

    :returns: starts and sizes, each one array per dim, of shape (*mesh_shape, len(shapes)); the size of a mesh dim is 1
        if the numbers do not depend on its coordinate, so that few are computed and they broadcast.

    :raises NotSupportedError: a part is not a box.
    """
    ranks = len(mesh_shape)
    columns = np.asarray(shapes, dtype=np.int64).reshape(len(shapes), -1).T
    # Whether a part is a box depends only on the size of the dim that is split twice.
    twice = [p.dim for p in placements if isinstance(p, _StridedShard)]
    for shape in {tuple(shape[dim] for dim in twice): shape for shape in shapes}.values():
        _check_box(shape, mesh_shape, placements)

    starts: list[Ints] = []
    sizes: list[Ints] = []
    for dim, column in enumerate(columns):
        whole = column.reshape((1,) * ranks + (-1,))
        start, size = np.zeros_like(whole), whole
        # Mesh dims apply from left to right, but a strided one splits the result of the one after it.
        strided: list[int] = []
        plain: list[int] = []
        for axis, placement in enumerate(placements):
            if _shard_dim(placement) == dim:
                (strided if isinstance(placement, _StridedShard) else plain).append(axis)

        for axis in plain + strided:
            count = mesh_shape[axis]
            coordinate = np.arange(count, dtype=np.int64).reshape(
                (*(count if a == axis else 1 for a in range(ranks)), 1)
            )
            chunk = -(-size // count)
            first = np.minimum(coordinate * chunk, size)
            start, size = start + first, np.minimum(chunk, size - first)

        if (plain or strided) and not size.all():
            start = np.where(size == 0, whole, start)  # torch starts empty parts at the end
        starts.append(start)
        sizes.append(size)

    return starts, sizes


def _shard_dim(placement: Placement) -> int | None:
    # `_StridedShard` is a subclass of `Shard` in some versions of torch only.
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _check_box(shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]) -> None:
    """Require that the parts are boxes.

    They are if each mesh dim splits the result of those before it. A strided shard, from FSDP over tensor parallelism,
    splits the result of the one mesh dim after it.

    :raises NotSupportedError: the parts are not boxes.
    """
    for axis, placement in enumerate(placements):
        if isinstance(placement, Replicate):
            continue

        dim = _shard_dim(placement)
        good = dim is not None and not isinstance(placement, Partial)
        if good and isinstance(placement, _StridedShard) and placement.split_factor > 1:
            others = [a for a in range(len(placements)) if a != axis and _shard_dim(placements[a]) == dim]
            good = (
                len(others) == 1
                and others[0] > axis
                and not isinstance(placements[others[0]], _StridedShard)
                and mesh_shape[others[0]] == placement.split_factor
                and _interleaves(shape[dim or 0], mesh_shape[others[0]], mesh_shape[axis])
            )
        if not good:
            raise NotSupportedError(
                f"A tensor of shape {list(shape)} is placed as {tuple(placements)} on a mesh of shape "
                f"{tuple(mesh_shape)}: the part of a rank is not a contiguous box, and lading reads only boxes."
            )


def _interleaves(size: int, first: int, second: int) -> bool:
    """Return whether both readings of the placements agree.

    FSDP splits ``size`` elements into ``first`` pieces and each of them into ``second``; torch takes one smaller piece
    from each larger one, joins them, and splits into ``first``. They differ for some sizes that do not divide evenly.
    """
    if size % first == 0:
        return True

    parts = _chunk(_chunk(np.array(size), first), second)  # (second, first)

    return bool((parts == _chunk(parts.sum(1), first).T).all())


def _chunk(sizes: Ints, count: int) -> Ints:
    """Return the sizes of ``count`` chunks of each of ``sizes``: (…) → (count, …)."""
    chunk = -(-sizes // count)
    first = np.arange(count).reshape(-1, *(1,) * sizes.ndim) * chunk

    return np.clip(sizes - first, 0, chunk)
