from __future__ import annotations

import fcntl
import gc
import io
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from array import array
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lading.box import Box
from lading.errors import CorruptModelCheckpointError
from lading.filesystem import FileStat
from lading.manifest import Manifest, Shard
from lading.transfer import execute as execution
from lading.transfer import files as module
from lading.transfer import reader
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.memory import RingStage
from lading.transfer.plan import Wanted, plan

CPU = torch.device("cpu")


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
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], device=CPU, threads=2)
    return loaded


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
    planned = plan(manifest, Wanted(tensors=[0, 0], boxes=[box, box.shift((1, 0))], dtypes=["F32"] * 2), mapped=mapped)
    first, _ = execute(planned, [file], [(box.sizes, "F32")] * 2, device=CPU)
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


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(10_000)
    file = write(tmp_path / "x", tensor)
    real = os.preadv
    monkeypatch.setattr(module.os, "preadv", lambda fd, buffers, at, flags=0: real(fd, [buffers[0][:999]], at, flags))
    assert load(tensor, file).equal(tensor)


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
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], device=CPU)
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


@pytest.mark.parametrize("is_cold", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("offset", [0, 24, 4095])
@pytest.mark.parametrize("case", ROWS)
def test_parts_of_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, offset: int, dtype: str, is_cold: bool
) -> None:
    shape, box = ROWS[case]
    monkeypatch.setattr(reader, "ROWS_CHUNK", 300 << 10)
    monkeypatch.setattr(execution, "STEP", 1 << 20)
    monkeypatch.setattr(module.OpenShard, "is_cold", lambda self, offset: is_cold)
    real, sizes = os.preadv, []

    def counting(fd: int, buffers: list[memoryview], at: int, flags: int = 0) -> int:
        sizes.append(real(fd, buffers, at, flags))
        return sizes[-1]

    monkeypatch.setattr(module.os, "preadv", counting)
    tensor = torch.randn(shape)
    path = tmp_path / "x"
    path.write_bytes(bytes(offset) + tensor.view(torch.uint8).numpy().tobytes())
    manifest = replace(manifest_of(tensor, "F32"), offsets=array("q", [offset]))
    planned = plan(manifest, Wanted(tensors=[0], boxes=[box], dtypes=[dtype]))
    file = ShardFile(path=path, stat=FileStat.from_stat(path.stat()))
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], device=CPU, threads=2)

    expected = tensor[tuple(map(slice, box.starts, box.ends))]
    assert loaded.equal(expected.to(loaded.dtype))
    assert loaded.is_contiguous()
    if case != "long runs":
        assert max(sizes) <= reader.ROWS_CHUNK + 2 * 4096
    if case == "gaps are passed by" or not planned.rows.counts:
        assert sum(sizes) == box.numel * 4


def test_an_error_in_one_thread_stops_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(20 << 20)
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

    tensor = torch.randn(16 << 20)  # 64 MiB
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

    def __init__(self, size: int) -> None:
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self.jobs: queue.SimpleQueue[tuple[torch.Tensor, int, str, str, threading.Event] | None] = queue.SimpleQueue()
        self.stages: list[RingStage] = []
        threading.Thread(target=self._run, daemon=True).start()

    def direct(self, place: int, size: int) -> memoryview | None:
        return None

    def stage(self, chunk: int) -> RingStage:
        self.stages.append(RingStage([torch.empty(chunk, dtype=torch.uint8) for _ in range(3)], self._copy))
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


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_ring_never_reuses_a_buffer_that_is_still_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, threads: int, rows: bool
) -> None:
    monkeypatch.setattr(execution, "STEP", 64 << 10)
    devices: list[SlowDevice] = []

    def create(size: int, device: torch.device) -> SlowDevice:
        devices.append(SlowDevice(size))
        return devices[-1]

    monkeypatch.setattr(execution, "create_arena", create)
    tensor = torch.randn(1 << 10, 1 << 10)  # 64 steps
    file = write(tmp_path / "x", tensor)
    box = Box((0, 256), (1 << 10, 512)) if rows else Box.whole(tensor.shape)
    planned = plan(manifest_of(tensor, "F32"), Wanted(tensors=[0], boxes=[box], dtypes=[dtype]))
    (loaded,) = execute(planned, [file], [(box.sizes, dtype)], device=CPU, threads=threads)
    devices[0].jobs.put(None)

    assert loaded.equal(tensor[:, box.starts[1] : box.ends[1]].to(loaded.dtype))
    assert len(devices[0].stages) <= threads


def test_an_interrupt_stops_the_readers(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import test_execute as t
from lading.transfer import files as module
tensor = torch.zeros(32 << 20)
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
    print([x.name for x in threading.enumerate()])
    sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("reading")
        process.send_signal(signal.SIGINT)
        out = process.stdout.read()
        assert process.wait(timeout=30) == 130
    assert "['MainThread']" in out
