from __future__ import annotations

import fcntl
import gc
import hashlib
import io
import math
import mmap
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lading.errors import CorruptModelCheckpointError, InternalError
from lading.formats.digests import Digests, differences
from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer import execute as execution
from lading.transfer import files as module
from lading.transfer import reader
from lading.transfer.arena import NoArena
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile, open_shard
from lading.transfer.hashing import Hasher, hash_checkpoint
from lading.transfer.memory import HostArena, RingStage
from tests.helpers.digest_reference import reference


def write(path: Path, tensor: torch.Tensor) -> ShardFile:
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return ShardFile(path=path, stat=FileStat.from_stat(path.stat()))


def manifest_of(tensor: torch.Tensor, dtype: str) -> Manifest:
    return Manifest(
        format="safetensors",
        shards=(Shard(name="x", size=tensor.nbytes),),
        names=["w"],
        dtypes=[dtype],
        shapes=[tuple(tensor.shape)],
        shard_ids=array("I", [0]),
        offsets=array("q", [0]),
    )


def load(tensor: torch.Tensor, file: ShardFile, dtype: str = "F32", mapped: bool = False) -> torch.Tensor:
    manifest = manifest_of(tensor, "F32")
    box = Box.whole(tensor.shape)
    planned = plan(manifest, Wanted(tensors=[0], boxes=[box], dtypes=[dtype]), mapped=mapped)
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], threads=2)
    return loaded


@pytest.mark.few(2)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_many_steps_on_several_threads(tmp_path: Path, mapped: bool, dtype: str) -> None:
    tensor = torch.randn(5 << 20)  # 20 MiB: three steps
    loaded = load(tensor, write(tmp_path / "x", tensor), dtype, mapped)
    assert loaded.float().equal(tensor.bfloat16().float() if dtype == "BF16" else tensor)


def test_the_threads_of_torch_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    tensor = torch.randn(1024)
    load(tensor, write(tmp_path / "x", tensor))
    assert torch.get_num_threads() == before


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    file = write(tmp_path / "x", tensor)
    loaded = load(tensor, file, mapped=True)
    loaded.zero_()
    assert load(tensor, file).equal(tensor)


@pytest.mark.parametrize("mapped", [False, True])
def test_a_tensor_pickles_as_just_its_own_bytes(tmp_path: Path, mapped: bool) -> None:
    tensor = torch.randn(2, 500_000)
    file = write(tmp_path / "x", tensor)
    manifest = manifest_of(tensor, "F32")
    box = Box((0, 0), (1, 500_000))
    planned = plan(
        manifest, Wanted(tensors=[0, 0], boxes=[box, Box((1, 0), (1, 500_000))], dtypes=["F32"] * 2), mapped=mapped
    )
    first, _ = execute(planned, [file], [(box.sizes, "F32")] * 2)
    buffer = io.BytesIO()
    torch.save(first, buffer)
    assert len(buffer.getvalue()) < 2_010_000


def test_a_file_that_was_cut_is_corrupt(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    file = write(tmp_path / "x", tensor)
    with file.path.open("r+b") as f:
        f.truncate(100)
    with pytest.raises(CorruptModelCheckpointError, match="changed"):
        load(tensor, file)


def test_a_file_that_is_cut_while_it_is_read_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5 << 20)
    file = write(tmp_path / "x", tensor)
    real = os.preadv

    def cutting(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        os.truncate(file.path, 1000)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(module.os, "preadv", cutting)
    with pytest.raises(CorruptModelCheckpointError, match="ends early"):
        load(tensor, file)


def test_a_file_that_is_written_while_it_is_read_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1000)
    file = write(tmp_path / "x", tensor)
    real = os.preadv

    def writing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        os.utime(file.path, ns=(1, 1))
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(module.os, "preadv", writing)
    with pytest.raises(CorruptModelCheckpointError, match="changed while it was loaded"):
        load(tensor, file)


