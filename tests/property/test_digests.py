"""Digests that are taken on the way are those of the definition, and any bit that flips is found."""

from __future__ import annotations

import math
import random
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lading.formats.digests
from lading.formats.digests import SIZE, Digests, cut, differences
from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer import execute as execution
from lading.transfer import hashing, leaf_hasher, reader
from lading.transfer.execute import execute
from lading.transfer.files import OpenShard, ShardFile
from lading.transfer.hashing import Hasher, blocks_touched, blocks_within, hash_checkpoint
from tests.helpers.digest_reference import reference
from tests.helpers.examples import examples

FLOATS = ["BF16", "F16", "F32", "F64"]
SMALL = ["F4", "F6_E2M3"]

sizes = st.sampled_from([0, 1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 24])


@contextmanager
def leaves_of(size: int) -> Iterator[None]:
    """Small leaves, chunks and steps, so that small tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (lading.formats.digests, hashing, leaf_hasher, reader):
            patch.setattr(module, "LEAF", size)
        for module in (execution, reader):
            patch.setattr(module, "STEP", 3 * size)
        for name in ("CAST_CHUNK", "ROWS_CHUNK"):
            patch.setattr(reader, name, size)
        yield


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[str]) -> tuple[str, tuple[int, ...], int]:
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(sizes, max_size=3).filter(lambda s: math.prod(s) < 3000))
    if math.prod(shape) * BITS[dtype] % 8:
        shape.append(4)
    return dtype, tuple(shape), draw(st.integers(0, max(0, len(shape) - 1)))


@st.composite
def manifests(draw: st.DrawFn, dtypes: Sequence[str] = (*FLOATS, "I64", "U8")) -> tuple[Manifest, list[int]]:
    shards, names, kinds, shapes, dims = [], [], [], [], []
    shard_ids, offsets = array("I"), array("q")
    for shard in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, 40))
        for _ in range(draw(st.integers(0, 5))):
            dtype, shape, dim = draw(tensors(dtypes))
            names.append(f"t{len(names)}")
            kinds.append(dtype)
            shapes.append(shape)
            dims.append(dim)
            shard_ids.append(shard)
            offsets.append(at)
            at += math.prod(shape) * BITS[dtype] // 8
        shards.append(Shard(name=f"{shard}.safetensors", size=at + draw(st.integers(0, 9))))
    manifest = Manifest(
        format="safetensors",
        shards=tuple(shards),
        names=names,
        dtypes=kinds,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
    )
    return manifest, dims


@st.composite
def boxes(draw: st.DrawFn, dtype: str, shape: tuple[int, ...], dim: int) -> Box:
    kind = draw(st.sampled_from(["whole", "blocks", "any"]))
    starts, ends = [0] * len(shape), list(shape)
    if kind == "blocks" and shape:
        count = cut(dtype, shape, dim).blocks
        first = draw(st.integers(0, count - 1))
        starts[dim] = first * shape[dim] // count
        ends[dim] = draw(st.integers(first + 1, count)) * shape[dim] // count
    if kind == "any":
        starts = [draw(st.integers(0, n)) for n in shape]
        ends = [draw(st.integers(s, n)) for s, n in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(e - s for s, e in zip(starts, ends, strict=True)))


@st.composite
def loads(draw: st.DrawFn) -> tuple[Manifest, list[int], Wanted]:
    manifest, dims = draw(manifests())
    chosen = draw(st.lists(st.integers(0, len(manifest) - 1), max_size=6)) if len(manifest) else []
    parts = [draw(boxes(manifest.dtypes[i], manifest.shapes[i], dims[i])) for i in chosen]
    dtypes = [
        draw(st.sampled_from(FLOATS)) if (d := manifest.dtypes[i]) in FLOATS and draw(st.booleans()) else d
        for i in chosen
    ]
    return manifest, dims, Wanted(tensors=chosen, boxes=parts, dtypes=dtypes)


def write(folder: str, manifest: Manifest, seed: int) -> tuple[list[bytes], list[ShardFile]]:
    contents = [random.Random(seed + i).randbytes(shard.size) for i, shard in enumerate(manifest.shards)]
    return contents, [store(Path(folder, s.name), data) for s, data in zip(manifest.shards, contents, strict=True)]


def store(path: Path, data: bytes) -> ShardFile:
    path.write_bytes(data)
    return ShardFile(path=path, stat=FileStat.from_stat(path.stat()))


def expected(manifest: Manifest, contents: list[bytes], dims: Sequence[int], i: int, leaf: int) -> tuple[bytes, str]:
    begin = manifest.offsets[i]
    data = contents[manifest.shard_ids[i]][begin : begin + manifest.nbytes(i)]
    blocks, root = reference(manifest.dtypes[i], manifest.shapes[i], dims[i], data, leaf)
    return b"".join(blocks), root


def known(digests: Digests, i: int) -> list[int]:
    return [b for b in range(digests.starts[i + 1] - digests.starts[i]) if digests.known[i] >> b & 1]


@settings(max_examples=examples(200))
@given(
    load=loads(),
    leaf=st.sampled_from([16, 48, 104, 1024]),  # whole items of any dtype, as the real one
    long_run=st.sampled_from([1, 20, 1000]),
    gap=st.sampled_from([0, 10, 1000]),
    mapped=st.booleans(),
    cold=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 30),
)
def test_a_load_takes_the_digests_of_the_definition(
    load: tuple[Manifest, list[int], Wanted],
    leaf: int,
    long_run: int,
    gap: int,
    mapped: bool,
    cold: bool,
    threads: int,
    seed: int,
) -> None:
    manifest, dims, wanted = load
    shapes = [(box.sizes, dtype) for box, dtype in zip(wanted.boxes, wanted.dtypes, strict=True)]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lading.planning.plan.LONG_RUN", long_run)
        patch.setattr("lading.planning.plan.GAP", gap)
        contents, files = write(folder, manifest, seed)
        planned = plan(manifest, wanted, mapped=mapped)
        plain = execute(planned, files, shapes)

        patch.setattr(OpenShard, "is_cold", lambda self, offset: cold)
        with leaves_of(leaf):
            hasher = Hasher(manifest, dims, planned, wanted)
            loaded = execute(planned, files, shapes, threads=threads, observer=hasher)
            found = hasher.digests()
            groups = [cut(*column).group for column in zip(manifest.dtypes, manifest.shapes, dims, strict=True)]

    for one, other in zip(plain, loaded, strict=True):
        assert one.dtype == other.dtype
        # Which of the NaNs a cast gives depends on how many numbers are cast at once.
        assert one.isnan().equal(other.isnan())
        assert one.nan_to_num(0).equal(other.nan_to_num(0))

    for i in range(len(manifest)):
        blocks, root = expected(manifest, contents, dims, i, leaf)
        mine = found.blocks[found.starts[i] * SIZE : found.starts[i + 1] * SIZE]
        for b in known(found, i):
            assert mine[b * SIZE : (b + 1) * SIZE] == blocks[b * SIZE : (b + 1) * SIZE]
        if found.is_complete(i):
            digest = found.of(manifest, i)
            assert digest is not None
            assert (digest.dim, digest.blocks, digest.root) == (dims[i], blocks, root)

    for n, (i, box) in enumerate(zip(wanted.tensors, wanted.boxes, strict=True)):
        shape, stored = manifest.shapes[i], manifest.dtypes[i]
        within = blocks_within(stored, shape, dims[i], box)
        touched = blocks_touched(stored, shape, dims[i], box)
        run = next(box.runs(shape))[1] if box.numel else 0
        if run == box.numel:
            assert set(within) <= set(known(found, i))
        if within == touched and (run == box.numel or groups[i] == 1 or run * BITS[stored] // 8 <= long_run):
            assert hasher.vouched[n]
        if hasher.vouched[n]:
            assert set(touched) <= set(known(found, i))


@settings(max_examples=examples(80))
@given(manifests([*FLOATS, "U8", *SMALL]), st.sampled_from([16, 48, 104, 1024]), st.booleans(), st.integers(1, 3))
def test_a_checkpoint_has_the_digests_of_the_definition(
    case: tuple[Manifest, list[int]], leaf: int, cold: bool, threads: int
) -> None:
    manifest, dims = case
    with tempfile.TemporaryDirectory() as folder, leaves_of(leaf), pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenShard, "is_cold", lambda self, offset: cold)
        contents, files = write(folder, manifest, 0)
        found = hash_checkpoint(manifest, files, dims, threads=threads)
        for i in range(len(manifest)):
            digest = found.of(manifest, i)
            assert digest is not None
            assert (digest.blocks, digest.root) == expected(manifest, contents, dims, i, leaf)


@given(manifests([*FLOATS, "U8", "F4"]), st.data(), st.sampled_from([16, 48, 1024]))
def test_a_flipped_bit_changes_the_root_and_the_one_block_that_holds_it(
    case: tuple[Manifest, list[int]], data: st.DataObject, leaf: int
) -> None:
    manifest, dims = case
    filled = [i for i in range(len(manifest)) if manifest.nbytes(i)]
    if not filled:
        return
    i = data.draw(st.sampled_from(filled))
    at, bit = data.draw(st.integers(0, manifest.nbytes(i) - 1)), data.draw(st.integers(0, 7))

    with tempfile.TemporaryDirectory() as folder, leaves_of(leaf):
        contents, files = write(folder, manifest, 0)
        before = hash_checkpoint(manifest, files, dims)
        shard = manifest.shard_ids[i]
        flipped = bytearray(contents[shard])
        flipped[manifest.offsets[i] + at] ^= 1 << bit
        files[shard] = store(files[shard].path, bytes(flipped))
        after = hash_checkpoint(manifest, files, dims)

        whole = cut(manifest.dtypes[i], manifest.shapes[i], dims[i])
        assert differences(before, after) == [(i, (at // whole.segment % whole.blocks,))]
        roots = [[None if d is None else d.root for d in digests.iter(manifest)] for digests in (before, after)]
        assert [n for n in range(len(manifest)) if roots[0][n] != roots[1][n]] == [i]


@given(tensors([*FLOATS, *SMALL]))
def test_blocks_are_equal_parts_along_the_dim(case: tuple[str, tuple[int, ...], int]) -> None:
    dtype, shape, dim = case
    found = cut(dtype, shape, dim)
    assert found.nbytes * 8 == math.prod(shape) * BITS[dtype]
    assert 8 % found.blocks == 0
    if found.blocks > 1:
        assert shape[dim] % found.blocks == 0
        assert found.rows == math.prod(shape[:dim])


@given(st.data())
def test_the_blocks_of_a_box_are_those_whose_elements_it_holds(data: st.DataObject) -> None:
    dtype, shape, dim = data.draw(tensors(["BF16"]))
    box = data.draw(boxes(dtype, shape, dim))
    count = cut(dtype, shape, dim).blocks

    held = torch.zeros(shape, dtype=torch.bool)
    held[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))] = True
    if count == 1:
        parts = [held]
    else:
        parts = list(held.chunk(count, dim))

    if math.prod(shape):
        assert list(blocks_within(dtype, shape, dim, box)) == [b for b, p in enumerate(parts) if p.all()]
        assert list(blocks_touched(dtype, shape, dim, box)) == [b for b, p in enumerate(parts) if p.any()]
