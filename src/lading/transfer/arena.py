"""The memory that a plan fills, as its readers see it, and the memory of bytes that are only looked at."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from lading.errors import InternalError

if TYPE_CHECKING:
    from torch import Tensor

RING_DEPTH = 3
"""The number of buffers of a reader that fills a device: it reads into one while two are on their way."""


class Stage(Protocol):
    """A buffer of one reader thread for bytes that cannot go directly into the arena."""

    def take(self) -> memoryview:
        """Return a buffer that is not in use."""

    def put(self, begin: int, size: int, place: int, source: str, target: str) -> None:
        """Move ``size`` bytes at ``begin`` of the buffer taken last to ``place`` in the arena, cast on the way."""

    def finish(self) -> None:
        """Wait until all bytes have arrived."""


class Arena(Protocol):
    """The memory of all tensors of a load that are not mapped."""

    on_host: bool
    """``True`` if reads can go directly into it."""

    def direct(self, place: int, size: int) -> memoryview | None:
        """Return the bytes at ``place`` to read into; ``None`` if this memory is not the host's."""

    def stage(self, chunk: int, depth: int = RING_DEPTH) -> Stage:
        """Return buffers of ``chunk`` bytes for one reader thread.

        :param depth: the number of buffers, if copies go on while the thread reads.
        """

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Return the tensor at ``place``, which keeps the memory alive."""

    @property
    def pages(self) -> Mapping[str, int]:
        """The page sizes chosen for it, with their bytes."""


class NoArena:
    """An arena without memory, for bytes that are only looked at."""

    on_host = True

    def direct(self, place: int, size: int) -> memoryview | None:
        return None

    def stage(self, chunk: int, depth: int = RING_DEPTH) -> Stage:
        return PassingStage(chunk)

    def tensor(self, place: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        raise InternalError("bytes that were only read are not a tensor")

    @property
    def pages(self) -> Mapping[str, int]:
        return {}


class Buffer(NoArena):
    """An arena of plain memory, for bytes without a cast that are looked at all together.

    :param size: the bytes, at least one.
    """

    def __init__(self, size: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def direct(self, place: int, size: int) -> memoryview | None:
        return self.memory[place : place + size]


class PassingStage:
    """A buffer whose bytes stay where they are."""

    def __init__(self, chunk: int) -> None:
        self._map = mmap.mmap(-1, chunk, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.read = memoryview(b"")
        """The bytes read last, until the next ones."""

    def take(self) -> memoryview:
        return memoryview(self._map)

    def put(self, begin: int, size: int, place: int, source: str, target: str) -> None:
        self.read = memoryview(self._map)[begin : begin + size]

    def finish(self) -> None:
        pass
