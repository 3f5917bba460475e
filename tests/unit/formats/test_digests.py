from __future__ import annotations

import math
import random
import tracemalloc
from array import array
from itertools import pairwise

import pytest

from lading.formats.digests import (
    LEAF,
    SIZE,
    Cut,
    Digests,
    cut,
    default_dims,
    differences,
    recorded,
    root_digest,
    starts_of,
)
from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box
from lading.transfer.hashing import blocks_touched, blocks_within
from tests.helpers.digest_reference import reference


def make(*tensors: tuple[str, tuple[int, ...]]) -> Manifest:
    return Manifest(
        format="safetensors",
        shards=(Shard(name="x", size=0),),
        names=[f"t{i}" for i in range(len(tensors))],
        dtypes=[dtype for dtype, _ in tensors],
        shapes=[shape for _, shape in tensors],
        shard_ids=array("I", [0]) * len(tensors),
        offsets=array("q", range(len(tensors))),
    )


@pytest.mark.parametrize(
    ("dtype", "shape", "dim", "expected"),
    [
        ("F32", (), 0, Cut(1, 1, 4)),
        ("F32", (0, 4), 1, Cut(1, 1, 0)),
        ("F32", (4, 0), 0, Cut(1, 1, 0)),
        ("BF16", (16, 3), 0, Cut(1, 8, 12)),
        ("BF16", (16, 12), 1, Cut(16, 4, 6)),
        ("BF16", (5, 7), 1, Cut(1, 1, 70)),
        ("U8", (2, 3, 6, 5), 2, Cut(6, 2, 15)),
        ("F4", (8, 4), 0, Cut(1, 8, 2)),
        ("F4", (8, 3), 0, Cut(1, 4, 3)),  # eight blocks would be of 12 bits
        ("F4", (4, 2), 1, Cut(1, 1, 4)),
    ],
)
def test_how_tensors_are_cut(dtype: str, shape: tuple[int, ...], dim: int, expected: Cut) -> None:
    found = cut(dtype, shape, dim)
    assert found == expected
    assert found.nbytes == expected.rows * expected.blocks * expected.segment


