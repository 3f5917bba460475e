"""Ranks that read together get what each would have read for itself; every byte is read once, and hashed once."""

from __future__ import annotations

import tempfile
import threading
from array import array
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lading.formats.digests import default_dims
from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer import cooperative
from lading.transfer.cooperative import Demand, Index, Joint
from lading.transfer.exchange import execute_cooperatively
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.hashing import Hasher, hash_checkpoint
from lading.transfer.memory import HostArena
from tests.helpers.transfer_cases import manifests, wanted_of


@dataclass
class Threads:
    """What a gang does for execute_cooperatively, among threads of one process."""

    size: int
    barrier: threading.Barrier
    posted: dict[int, list[Tensor]] = field(default_factory=dict)

    def host(self, rank: int) -> Host:
        return Host(rank, self.size, self)


@dataclass
class Host:
    rank: int
    size: int
    all: Threads

    def all_to_all(self, output: Tensor, output_sizes: list[int], sent: Tensor, sent_sizes: list[int]) -> None:
        self.all.posted[self.rank] = list(sent.split(sent_sizes))
        self.all.barrier.wait()
        parts = [self.all.posted[r][self.rank] for r in range(self.size)]
        assert [part.numel() for part in parts] == output_sizes
        output.copy_(torch.cat(parts))
        self.all.barrier.wait()

    def all_reduce(self, tensor: Tensor, op: str) -> None:
        assert op == "sum"
        self.all.posted[self.rank] = [tensor.clone()]
        self.all.barrier.wait()
        total = torch.stack([self.all.posted[r][0] for r in range(self.size)]).sum(0).to(tensor.dtype)
        self.all.barrier.wait()
        tensor.copy_(total)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Manifest, list[Wanted]]:
    manifest = draw(manifests())
    return manifest, [draw(wanted_of(manifest)) for _ in range(draw(st.integers(2, 4)))]


def write(manifest: Manifest, folder: Path) -> list[ShardFile]:
    files = []
    for number, shard in enumerate(manifest.shards):
        path = folder / shard.name
        generator = torch.Generator().manual_seed(number)
        path.write_bytes(bytes(torch.randint(0, 256, (shard.size,), dtype=torch.uint8, generator=generator).tolist()))
        files.append(ShardFile(path=path, stat=FileStat.from_stat(path.stat())))
    return files


def shapes_of(wanted: Wanted) -> list[tuple[tuple[int, ...], str]]:
    return [(box.sizes, dtype) for box, dtype in zip(wanted.boxes, wanted.dtypes, strict=True)]


def same(a: Tensor, b: Tensor) -> bool:
    # How a cast turns one NaN into another depends on how many items are cast at once.
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@given(cases(), st.sampled_from([7, 64, 1000]), st.booleans())
def test_each_gets_what_it_would_have_read(case: tuple[Manifest, list[Wanted]], most: int, hashed: bool) -> None:
    manifest, wanted = case
    size = len(wanted)
    plans = [plan(manifest, each) for each in wanted]
    demands = [Demand.of(planned) for planned in plans]

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAF", 1), ("PAGE", 1), ("ROUND", most)):
            patch.setattr(cooperative, name, value)
        files = write(manifest, Path(folder))
        ranks = Threads(size, threading.Barrier(size, timeout=10))

        def run(rank: int) -> tuple[list[Tensor], int, Hasher | None]:
            try:
                joint = Joint(manifest, demands, default_dims(manifest) if hashed else None)
                schedule = joint.schedule()
                tensors = execute_cooperatively(
                    plans[rank], schedule, files, shapes_of(wanted[rank]),
                    host=ranks.host(rank), arena=HostArena(plans[rank].arena_bytes),  # type: ignore[arg-type]
                )  # fmt: skip
            except BaseException:
                ranks.barrier.abort()
                raise
            return tensors, schedule.bytes_of(rank), joint.hasher

        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(run, range(size)))

        for planned, each, (tensors, _, _) in zip(plans, wanted, found, strict=True):
            expected = execute(planned, files, shapes_of(each))
            assert all(map(same, tensors, expected))

        joint = Joint(manifest, demands)
        assert sum(count for _, count, _ in found) == joint.plan.read_bytes
        if hashed:
            known = hash_checkpoint(manifest, files)
            for _, _, hasher in found:
                assert hasher is not None
                digests = hasher.digests()
                for tensor, box in zip(joint.wanted.tensors, joint.wanted.boxes, strict=True):
                    if box.covers(manifest.shapes[tensor]):
                        assert digests.of(manifest, tensor) == known.of(manifest, tensor)


