"""What torch keeps private of placements is as expected, and the pure arithmetic agrees with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset as torch_box
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn import Module, Parameter

from lading.errors import NotSupportedError
from lading.gangs import simulate_gangs
from lading.models.placements import BoxCache, DTensorFactory, boxes_for_all_ranks
from lading.planning.box import Box


@st.composite
def placed(draw: st.DrawFn) -> tuple[list[Placement], tuple[int, ...], list[tuple[int, ...]]]:
    """Placements as this project makes them: FSDP, replicas and tensor parallelism over one another."""
    dims = draw(st.integers(1, 3))
    rdp, sdp, tp = (draw(st.integers(1, 5)) for _ in range(3))
    tensor = draw(st.sampled_from([Replicate(), *map(Shard, range(dims))]))
    strided = isinstance(tensor, Shard) and tensor.dim == 0 and tp > 1
    sharded = _StridedShard(0, split_factor=tp) if strided else Shard(0)
    sizes = st.integers(0, 40)
    shapes = draw(st.lists(st.tuples(*[sizes] * dims), min_size=1, max_size=4))
    if strided and draw(st.booleans()):
        shapes = [(n * tp, *rest) for n, *rest in shapes]
    return [Replicate(), sharded, tensor], (rdp, sdp, tp), shapes


def box_at(arrays: tuple[list[np.ndarray], list[np.ndarray]], mesh: Sequence[int], at: Sequence[int], i: int) -> Box:
    starts, sizes = (
        tuple(int(np.broadcast_to(a, (*mesh, a.shape[-1]))[(*at, i)]) for a in columns) for columns in arrays
    )
    return Box(starts, sizes)


@given(placed())
def test_all_ranks_at_once_equals_torch_one_by_one(
    case: tuple[list[Placement], tuple[int, ...], list[tuple[int, ...]]],
) -> None:
    placements, mesh, shapes = case
    for shape in shapes:
        try:
            arrays = boxes_for_all_ranks(placements, mesh, [shape])
        except NotSupportedError:
            assert shape[0] % (mesh[1] * mesh[2])  # only sizes that do not divide
            continue

        elements = 0
        for at in itertools.product(*map(range, mesh)):
            sizes, starts = torch_box(shape, mesh, list(at), placements)
            box = box_at(arrays, mesh, at, 0)
            assert box == Box(tuple(starts), tuple(sizes))
            elements += box.numel
        copies = mesh[0] * (mesh[2] if isinstance(placements[2], Replicate) else 1)
        assert elements == copies * math.prod(shape)


@given(placed())
def test_many_tensors_at_once_equal_one_by_one(
    case: tuple[list[Placement], tuple[int, ...], list[tuple[int, ...]]],
) -> None:
    placements, mesh, shapes = case
    try:
        together = boxes_for_all_ranks(placements, mesh, shapes)
    except NotSupportedError:
        return
    for i, shape in enumerate(shapes):
        alone = boxes_for_all_ranks(placements, mesh, [shape])
        for at in itertools.product(*map(range, mesh)):
            assert box_at(together, mesh, at, i) == box_at(alone, mesh, at, 0)


def test_numbers_are_computed_only_where_they_differ() -> None:
    starts, sizes = boxes_for_all_ranks([Replicate(), Shard(0), Shard(1)], (4, 8, 2), [(64, 6), (7, 4)])
    assert [a.shape for a in starts] == [(1, 8, 1, 2), (1, 1, 2, 2)]
    assert [a.shape for a in sizes] == [(1, 8, 1, 2), (1, 1, 2, 2)]


def test_a_scalar_is_whole_on_all_ranks() -> None:
    assert boxes_for_all_ranks([Replicate()], (4,), [()]) == ([], [])


@pytest.mark.parametrize(
    ("placements", "shape"),
    [
        ([Partial(), Replicate()], (8,)),
        ([_StridedShard(0, split_factor=2), Replicate()], (8,)),
        ([_StridedShard(0, split_factor=3), Shard(0)], (8,)),
        ([Shard(0), _StridedShard(0, split_factor=2)], (8,)),
        ([_StridedShard(0, split_factor=2), Shard(0)], (9,)),
    ],
)
def test_what_is_no_box_is_refused(placements: list[Placement], shape: tuple[int, ...]) -> None:
    with pytest.raises(NotSupportedError, match="not a contiguous box"):
        boxes_for_all_ranks(placements, (4, 2), [shape])


def test_the_box_of_a_distributed_tensor() -> None:
    with simulate_gangs(rank=5, sdp=4, tp=2) as gangs:
        mesh = gangs.root.mesh
        assert mesh is not None
        placements = [Replicate(), Replicate(), _StridedShard(0, split_factor=2), Replicate(), Shard(0)]
        tensor = DTensor.from_local(torch.empty(3, 5), mesh, placements, run_check=False, shape=(22, 5), stride=(5, 1))

        # tp rank 1 has the rows from 11, sdp rank 2 of them the third part of 3, 3, 3 and 2 rows.
        assert BoxCache().box_of(tensor) == Box((17, 0), (3, 5))
        assert BoxCache().box_of(torch.empty(4, 2)) == Box.whole((4, 2))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_part_in_the_place_of_a_parameter_is_what_torch_makes_of_it(requires_grad: bool) -> None:
    mesh = simulate_gangs(1, tp=2).mesh
    assert mesh is not None
    own = Parameter(distribute_tensor(torch.empty(6, 4, device="meta"), mesh["tp"], [Shard(0)]), requires_grad)
    local = torch.randn(3, 4)

    made = DTensorFactory().placed_as(local, own)
    expected = Parameter(DTensor.from_local(local, mesh["tp"], [Shard(0)], run_check=False), requires_grad)
    assert isinstance(made, Parameter)
    assert type(made) is type(expected)
    assert made.placements == expected.placements
    assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert made.requires_grad is requires_grad
    assert made.is_leaf
    assert made.grad_fn is None
    assert made.to_local().data_ptr() == local.data_ptr()
    assert made._spec == expected._spec

    module = Module()
    module.weight = made
    assert dict(module.named_parameters()) == {"weight": made}

    buffer = DTensorFactory().placed_as(
        local, distribute_tensor(torch.empty(6, 4, device="meta"), mesh["tp"], [Shard(0)])
    )
    assert not isinstance(buffer, Parameter)


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("placement", [Replicate(), Shard(0), Shard(1)])
@pytest.mark.parametrize("shape", [(8, 4), (6, 9), (2, 3)])
def test_a_part_without_memory_is_as_torch_makes_it(rank: int, placement: Placement, shape: tuple[int, ...]) -> None:
    with simulate_gangs(rank, tp=4) as gangs:
        assert gangs.tp.mesh is not None
        whole = Parameter(torch.empty(shape, device="meta", dtype=torch.bfloat16))

        part = DTensorFactory().on_meta(whole, gangs.tp.mesh, (placement,))
        expected = distribute_tensor(whole, gangs.tp.mesh, [placement])
        assert isinstance(part, Parameter)
        assert isinstance(part, DTensor)
        assert part.is_meta
        assert part.is_leaf
        assert part.requires_grad
        assert (part.shape, part.dtype, part.placements) == (expected.shape, expected.dtype, expected.placements)
        assert part.to_local().shape == expected.to_local().shape
        assert part.to_local().is_contiguous()


def test_parts_of_equal_meshes_stay_on_their_own_mesh() -> None:
    parts = DTensorFactory()
    for _ in range(2):
        with simulate_gangs(0, tp=2) as gangs:
            assert gangs.tp.mesh is not None
            part = parts.on_meta(Parameter(torch.empty(4, 4, device="meta")), gangs.tp.mesh, (Shard(0),))
            assert isinstance(part, DTensor)
            assert part.device_mesh is gangs.tp.mesh


def test_parts_of_other_shapes_and_dtypes_are_told_apart() -> None:
    parts = DTensorFactory()
    mesh = simulate_gangs(1, tp=2).mesh
    assert mesh is not None
    for shape, dtype in itertools.product([(6, 4), (4, 6)], [torch.float32, torch.bfloat16]):
        own = distribute_tensor(torch.empty(shape, device="meta", dtype=dtype), mesh["tp"], [Shard(0)])
        made = parts.placed_as(torch.zeros(shape[0] // 2, shape[1], dtype=dtype), own)
        assert (tuple(made.shape), made.dtype, made.full_tensor().shape) == (shape, dtype, shape)
