"""Reads tile exactly what is wanted, once; and executing equals loading whole, then slicing."""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning import plan as planning
from lading.planning.box import Box
from lading.planning.plan import ARENA, PAGE, Plan, Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from tests.helpers.examples import examples
from tests.helpers.transfer_cases import manifests, wanted_of


@st.composite
def cases(draw: st.DrawFn) -> tuple[Manifest, Wanted]:
    manifest = draw(manifests())
    return manifest, draw(wanted_of(manifest))


def _wanted_bytes(manifest: Manifest, wanted: Wanted, skip: Plan | None = None) -> Counter[tuple[int, int]]:
    """(shard, offset) of every byte that is wanted."""
    found: Counter[tuple[int, int]] = Counter()
    for n, (i, box) in enumerate(zip(wanted.tensors, wanted.boxes, strict=True)):
        if skip is not None and skip.homes[n] != ARENA:
            continue
        size = BITS[manifest.dtypes[i]] // 8
        for first, count in box.runs(manifest.shapes[i]):
            begin = manifest.offsets[i] + first * size
            found.update((manifest.shard_ids[i], b) for b in range(begin, begin + count * size))
    return found


def _runs(planned: Plan) -> Iterator[tuple[int, int, int, int, int]]:
    """(shard, offset, bytes, place in memory, conversion) of all that is read, the runs of rows one by one."""
    yield from zip(planned.shards, planned.offsets, planned.sizes, planned.targets, planned.casts, strict=True)
    rows = planned.rows
    for shard, offset, stride, length, count, target, cast in zip(
        rows.shards, rows.offsets, rows.strides, rows.lengths, rows.counts, rows.targets, rows.casts, strict=True
    ):
        for i in range(count):
            yield shard, offset + i * stride, length, target + i * _grown(planned, length, cast), cast


def _grown(planned: Plan, size: int, cast: int) -> int:
    source, target = planned.conversions[cast]
    return size if cast == 0 else size // (BITS[source] // 8) * (BITS[target] // 8)


@given(cases(), st.booleans(), st.sampled_from([1, 8, 256 << 10]))
def test_reads_tile_what_is_wanted_once(case: tuple[Manifest, Wanted], mapped: bool, long_run: int) -> None:
    manifest, wanted = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "LONG_RUN", long_run)
        planned = plan(manifest, wanted, mapped=mapped)

    read = Counter((shard, b) for shard, offset, size, *_ in _runs(planned) for b in range(offset, offset + size))
    assert read == _wanted_bytes(manifest, wanted, planned)
    assert all(length <= long_run for length in planned.rows.lengths)
    assert all(count > 1 for count in planned.rows.counts)


@given(cases(), st.integers(0, 20))
def test_what_a_plan_says_that_it_reads(case: tuple[Manifest, Wanted], gap: int) -> None:
    planned = plan(*case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "GAP", gap)
        least, rows = sum(size for _, _, size, *_ in _runs(planned)), planned.rows
        read = zip(rows.strides, rows.lengths, rows.counts, strict=True)
        gaps = sum((count - 1) * (stride - length) for stride, length, count in read if stride - length <= gap)
        assert planned.read_bytes == least + gaps
        assert len(planned.sizes) + len(rows.counts) <= planned.num_reads <= len(list(_runs(planned)))


@given(cases())
def test_reads_are_sorted_joined_and_never_overlap_in_memory(case: tuple[Manifest, Wanted]) -> None:
    manifest, wanted = case
    planned = plan(manifest, wanted)

    for reads in (planned, planned.rows):
        order = list(zip(reads.shards, reads.offsets, strict=True))
        assert order == sorted(order)

    filled: Counter[int] = Counter()
    for _, _, size, target, cast in _runs(planned):
        grown = _grown(planned, size, cast)
        filled.update(range(target, target + grown))
        assert target + grown <= planned.arena_bytes
    assert max(filled.values(), default=1) == 1


@given(manifests())
def test_what_is_not_cast_lies_as_in_the_file_modulo_the_page(manifest: Manifest) -> None:
    boxes = [Box.whole(shape) for shape in manifest.shapes]
    planned = plan(manifest, Wanted(tensors=range(len(manifest)), boxes=boxes, dtypes=manifest.dtypes))
    for offset, target in zip(planned.offsets, planned.targets, strict=True):
        assert offset % 8 or (target - offset) % PAGE == 0


@given(cases())
def test_tensors_are_aligned(case: tuple[Manifest, Wanted]) -> None:
    manifest, wanted = case
    planned = plan(manifest, wanted)
    for place, box, dtype in zip(planned.places, wanted.boxes, wanted.dtypes, strict=True):
        assert place % (BITS[dtype] // 8) == 0 or box.numel == 0


def test_a_shard_that_is_wanted_whole_is_one_read() -> None:
    manifest = Manifest(
        format="safetensors",
        shards=(Shard(name="a", size=48), Shard(name="b", size=48)),
        names=["a", "b", "c"],
        dtypes=["BF16"] * 3,
        shapes=[(4,), (2, 4), (4,)],
        shard_ids=array("I", [0, 0, 1]),
        offsets=array("q", [24, 32, 24]),
    )
    for dtype in ("BF16", "F32"):
        boxes = [Box.whole(shape) for shape in manifest.shapes]
        planned = plan(manifest, Wanted(tensors=[2, 0, 1], boxes=[boxes[2], boxes[0], boxes[1]], dtypes=[dtype] * 3))
        assert list(planned.sizes) == [24, 8]


@settings(max_examples=examples(60))
@given(cases(), st.booleans(), st.integers(1, 3), st.sampled_from([0, 4, 32 << 10]), st.randoms(use_true_random=False))
def test_executing_equals_load_whole_then_slice(
    case: tuple[Manifest, Wanted], mapped: bool, threads: int, gap: int, random: object
) -> None:
    manifest, wanted = case
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "GAP", gap)
        contents, files = [], []
        for shard in manifest.shards:
            data = bytes(random.getrandbits(8) for _ in range(shard.size))  # type: ignore[attr-defined]
            path = Path(folder, shard.name)
            path.write_bytes(data)
            contents.append(data)
            files.append(ShardFile(path=path, stat=FileStat.from_stat(path.stat())))

        shapes = [(box.sizes, dtype) for box, dtype in zip(wanted.boxes, wanted.dtypes, strict=True)]
        tensors = execute(plan(manifest, wanted, mapped=mapped), files, shapes, threads=threads)

    for tensor, i, box, dtype in zip(tensors, wanted.tensors, wanted.boxes, wanted.dtypes, strict=True):
        begin, whole = manifest.offsets[i], Box.whole(manifest.shapes[i])
        stored = TORCH_DTYPES[manifest.dtypes[i]]
        raw = bytearray(contents[manifest.shard_ids[i]][begin : begin + whole.numel * stored.itemsize])
        reference = torch.frombuffer(raw, dtype=stored) if raw else torch.empty(0, dtype=stored)
        reference = reference.view(manifest.shapes[i])
        reference = reference[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))]

        assert tensor.dtype == TORCH_DTYPES[dtype]
        assert tensor.shape == reference.shape
        expected = reference.to(tensor.dtype).contiguous()
        assert tensor.isnan().equal(expected.isnan())
        assert tensor.nan_to_num(0).equal(expected.nan_to_num(0))