@given(cases())
def test_what_is_read_together_is_the_rows_that_any_wants(case: tuple[Manifest, list[Wanted]]) -> None:
    manifest, wanted = case
    joint = Joint(manifest, [Demand.of(plan(manifest, each)) for each in wanted])

    rows: dict[int, set[int]] = {}
    for each in wanted:
        for tensor, box in zip(each.tensors, each.boxes, strict=True):
            if box.numel:
                first, count = (box.starts[0], box.sizes[0]) if box.sizes else (0, 1)
                rows.setdefault(tensor, set()).update((first, first + count - 1))
    assert list(joint.wanted.tensors) == sorted(rows)
    for tensor, box in zip(joint.wanted.tensors, joint.wanted.boxes, strict=True):
        first, count = (box.starts[0], box.sizes[0]) if box.sizes else (0, 1)
        assert (first, first + count - 1) == (min(rows[tensor]), max(rows[tensor]))


@given(cases(), st.data())
def test_an_index_tells_the_wanted_bytes_of_a_range(case: tuple[Manifest, list[Wanted]], data: st.DataObject) -> None:
    manifest, wanted = case
    demand = Demand.of(plan(manifest, wanted[0]))
    index = Index(demand)
    columns = (demand.shards, demand.offsets, demand.strides, demand.lengths, demand.counts)
    for shard, file in enumerate(manifest.shards):
        begin = data.draw(st.integers(0, file.size))
        end = data.draw(st.integers(begin, file.size))
        expected = {}
        for entry, (of, offset, stride, length, count) in enumerate(zip(*columns, strict=True)):
            runs = [offset + i * stride + b for i in range(count) for b in range(length)]
            inside = [n for n, at in enumerate(runs) if begin <= at < end]
            if of == shard and inside:
                expected[entry] = (inside[0], inside[-1] + 1)
        assert {piece.entry: (piece.first, piece.last) for piece in index.within(shard, begin, end)} == expected


def test_steps_are_contiguous_even_and_cut_no_item() -> None:
    shapes = [(3,), (1000, 7), (5, 11)]
    dtypes = ["U8", "F32", "F64"]
    offsets, at = array("q"), 8
    for shape, dtype in zip(shapes, dtypes, strict=True):
        offsets.append(at)
        at += torch.Size(shape).numel() * BITS[dtype] // 8
    manifest = Manifest(
        format="safetensors", shards=(Shard(name="x.safetensors", size=at),), names=["a", "b", "c"], dtypes=dtypes,
        shapes=shapes, shard_ids=array("I", [0, 0, 0]), offsets=offsets,
    )  # fmt: skip
    whole = plan(manifest, Wanted(tensors=range(3), boxes=[Box.whole(s) for s in shapes], dtypes=dtypes))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEAF", 1), ("PAGE", 16), ("ROUND", 4096)):
            patch.setattr(cooperative, name, value)
        joint = Joint(manifest, [Demand.of(whole)] * 4)
        schedule = joint.schedule()

    ends = [offset + size for offset, size in zip(schedule.offsets, schedule.sizes, strict=True)]
    assert list(schedule.offsets) == [8, *ends[:-1]]
    assert ends[-1] == at
    assert all((end - offsets[1]) % 4 == 0 for end in ends if offsets[1] < end < offsets[2])
    assert max(map(schedule.bytes_of, range(4))) - min(map(schedule.bytes_of, range(4))) <= 2048
    assert schedule.rounds == max(b - a for a, b in zip(schedule.bounds, schedule.bounds[1:], strict=False))
