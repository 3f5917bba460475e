"""The pages of memory that a load fills, in the size that is cheapest by the measured touches of this load.

One fault makes a large page, and 512 make the same memory in small ones, so large pages are cheaper if the machine has
the memory at hand. A virtual machine often has not: its host reclaims memory that has been free for a second or two
(free page reporting, balloons) and backs it piece by piece at the next touch. Then a page of 2 MiB costs 3 to 6 ms,
against 0.3 ms for a backed one. The same memory in pages of 4 KiB costs 1 ms, as the kernel makes them of remainders
that the host left.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import threading
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

PAGE = 4096

BLOCK = 2 << 20
"""The bytes to touch and time at once: the largest page."""

LONGEST_WAIT = 64
"""The most blocks until the next trial of an expensive page size: if it is still expensive, some 4 % of all faults."""

MOST_CUTS = 8192
"""The most blocks to cut so that no large page fits: each takes two of the 65,530 areas of memory of a process."""

POPULATE_READ, POPULATE_WRITE = 22, 23
"""Advice since Linux 5.14; the mmap module of Python 3.11 does not name it yet."""

TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")

HugePages = Literal["auto", "always", "never"]
"""The sizes to use: the cheapest of all; large ones only; small ones only."""

_libc = ctypes.CDLL(None, use_errno=True)


class PageSize(StrEnum):
    """A size of pages, by its name in reports."""

    MIDDLE = "up to 1 MiB"
    """The largest size below 2 MiB that the kernel offers (multi-size huge pages)."""
    LARGE = "2 MiB"
    SMALL = "4 KiB"


class Kernel(Protocol):
    """The owner of the pages of one stretch of memory."""

    def advise(self, start: int, size: int, pages: PageSize) -> None:
        """Make the next touches of a part use pages of this size."""

    def touch(self, start: int, size: int) -> float | None:
        """Populate a part without changing it and return the seconds it took; ``None`` if that is not possible."""


class PageCosts:
    """The page sizes on offer, and which of them is the cheapest by the latest touches. Not thread-safe."""

    def __init__(self, sizes: Sequence[PageSize]) -> None:
        self.sizes = tuple(sizes)
        """The sizes in the order of their trial."""
        self.cheapest = self.sizes[0]
        self._costs: dict[PageSize, float] = {}
        self._waits = dict.fromkeys(self.sizes, 4)
        self._left = dict.fromkeys(self.sizes, 0)
        self._tried: set[PageSize] = set()

    def choose(self) -> PageSize:
        """Return the size for the next block: the cheapest, or one whose cost is not known or may have changed."""
        for size in self.sizes:
            if size not in self._tried:
                self._tried.add(size)
                return size
        for size in self.sizes:
            if size is self.cheapest:
                continue
            self._left[size] -= 1
            if self._left[size] < 0:
                self._left[size] = self._waits[size]
                return size

        return self.cheapest

    def record(self, size: PageSize, cost: float) -> None:
        """Record the seconds that a block of this size took."""
        known = self._costs.get(size)
        # An average for the size in use: if backed and other memory alternate, the mix counts.
        self._costs[size] = (3 * known + cost) / 4 if known is not None and size is self.cheapest else cost

        before, self.cheapest = self.cheapest, min(self._costs, key=lambda each: self._costs[each])
        if self.cheapest is not before:
            self._waits = dict.fromkeys(self.sizes, 4)
            self._left = dict.fromkeys(self.sizes, 4)
        elif size is not self.cheapest:
            self._waits[size] = self._left[size] = min(2 * self._waits[size], LONGEST_WAIT)


class Pages:
    """The pages of one stretch of memory, populated before writes to them. Threads share the measured costs."""

    def __init__(self, size: int, kernel: Kernel, costs: PageCosts) -> None:
        self._size = size
        self._kernel = kernel
        self._costs = costs
        self._lock = threading.Lock()
        count = -(-size // BLOCK)
        self._claimed = bytearray(count)
        self._advised: list[PageSize | None] = [None] * count
        self._end = 0
        """The block after the last claimed one."""
        self._timed = count > 0
        self._bytes: dict[PageSize, int] = {}

    @property
    def chosen(self) -> Mapping[str, int]:
        """The bytes populated ahead by page size, the most frequent first."""
        return {str(size): count for size, count in sorted(self._bytes.items(), key=lambda item: -item[1])}

    def prepare(self, place: int, size: int) -> None:
        """Populate the pages of a part, except for those that another thread is populating."""
        for number in range(place // BLOCK, -(-(place + size) // BLOCK)):
            if self._timed and not self._claimed[number]:
                self._prepare(number)

    def _prepare(self, number: int) -> None:
        start = number * BLOCK
        length = min(BLOCK, self._size - start)
        with self._lock:
            if self._claimed[number]:
                return
            self._claimed[number] = 1
            self._end = max(self._end, number + 1)
            pages = self._costs.choose() if length == BLOCK else PageSize.SMALL
            if length == BLOCK and self._advised[number] is not pages:
                self._advise(number, pages)

        # Seconds of the thread, not of the clock: other threads and processes must not make a page look expensive.
        seconds = self._kernel.touch(start, length)
        with self._lock:
            if seconds is None:
                self._timed = False
                return
            self._bytes[pages] = self._bytes.get(pages, 0) + length
            if length == BLOCK:
                self._costs.record(pages, seconds)

    def _advise(self, number: int, pages: PageSize) -> None:
        """Request pages for a block; the cheapest also for all later blocks that no other thread is populating.

        A request takes the lock of the address space, which other threads hold during touches: not for each block.
        """
        self._ask(number, number + 1, pages)
        if pages is self._costs.cheapest:
            self._ask(self._end, len(self._advised), pages)

    def _ask(self, first: int, end: int, pages: PageSize) -> None:
        if first < end:
            start = first * BLOCK
            self._kernel.advise(start, min(end * BLOCK, self._size) - start, pages)
            self._advised[first:end] = [pages] * (end - first)


class LinuxKernel:
    """The kernel, as the owner of the pages of an anonymous mapping.

    :param address: the address of the first block, a multiple of its size.
    :param cut: end an area within each block that needs pages of middle size, so that no large page fits.
    """

    def __init__(self, address: int, *, cut: bool) -> None:
        self._address = address
        self._cut = cut

    def advise(self, start: int, size: int, pages: PageSize) -> None:
        if pages is PageSize.SMALL:
            self._madvise(start, size, mmap.MADV_NOHUGEPAGE)
            return
        self._madvise(start, size, mmap.MADV_HUGEPAGE)
        if pages is PageSize.MIDDLE and self._cut:
            for at in range(start, start + size, BLOCK):
                self._madvise(at, PAGE, mmap.MADV_NOHUGEPAGE)

    def touch(self, start: int, size: int) -> float | None:
        begin = time.thread_time()

        return time.thread_time() - begin if self._madvise(start, size, POPULATE_WRITE) else None

    def _madvise(self, start: int, size: int, advice: int) -> bool:
        # By ctypes, as the method of the mapping blocks other threads meanwhile.
        return madvise(self._address + start, size, advice)


def madvise(address: int, size: int, advice: int) -> bool:
    """Advise the kernel about whole pages of memory and return whether it took the advice."""
    while _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice):
        # No retry for EAGAIN: the process has as many areas of memory as it may have, and it would fail forever.
        if ctypes.get_errno() != errno.EINTR:
            return False

    return True


def pages_of(address: int, size: int, huge_pages: HugePages) -> Pages:
    """Return the pages of ``size`` bytes of an anonymous mapping, which begin at a multiple of a block's size."""
    if huge_pages == "auto":
        sizes = [*offered_sizes(), PageSize.SMALL]
    else:
        sizes = [PageSize.LARGE if huge_pages == "always" else PageSize.SMALL]
    if size > MOST_CUTS * BLOCK and PageSize.LARGE in sizes:
        sizes = [each for each in sizes if each is not PageSize.MIDDLE]

    return Pages(size, LinuxKernel(address, cut=PageSize.LARGE in sizes), PageCosts(sizes))


def offered_sizes(root: Path = TRANSPARENT) -> list[PageSize]:
    """Return the page sizes besides the small ones that the kernel makes on advice."""
    overall = _chosen(root / "enabled")

    def offers(folder: str) -> bool:
        said = _chosen(root / folder / "enabled")
        return (overall if said in ("inherit", None) else said) in ("always", "madvise")

    names = {entry.name for entry in root.glob("hugepages-*kB")}
    middle = any(offers(name) for name in names - {"hugepages-2048kB"} if _chosen(root / name / "enabled"))

    return [*([PageSize.MIDDLE] if middle else []), *([PageSize.LARGE] if offers("hugepages-2048kB") else [])]


def _chosen(path: Path) -> str | None:
    """Return the value in brackets of a file of settings; ``None`` if it does not exist."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    _, bracket, rest = text.partition("[")

    return rest.partition("]")[0] if bracket else None