@pytest.mark.parametrize("content", ["same", "other", "longer"])
def test_a_file_in_the_place_of_another_is_read_if_its_bytes_are_known_to_be_right(
    tmp_path: Path, content: str
) -> None:
    tensor = torch.randn(1000)
    file = write(tmp_path / "x", tensor)
    known = replace(file, sha256=hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest())
    other = {"same": tensor, "other": tensor + 1, "longer": torch.cat([tensor, tensor])}[content]
    write(tmp_path / "y", other)
    (tmp_path / "y").rename(tmp_path / "x")

    with pytest.raises(CorruptModelCheckpointError, match="changed while it was loaded"):
        load(tensor, file)
    if content == "same":
        assert torch.equal(load(tensor, known), tensor)
    else:
        with pytest.raises(CorruptModelCheckpointError, match="changed while it was loaded"):
            load(tensor, known)


def test_to_whoever_reads_it_a_file_that_is_replaced_is_what_it_was(tmp_path: Path) -> None:
    file = write(tmp_path / "x", torch.zeros(10))

    with open_shard(file) as shard:
        write(tmp_path / "y", torch.ones(10))
        (tmp_path / "y").rename(tmp_path / "x")
        memory = memoryview(bytearray(40))
        shard.fill(0, memory)
    assert bytes(memory) == bytes(40)

    with pytest.raises(CorruptModelCheckpointError), open_shard(file):
        pass


def test_what_is_read_past_the_page_cache_is_of_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x", torch.zeros(4096))
    write(tmp_path / "y", torch.ones(4096))

    def replace_first(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT and (tmp_path / "y").exists():
            (tmp_path / "y").rename(tmp_path / "x")
        return real(path, flags)

    real = os.open
    monkeypatch.setattr(module.os, "open", replace_first)
    memory = memoryview(mmap.mmap(-1, 16384))
    with open_shard(file) as shard:
        shard.fill(0, memory, direct=True)
    assert bytes(memory) == bytes(16384)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(10_000)
    file = write(tmp_path / "x", tensor)
    real = os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, buffers, at, flags=0: real(fd, [buffers[0][:999]], at, flags))
    assert load(tensor, file).equal(tensor)


@pytest.mark.few(3)
@pytest.mark.parametrize("offset", [0, 4096, 24, 4095])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_cold_files_are_read_past_the_page_cache(tmp_path: Path, offset: int, dtype: str) -> None:
    tensor = torch.randn(3 << 20)
    path = tmp_path / "x"
    path.write_bytes(bytes(offset) + tensor.view(torch.uint8).numpy().tobytes() + b"tail")
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    manifest = Manifest(
        format="safetensors",
        shards=(Shard(name="x", size=path.stat().st_size),),
        names=["w"],
        dtypes=["F32"],
        shapes=[tuple(tensor.shape)],
        shard_ids=array("I", [0]),
        offsets=array("q", [offset]),
    )
    box = Box.whole(tensor.shape)
    planned = plan(manifest, Wanted(tensors=[0], boxes=[box], dtypes=[dtype]))
    file = ShardFile(path=path, stat=FileStat.from_stat(path.stat()))
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)])
    assert loaded.equal(tensor.to(loaded.dtype))


def test_a_file_system_that_takes_the_flag_and_refuses_the_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1 << 20)
    file = write(tmp_path / "x", tensor)
    monkeypatch.setattr(module.OpenShard, "is_cold", lambda self, offset: True)
    real, refused = os.preadv, []

    def refusing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(22, "Invalid argument")
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(module.os, "preadv", refusing)
    assert load(tensor, file).equal(tensor)
    assert refused


ROWS = {
    "gaps are read": ((3000, 1000), Box((0, 250), (3000, 250))),
    "gaps are passed by": ((300, 20_000), Box((0, 15_000), (300, 5000))),
    "to the end of the file": ((2000, 300), Box((1, 299), (1999, 1))),
    "of three dims": ((7, 60, 500), Box((1, 10, 100), (6, 50, 300))),
    "long runs": ((40, 150_000), Box((0, 75_000), (40, 75_000))),
}


