"""The memory that a load fills: one arena per load, on the CPU or on a device, and the way of bytes into it."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Protocol

import torch
from torch import Tensor

from lading.transfer.dtypes import TORCH_DTYPES

HUGE_PAGE = 2 << 20

MADV_POPULATE_READ = 22
"""Linux 5.14; the mmap module of Python 3.11 does not name it yet."""


class Stage(Protocol):
    """A buffer of one reader thread for bytes that cannot be read straight into the arena."""

    def take(self) -> memoryview:
        """A buffer that nothing uses any more."""

    def put(self, size: int, place: int, source: str, target: str) -> None:
        """Move the first ``size`` bytes of the buffer taken last to ``place`` in the arena, cast on the way."""

    def finish(self) -> None:
        """Return when all that was put has arrived."""


class Arena(Protocol):
    """Memory for all tensors of a load that are not mapped."""

    on_host: bool
    """Whether bytes can be read straight into it."""

    def direct(self, place: int, size: int) -> memoryview | None:
        """The bytes at ``place``, to be read into; ``None`` where this memory is not the host's."""

    def stage(self, chunk: int) -> Stage:
        """Buffers of ``chunk`` bytes for one reader thread."""

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        """The tensor at ``place``. It keeps the memory alive."""


def create_arena(size: int, device: torch.device) -> Arena:
    """Memory of ``size`` bytes on ``device``; what it holds is not defined."""
    return HostArena(size) if device.type == "cpu" else DeviceArena(size, device)


class HostArena:
    """Anonymous memory in huge pages: faulting 4 KiB pages one by one would cost more than the copy."""

    on_host = True

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE_PAGE:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = memoryview(self._map)

    def direct(self, place: int, size: int) -> memoryview | None:
        return self._bytes[place : place + size]

    def stage(self, chunk: int) -> Stage:
        return _HostStage(self._map, chunk)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        return view(self._map, place, shape, dtype)


class DeviceArena:
    """One allocation on a device, filled through pinned buffers on a stream of its own."""

    on_host = False

    def __init__(self, size: int, device: torch.device) -> None:
        self._device = device
        self._bytes = torch.empty(max(size, 1), dtype=torch.uint8, device=device)

    def direct(self, place: int, size: int) -> memoryview | None:
        return None

    def stage(self, chunk: int) -> Stage:
        return _DeviceStage(self._bytes, chunk)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        torch_dtype = TORCH_DTYPES[dtype]
        size = math.prod(shape) * torch_dtype.itemsize

        return self._bytes[place : place + size].view(torch_dtype).view(shape)


class _HostStage:
    """A buffer that fits the cache: the bytes that were just read are cast before they leave it."""

    def __init__(self, arena: mmap.mmap, chunk: int) -> None:
        self._arena = arena
        self._map = mmap.mmap(-1, chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._map)

    def take(self) -> memoryview:
        return self._bytes

    def put(self, size: int, place: int, source: str, target: str) -> None:
        read = torch.frombuffer(self._map, dtype=TORCH_DTYPES[source], count=size // TORCH_DTYPES[source].itemsize)
        torch.frombuffer(self._arena, dtype=TORCH_DTYPES[target], count=read.numel(), offset=place).copy_(read)

    def finish(self) -> None:
        pass


class _DeviceStage:
    """A ring of pinned buffers. Each is taken again only when the copy out of it has passed."""

    DEPTH = 3

    def __init__(self, arena: Tensor, chunk: int) -> None:
        self._arena = arena
        self._stream = torch.cuda.Stream(arena.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(arena.device))  # the allocator may hand out memory in use
        self._buffers = [torch.empty(chunk, dtype=torch.uint8, pin_memory=True) for _ in range(self.DEPTH)]
        self._views = [
            memoryview((ctypes.c_ubyte * chunk).from_address(buffer.data_ptr())).cast("B") for buffer in self._buffers
        ]
        self._events: list[torch.cuda.Event | None] = [None] * self.DEPTH
        self._landing = torch.empty(0, dtype=torch.uint8, device=arena.device)
        self._at = -1

    def take(self) -> memoryview:
        self._at = (self._at + 1) % self.DEPTH
        event = self._events[self._at]
        if event is not None:
            event.synchronize()

        return self._views[self._at]

    def put(self, size: int, place: int, source: str, target: str) -> None:
        read = self._buffers[self._at][:size]
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]

        with torch.cuda.stream(self._stream):
            if source == target:
                self._arena[place : place + size].copy_(read, non_blocking=True)
            else:
                # The link is the narrow place: the bytes cross it uncast, and one chunk on the device receives them.
                if self._landing.numel() < self._buffers[0].numel():
                    self._landing = torch.empty_like(self._buffers[0], device=self._arena.device)
                landed = self._landing[:size]
                landed.copy_(read, non_blocking=True)
                cast = landed.view(TORCH_DTYPES[source])
                end = place + cast.numel() * TORCH_DTYPES[target].itemsize
                self._arena[place:end].view(TORCH_DTYPES[target]).copy_(cast)
            event.record(self._stream)

        self._events[self._at] = event

    def finish(self) -> None:
        self._stream.synchronize()


def view(memory: mmap.mmap, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The tensor at ``place`` of a mapping. Its storage is just its own bytes, and keeps the mapping alive."""
    torch_dtype = TORCH_DTYPES[dtype]
    count = math.prod(shape)
    if count == 0:  # `frombuffer` refuses to make it
        return torch.empty(shape, dtype=torch_dtype)

    return torch.frombuffer(memory, dtype=torch_dtype, count=count, offset=place).view(shape)


def map_file(fd: int, size: int) -> mmap.mmap:
    """A private, writable mapping of a whole file, all of its pages present.

    Writing to the mapping changes neither the file nor what others see of it.
    """
    mapping = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    try:
        mapping.madvise(MADV_POPULATE_READ)  # 30 times faster than a fault per page
    except (OSError, ValueError):
        pass  # an older kernel: pages come one by one, as they are touched

    return mapping
