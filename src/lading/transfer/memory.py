"""The memory that a load fills: one arena per load, on the CPU or on a device, and its buffers."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from lading.transfer.arena import RING_DEPTH, Arena, Stage
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.pages import BLOCK, POPULATE_READ, HugePages, madvise, pages_of


def create_arena(size: int, device: torch.device, huge_pages: HugePages = "auto") -> Arena:
    """Return memory of ``size`` bytes on ``device``; its content is undefined."""
    if device.type != "cpu":
        return DeviceArena(size, device)

    return HostArena(size, huge_pages)


class HostArena:
    """Anonymous memory that populates its pages in the cheapest size during the reads."""

    on_host = True

    def __init__(self, size: int, huge_pages: HugePages = "auto") -> None:
        self._map = mmap.mmap(-1, max(size, 1) + BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        address = _address(self._map)
        self._begin = -address % BLOCK
        """The first byte of the mapping at which a large page can begin."""
        self._bytes = memoryview(self._map)[self._begin : self._begin + size]
        self._pages = pages_of(address + self._begin, size, huge_pages)

    def direct(self, place: int, size: int) -> memoryview | None:
        self._pages.prepare(place, size)

        return self._bytes[place : place + size]

    def stage(self, chunk: int, depth: int = RING_DEPTH) -> Stage:
        return _HostStage(self, chunk)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        return view(self._map, self._begin + place, shape, dtype)

    @property
    def pages(self) -> Mapping[str, int]:
        return self._pages.chosen


class DeviceArena:
    """One allocation on a device, filled on its own stream."""

    on_host = False

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(max(size, 1), dtype=torch.uint8, device=device)
        self._lock = threading.Lock()
        self._landing = torch.empty(0, dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The allocator may return memory that work on the current stream still uses.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def direct(self, place: int, size: int) -> memoryview | None:
        return None

    def stage(self, chunk: int, depth: int = RING_DEPTH) -> Stage:
        buffers = [torch.empty(chunk, dtype=torch.uint8, pin_memory=True) for _ in range(depth)]

        return RingStage(buffers, self._copy)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        torch_dtype = TORCH_DTYPES[dtype]
        size = math.prod(shape) * torch_dtype.itemsize

        return self._bytes[place : place + size].view(torch_dtype).view(shape)

    @property
    def pages(self) -> Mapping[str, int]:
        return {}

    def _copy(self, read: Tensor, place: int, source: str, target: str) -> torch.cuda.Event:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]

        with self._lock, torch.cuda.stream(self._stream):
            if source == target:
                self._bytes[place : place + read.numel()].copy_(read, non_blocking=True)
            else:
                # The link is the bottleneck: bytes cross it uncast. The next copy reuses the buffer on the device at
                # once, as the stream runs one after the other.
                if self._landing.numel() < read.numel():
                    self._landing = torch.empty_like(read, device=self._device)
                landed = self._landing[: read.numel()]
                landed.copy_(read, non_blocking=True)
                cast = landed.view(TORCH_DTYPES[source])
                end = place + cast.numel() * TORCH_DTYPES[target].itemsize
                self._bytes[place:end].view(TORCH_DTYPES[target]).copy_(cast)
            event.record(self._stream)

        return event


class _HostStage:
    """A buffer that fits the cache, in which bytes are cast right after they are read."""

    def __init__(self, arena: HostArena, chunk: int) -> None:
        self._arena = arena
        self._map = mmap.mmap(-1, chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._map)

    def take(self) -> memoryview:
        return self._bytes

    def put(self, begin: int, size: int, place: int, source: str, target: str) -> None:
        dtype, cast = TORCH_DTYPES[source], TORCH_DTYPES[target]
        read = torch.frombuffer(self._map, dtype=dtype, count=size // dtype.itemsize, offset=begin)
        memory = self._arena.direct(place, read.numel() * cast.itemsize)
        values = torch.frombuffer(memory, dtype=cast)
        if dtype.is_floating_point and dtype.itemsize == 1 < cast.itemsize:
            # torch casts float8 numbers one by one: 250 million a second on one core, and a table 1,500 million.
            torch.index_select(_numbers(dtype, cast), 0, read.view(torch.uint8).to(torch.int32), out=values)
        else:
            values.copy_(read)

    def finish(self) -> None:
        pass


@lru_cache(maxsize=32)
def _numbers(dtype: torch.dtype, cast: torch.dtype) -> Tensor:
    """Return the numbers of all bit patterns of a dtype of one byte, in another dtype."""
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype).to(cast)


class Copied(Protocol):
    """The end of an asynchronous copy."""

    def synchronize(self) -> None:
        """Wait for the end of the copy."""


class RingStage:
    """A ring of buffers with asynchronous copies. A buffer is reused only after its copy has ended.

    :param copy: starts a copy of a buffer's beginning to a place in the arena, casting from one dtype to another.
    """

    def __init__(self, buffers: Sequence[Tensor], copy: Callable[[Tensor, int, str, str], Copied]) -> None:
        self._buffers = buffers
        # Through the address, as torch exposes a tensor's memory only through numpy.
        self._views = [
            memoryview((ctypes.c_ubyte * buffer.numel()).from_address(buffer.data_ptr())).cast("B")
            for buffer in buffers
        ]
        self._copies: list[Copied | None] = [None] * len(buffers)
        self._copy = copy
        self._at = -1

    def take(self) -> memoryview:
        self._at = (self._at + 1) % len(self._buffers)
        pending = self._copies[self._at]
        if pending is not None:
            pending.synchronize()

        return self._views[self._at]

    def put(self, begin: int, size: int, place: int, source: str, target: str) -> None:
        read = self._buffers[self._at][begin : begin + size]
        self._copies[self._at] = self._copy(read, place, source, target)

    def finish(self) -> None:
        for pending in self._copies:
            if pending is not None:
                pending.synchronize()


def view(memory: mmap.mmap, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return the tensor at ``place`` of a mapping. Its storage is just its own bytes, and keeps the mapping alive."""
    torch_dtype = TORCH_DTYPES[dtype]
    count = math.prod(shape)
    if count == 0:  # `frombuffer` refuses it
        return torch.empty(shape, dtype=torch_dtype)

    return torch.frombuffer(memory, dtype=torch_dtype, count=count, offset=place).view(shape)


def populate(mapping: mmap.mmap, start: int, size: int) -> None:
    """Populate all pages of a part of a mapping: 30 times faster than a page fault for each.

    :param start: a multiple of the page size.

    An older kernel refuses; then page faults populate them one by one.
    """
    madvise(_address(mapping) + start, size, POPULATE_READ)


def _address(mapping: mmap.mmap) -> int:
    """Return the address at which a mapping begins."""
    # Not kept: a mapping with an exported buffer cannot be closed.
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))