@cache
def random_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that tests share, and none changes."""
    return torch.randn(shape)


@pytest.mark.few(8)
@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("offset", [pytest.param(0, marks=pytest.mark.slow), 24, 4095])
@pytest.mark.parametrize("case", ROWS)
def test_parts_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, offset: int, dtype: str, is_cold: bool
) -> None:
    shape, box = ROWS[case]
    monkeypatch.setattr(reader, "ROWS_CHUNK", 300 << 10)
    monkeypatch.setattr(reader, "STEP", 1 << 20)
    monkeypatch.setattr(execution, "STEP", 1 << 20)
    monkeypatch.setattr(module.OpenShard, "is_cold", lambda self, offset: is_cold)
    real, sizes = os.preadv, []

    def counting(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        sizes.append(real(fd, buffers, at, flags))
        return sizes[-1]

    monkeypatch.setattr(module.os, "preadv", counting)
    tensor = random_tensor(shape)
    path = tmp_path / "x"
    path.write_bytes(bytes(offset) + tensor.view(torch.uint8).numpy().tobytes())
    manifest = replace(manifest_of(tensor, "F32"), offsets=array("q", [offset]))
    planned = plan(manifest, Wanted(tensors=[0], boxes=[box], dtypes=[dtype]))
    file = ShardFile(path=path, stat=FileStat.from_stat(path.stat()))
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], threads=2)

    expected = tensor[tuple(map(slice, box.starts, box.ends))]
    assert loaded.equal(expected.to(loaded.dtype))
    assert loaded.is_contiguous()
    if case != "long runs":
        assert max(sizes) <= reader.ROWS_CHUNK + 2 * 4096
    if case == "gaps are passed by" or not planned.rows.counts:
        pages = 2 * len(planned.sizes) if is_cold else 0  # past the page cache, a page comes whole
        assert 0 <= sum(sizes) - box.numel * 4 <= pages * 4096


def test_an_error_in_one_thread_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.ones(20 << 20)
    file = write(tmp_path / "x", tensor)
    calls = []

    def failing(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            return 1
        calls.append(offset)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", failing)
    with pytest.raises(OSError, match="Input/output error"):
        load(tensor, file)
    assert len(calls) <= 2
    assert not [t for t in threading.enumerate() if t.name.startswith("lading-reader")]


def test_memory_goes_back_when_the_last_tensor_does(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    tensor = torch.ones(16 << 20)  # 64 MiB
    file = write(tmp_path / "x", tensor)
    gc.collect()
    before = resident()
    loaded = load(tensor, file)
    assert resident() - before > 60 << 20
    del loaded
    gc.collect()
    assert resident() - before < 8 << 20


class SlowDevice:
    """A device whose copies pass later, by themselves, as those of a stream do."""

    on_host = False
    pages: Mapping[str, int] = {}

    def __init__(self, size: int) -> None:
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self.jobs: queue.SimpleQueue[tuple[torch.Tensor, int, str, str, threading.Event] | None] = queue.SimpleQueue()
        self.stages: list[RingStage] = []
        threading.Thread(target=self._run, daemon=True).start()

    def direct(self, place: int, size: int) -> memoryview | None:
        return None

    def stage(self, chunk: int, depth: int = 3) -> RingStage:
        self.stages.append(RingStage([torch.empty(chunk, dtype=torch.uint8) for _ in range(depth)], self._copy))
        return self.stages[-1]

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        size = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        return self.bytes[place : place + size].view(TORCH_DTYPES[dtype]).view(shape)

    def _copy(self, read: torch.Tensor, place: int, source: str, target: str) -> Any:
        passed = threading.Event()
        self.jobs.put((read, place, source, target, passed))
        return SimpleNamespace(synchronize=passed.wait)

    def _run(self) -> None:
        while (job := self.jobs.get()) is not None:
            read, place, source, target, passed = job
            time.sleep(0.002)
            cast = read.view(TORCH_DTYPES[source or "U8"]).to(TORCH_DTYPES[target or "U8"]).view(torch.uint8)
            self.bytes[place : place + cast.numel()] = cast
            passed.set()


@pytest.mark.few(3)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_ring_never_reuses_a_buffer_that_is_still_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, threads: int, rows: bool
) -> None:
    for each in (reader, execution):
        monkeypatch.setattr(each, "STEP", 64 << 10)
    tensor = torch.randn(1 << 10, 1 << 10)  # 64 steps
    file = write(tmp_path / "x", tensor)
    box = Box((0, 256), (1 << 10, 512)) if rows else Box.whole(tensor.shape)
    planned = plan(manifest_of(tensor, "F32"), Wanted(tensors=[0], boxes=[box], dtypes=[dtype]))
    device = SlowDevice(planned.arena_bytes)
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], arena=device, threads=threads)
    device.jobs.put(None)

    assert loaded.equal(tensor[:, box.starts[1] : box.ends[1]].to(loaded.dtype))
    assert len(device.stages) <= threads


# --- digests ----------------------------------------------------------------------------------------------------------


@cache
def random_bytes(size: int) -> bytes:
    return random.Random(0).randbytes(size)


def checkpoint(folder: Path, tensors: list[tuple[str, tuple[int, ...]]], gap: int = 24) -> tuple[Manifest, ShardFile]:
    """A file of random tensors behind ``gap`` bytes."""
    offsets = array("q")
    at = gap
    for dtype, shape in tensors:
        offsets.append(at)
        at += math.prod(shape) * BITS[dtype] // 8
    path = folder / "x"
    path.write_bytes(random_bytes(at))
    manifest = Manifest(
        format="safetensors",
        shards=(Shard(name="x", size=at),),
        names=[f"t{i}" for i in range(len(tensors))],
        dtypes=[dtype for dtype, _ in tensors],
        shapes=[shape for _, shape in tensors],
        shard_ids=array("I", [0]) * len(tensors),
        offsets=offsets,
    )
    return manifest, ShardFile(path=path, stat=FileStat.from_stat(path.stat()))


def references(manifest: Manifest, file: ShardFile, dims: list[int]) -> list[str]:
    data = file.path.read_bytes()
    return [
        reference(t.dtype, t.shape, dim, data[t.offset : t.offset + t.nbytes])[1]
        for t, dim in zip(manifest, dims, strict=True)
    ]


def roots(manifest: Manifest, digests: Digests) -> list[str | None]:
    return [None if digest is None else digest.root for digest in digests.iter(manifest)]


LARGE = [("BF16", (1000, 1536)), ("BF16", (7,)), ("F32", (512, 3000)), ("BF16", (3, 8, 200_000)), ("BF16", ())]
DIMS = [1, 0, 0, 1, 0]


def evict(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.few(3)
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("dtype", [None, "F16"])
def test_digests_are_taken_on_the_way(tmp_path: Path, cold: bool, mapped: bool, dtype: str | None) -> None:
    manifest, file = checkpoint(tmp_path, LARGE)
    boxes = [Box.whole(shape) for shape in manifest.shapes]
    wanted = Wanted(tensors=range(5), boxes=boxes, dtypes=[dtype or d for d in manifest.dtypes])
    planned = plan(manifest, wanted, mapped=mapped)
    hasher = Hasher(manifest, DIMS, planned, wanted)
    if cold:
        evict(file.path)
    shapes = [(box.sizes, d) for box, d in zip(boxes, wanted.dtypes, strict=True)]
    tensors = execute(planned, [file], shapes, observer=hasher)

    assert roots(manifest, hasher.digests()) == references(manifest, file, DIMS)
    assert bytes(hasher.vouched) == bytes([1] * 5)
    if dtype is None:
        data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        assert data == file.path.read_bytes()[24:]


@pytest.mark.few(3)
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("offset", [0, 24, 4095])
def test_a_checkpoint_is_hashed_without_being_kept(tmp_path: Path, cold: bool, offset: int) -> None:
    manifest, file = checkpoint(tmp_path, LARGE, offset)
    expected = references(manifest, file, DIMS)
    if cold:
        evict(file.path)
    assert roots(manifest, hash_checkpoint(manifest, [file], DIMS)) == expected


def test_a_checkpoint_is_hashed_along_its_first_dims(tmp_path: Path) -> None:
    manifest, file = checkpoint(tmp_path, LARGE[:2])
    assert roots(manifest, hash_checkpoint(manifest, [file])) == references(manifest, file, [0, 0])


def test_a_file_that_is_cut_is_not_hashed(tmp_path: Path) -> None:
    manifest, file = checkpoint(tmp_path, LARGE)
    os.truncate(file.path, 100)
    with pytest.raises(CorruptModelCheckpointError, match="changed"):
        hash_checkpoint(manifest, [file])


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_the_part_of_a_rank_is_vouched_for(tmp_path: Path, dtype: str, on_device: bool, rank: int) -> None:
    # Columns whose gaps are read, and columns whose gaps are not; long runs; rows.
    shapes = [(800, 6144), (50, 60_000), (3, 8, 300_000), (64, 1000)]
    dims = [1, 1, 1, 0]
    manifest, file = checkpoint(tmp_path, [("BF16", shape) for shape in shapes])
    boxes = []
    for shape, dim in zip(shapes, dims, strict=True):
        size = shape[dim] // 4
        starts = tuple(rank * size if d == dim else 0 for d in range(len(shape)))
        boxes.append(Box(starts, tuple(size if d == dim else n for d, n in enumerate(shape))))
    wanted = Wanted(tensors=range(4), boxes=boxes, dtypes=[dtype] * 4)
    planned = plan(manifest, wanted)
    assert len(planned.rows.counts) == 2
    hasher = Hasher(manifest, dims, planned, wanted)
    arena = SlowDevice(planned.arena_bytes) if on_device else HostArena(planned.arena_bytes)
    execute(planned, [file], [(box.sizes, dtype) for box in boxes], arena=arena, observer=hasher)

    assert bytes(hasher.vouched) == bytes([1] * 4)
    found, whole = hasher.digests(), hash_checkpoint(manifest, [file], dims)
    assert list(found.known) == [3 << 2 * rank] * 4
    assert differences(whole, found) == []


def test_blocks_across_parts_that_are_wanted_one_after_the_other(tmp_path: Path) -> None:
    """A tensor whose parts go to several parameters, and no part ends where a block does."""
    manifest, file = checkpoint(tmp_path, [("BF16", (24, 10))])
    boxes = [Box((0, 0), (10, 10)), Box((10, 0), (7, 10)), Box((17, 0), (7, 10))]
    wanted = Wanted(tensors=[0, 0, 0], boxes=boxes, dtypes=["BF16"] * 3)
    planned = plan(manifest, wanted)
    hasher = Hasher(manifest, [0], planned, wanted)
    execute(planned, [file], [(box.sizes, "BF16") for box in boxes], observer=hasher)

    assert bytes(hasher.vouched) == bytes([1, 1, 1])
    assert roots(manifest, hasher.digests()) == references(manifest, file, [0])


def test_a_part_that_ends_within_a_block_is_not_vouched_for(tmp_path: Path) -> None:
    manifest, file = checkpoint(tmp_path, [("BF16", (24, 10))])
    box = Box((3, 0), (10, 10))
    wanted = Wanted(tensors=[0], boxes=[box], dtypes=["BF16"])
    planned = plan(manifest, wanted)
    hasher = Hasher(manifest, [0], planned, wanted)
    execute(planned, [file], [(box.sizes, "BF16")], observer=hasher)

    assert bytes(hasher.vouched) == bytes([0])
    assert list(hasher.digests().known) == [0b1110]


@pytest.mark.parametrize("mapped", [False, True])
def test_parts_in_any_order(tmp_path: Path, mapped: bool) -> None:
    manifest, file = checkpoint(tmp_path, [("BF16", (24, 10))])
    boxes = [Box((12, 0), (12, 10)), Box((0, 0), (12, 10)), Box((6, 0), (9, 10))]
    wanted = Wanted(tensors=[0, 0, 0], boxes=boxes, dtypes=["BF16"] * 3)
    planned = plan(manifest, wanted, mapped=mapped)
    hasher = Hasher(manifest, [0], planned, wanted)
    execute(planned, [file], [(box.sizes, "BF16") for box in boxes], observer=hasher)

    assert bytes(hasher.vouched) == bytes([1, 1, 1])
    assert roots(manifest, hasher.digests()) == references(manifest, file, [0])


def test_bytes_that_are_read_twice_must_be_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, file = checkpoint(tmp_path, [("BF16", (24, 10))])
    box = Box.whole((24, 10))
    wanted = Wanted(tensors=[0, 0], boxes=[box, box], dtypes=["BF16"] * 2)
    planned = plan(manifest, wanted)
    real, reads = os.preadv, []

    def flipping(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        count = real(fd, buffers, offset, flags)
        if not flags:
            reads.append(offset)
            buffers[0][5] ^= len(reads)
        return count

    monkeypatch.setattr(module.os, "preadv", flipping)
    hasher = Hasher(manifest, [0], planned, wanted)
    execute(planned, [file], [(box.sizes, "BF16")] * 2, observer=hasher)
    with pytest.raises(CorruptModelCheckpointError, match="block 0 of tensor 't0' was read twice"):
        hasher.digests()


def test_digests_before_anything_was_read_are_a_mistake(tmp_path: Path) -> None:
    manifest, _ = checkpoint(tmp_path, [("BF16", (24, 10))])
    wanted = Wanted(tensors=[0], boxes=[Box.whole((24, 10))], dtypes=["BF16"])
    with pytest.raises(InternalError, match="480 bytes should have been hashed, but 0 were"):
        Hasher(manifest, [0], plan(manifest, wanted), wanted).digests()


@pytest.mark.parametrize("mapped", [False, True])
def test_many_small_tensors_are_few_steps(tmp_path: Path, mapped: bool) -> None:
    manifest, _ = checkpoint(tmp_path, [("BF16", (64, 64))] * 2000)  # 16 MB
    boxes = [Box.whole(shape) for shape in manifest.shapes]
    wanted = Wanted(tensors=range(2000), boxes=boxes, dtypes=manifest.dtypes)
    planned = plan(manifest, wanted, mapped=mapped)
    hasher = Hasher(manifest, [1] * 2000, planned, wanted)
    reading = reader.Reading(planned, {}, NoArena(), hasher)
    steps = list(hasher.mapped_steps(8 << 20) if mapped else reading.steps())
    assert len(steps) in {2, 3}


@pytest.mark.parametrize(("offset", "size"), [(0, 8192), (24, 20000), (4095, 4097), (5000, 100), (100, 50000), (1, 9)])
def test_direct_reads_touch_nothing_around_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, size: int
) -> None:
    data = random.Random(0).randbytes(50_100)
    path = tmp_path / "x"
    path.write_bytes(data)
    memory = memoryview(mmap.mmap(-1, 65536))
    file = ShardFile(path=path, stat=FileStat.from_stat(path.stat()))
    with open_shard(file) as shard:
        shard.fill(offset, memory[offset : offset + size], direct=True)
        assert memory[:] == bytes(offset) + data[offset : offset + size] + bytes(65536 - offset - size)

        # What does not come at once is read another way.
        monkeypatch.setattr(module.os, "preadv", lambda fd, b, at, flags=0: REAL_PREADV(fd, b[:1], at, flags))
        memory[:] = bytes(65536)
        shard.fill(offset, memory[offset : offset + size], direct=True)
        assert memory[:] == bytes(offset) + data[offset : offset + size] + bytes(65536 - offset - size)


REAL_PREADV = os.preadv


def test_an_interrupt_stops_the_readers(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
sys.path[:0] = {[str(Path(__file__).parents[3])]!r}
import torch
from tests.unit.transfer import test_execute as t
from lading.transfer import files as module
from lading.transfer import reader
for each in (reader, t.execution):
    each.STEP = 1 << 20
tensor = torch.zeros(4 << 20)  # 16 steps
file = t.write(t.Path({str(tmp_path / "x")!r}), tensor)
real = os.preadv
def slow(fd, buffers, at, flags=0):
    if not flags:
        os.write(1, b'reading\\n')
        time.sleep(0.2)
    return real(fd, buffers, at, flags)
module.os.preadv = slow
try:
    t.load(tensor, file)
except KeyboardInterrupt:
    print([x.name for x in threading.enumerate() if x.name.startswith('lading')])
    sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("reading")
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
        assert process.wait(timeout=30) == 130
    assert "[]" in out