@pytest.mark.parametrize(
    ("cut", "group", "leaves"),
    [
        (Cut(1, 8, 100), 1024, 1),
        (Cut(1, 8, LEAF), 1, 1),
        (Cut(1, 8, LEAF + 1), 1, 2),
        (Cut(100, 8, 1536), 64, 2),
        (Cut(3, 4, LEAF // 4), 1, 3),
        (Cut(3, 4, LEAF // 4 + 1), 1, 3),
        (Cut(3, 2, 5 * LEAF + 1), 1, 18),
        (Cut(1, 1, 0), LEAF, 0),
    ],
)
def test_groups_and_leaves(cut: Cut, group: int, leaves: int) -> None:
    assert (cut.group, cut.leaves) == (group, leaves)


@pytest.mark.parametrize(("shape", "dim"), [((), 1), ((3,), 1), ((3, 4), -1)])
def test_a_dim_that_is_not_there(shape: tuple[int, ...], dim: int) -> None:
    with pytest.raises(ValueError, match="has no dim"):
        cut("F32", shape, dim)


@pytest.mark.parametrize(
    ("dtype", "shape", "dim", "root"),
    [
        ("BF16", (), 0, "1823f6ff4d26ee2c540ddadf860883b4"),
        ("BF16", (0, 8), 0, "2fa8eb842da8d2f09ceaaffab76d9b84"),
        ("BF16", (64, 24), 0, "566d184182950bc60004aa530e8dc687"),
        ("BF16", (64, 24), 1, "ca6dc2c717bbc5b5a657eb3d14c4f692"),
        ("F16", (64, 24), 1, "a50e12a0d20437338dabb0d3c1ab40c7"),
        ("BF16", (1024, 1536), 0, "bf7ddbdf4a9c9aa721ffa2b58e3ca14a"),
        ("BF16", (1024, 1536), 1, "9fff77df2deab6f7995e4510e158df15"),
        ("BF16", (1, 1572864), 1, "50d83c04b47133d4ad690e7edd9fe35e"),
        ("BF16", (1572864,), 0, "ea195e468c5b1c2e8a9b10f65406db88"),
        ("BF16", (3, 524288), 0, "49fa27de559f8c9139e11b335261ed2f"),
        ("F4", (8, 3), 0, "b53ae03b43b3bfa90dadc4a990f23868"),
    ],
)
def test_the_definition_does_not_drift(dtype: str, shape: tuple[int, ...], dim: int, root: str) -> None:
    """These digests are in catalogs: whoever changes one changes the number in the contexts as well."""
    data = PATTERN[: math.prod(shape) * BITS[dtype] // 8]
    assert reference(dtype, shape, dim, data)[1].startswith(root)


PATTERN = (bytes(i * i % 251 for i in range(251)) * LEAF)[: 3 * LEAF]


def test_a_root_tells_dtype_shape_and_dim_apart() -> None:
    blocks = bytes(8 * SIZE)
    roots = {
        root_digest("BF16", (8, 16), 0, blocks),
        root_digest("F16", (8, 16), 0, blocks),
        root_digest("BF16", (16, 8), 0, blocks),
        root_digest("BF16", (8, 16), 1, blocks),
        root_digest("BF16", (81, 6), 0, blocks),
        root_digest("BF16", (8, 16), 0, blocks[SIZE:]),
        root_digest("BF16", (), 0, blocks),
    }
    assert len(roots) == 7


@pytest.mark.parametrize(
    ("shape", "dim", "box", "within", "touched"),
    [
        ((16, 6), 0, Box((0, 0), (16, 6)), range(8), range(8)),
        ((16, 6), 0, Box((4, 0), (4, 6)), range(2, 4), range(2, 4)),
        ((16, 6), 0, Box((3, 0), (6, 6)), range(2, 4), range(1, 5)),
        ((16, 6), 0, Box((4, 0), (4, 5)), range(0), range(2, 4)),
        ((16, 6), 1, Box((0, 3), (16, 3)), range(1, 2), range(1, 2)),
        ((16, 6), 1, Box((1, 3), (15, 3)), range(0), range(1, 2)),
        ((5, 7), 1, Box((0, 0), (5, 7)), range(1), range(1)),
        ((5, 7), 1, Box((0, 0), (5, 6)), range(0), range(1)),
        ((), 0, Box((), ()), range(1), range(1)),
        ((16, 6), 0, Box((4, 0), (4, 0)), range(0), range(0)),
    ],
)
def test_the_blocks_of_a_box(shape: tuple[int, ...], dim: int, box: Box, within: range, touched: range) -> None:
    assert blocks_within("BF16", shape, dim, box) == within
    assert blocks_touched("BF16", shape, dim, box) == touched


def test_recorded_digests() -> None:
    manifest = make(("BF16", (4, 6)), ("F32", ()), ("U8", (7,)))
    blocks, root = reference("BF16", (4, 6), 1, bytes(48))
    digests = recorded(manifest, [(1, b"".join(blocks)), None, (0, bytes(SIZE))])

    assert len(digests) == 3
    assert [digests.is_complete(i) for i in range(3)] == [True, False, True]
    first = digests.of(manifest, 0)
    assert first is not None
    assert (first.dim, first.blocks, first.root) == (1, b"".join(blocks), root)
    assert digests.of(manifest, 1) is None
    assert next(digests.iter(manifest)) == first
    assert list(digests.starts) == [0, 2, 3, 4]


@pytest.mark.parametrize("row", [(0, bytes(5)), (1, bytes(4 * SIZE)), (2, bytes(2 * SIZE))])
def test_rows_that_cannot_be_of_their_tensor(row: tuple[int, bytes]) -> None:
    with pytest.raises(ValueError, match=r"'t0'|has no dim"):
        recorded(make(("BF16", (4, 6))), [row])


def test_as_many_rows_as_tensors() -> None:
    with pytest.raises(ValueError):
        recorded(make(("BF16", (4, 6))), [])
    with pytest.raises(ValueError):
        starts_of(make(("BF16", (4, 6))), [0, 0])


def digests(*blocks: list[int | None], dims: list[int] | None = None) -> Digests:
    """Digests that are a number over and over; ``None`` where not known."""
    starts = array("q", [0])
    for row in blocks:
        starts.append(starts[-1] + len(row))
    return Digests(
        dims=array("b", dims or [0] * len(blocks)),
        starts=starts,
        blocks=b"".join(bytes([n or 0]) * SIZE for row in blocks for n in row),
        known=bytes(sum(1 << b for b, n in enumerate(row) if n is not None) for row in blocks),
    )


def test_differences() -> None:
    one = digests([1, 2], [3], [4, 5, 6, 7])
    assert differences(one, digests([1, 2], [3], [4, 5, 6, 7])) == []
    assert differences(one, digests([1, 9], [3], [9, 5, 6, 9])) == [(0, (1,)), (2, (0, 3))]
    assert differences(one, digests([None, None], [None], [9, None, 6, None])) == [(2, (0,))]
    assert differences(digests([None, None], [None], [4, 5, None, None]), one) == []


def test_of_what_is_not_known_the_dim_does_not_matter() -> None:
    one = digests([1, 2], [3])
    assert differences(one, digests([None], [3], dims=[1, 0])) == []
    with pytest.raises(ValueError, match=r"tensor 0 .* along dim 0, the other along dim 1"):
        differences(one, digests([1, 2], [3], dims=[1, 0]))


def test_only_digests_of_one_manifest_can_be_compared() -> None:
    with pytest.raises(ValueError, match=r"2 tensors .* those of 1"):
        differences(digests([1], [2]), digests([1]))


def test_digests_are_values() -> None:
    assert digests([1, 2]) == digests([1, 2])
    assert digests([1, 2]) != digests([1, None])
    assert digests([1, 2]) != 3


def test_a_hundred_thousand_tensors_are_small() -> None:
    manifest = make(*[("BF16", (1024, 64))] * 100_000)
    blocks = random.Random(0).randbytes(8 * SIZE)
    tracemalloc.start()
    try:
        held = recorded(manifest, ((0, blocks) for _ in range(100_000)))
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 40 << 20
    assert differences(held, held) == []
    assert all(b - a == 8 for a, b in pairwise(held.starts))
    assert len(default_dims(manifest)) == 100_000
