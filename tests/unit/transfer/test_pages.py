"""Pages of a load's memory are as large as is cheap, whatever the machine does meanwhile."""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lading.transfer import pages as pages_module
from lading.transfer.memory import HostArena
from lading.transfer.pages import BLOCK, PAGE, LinuxKernel, PageCosts, Pages, PageSize, madvise, offered_sizes

SMALL, MIDDLE, LARGE = PageSize.SMALL, PageSize.MIDDLE, PageSize.LARGE

Cost = Callable[[int, PageSize], float]
"""Milliseconds of a block, by its number and the size of its pages."""

BACKED = {SMALL: 1.0, MIDDLE: 0.4, LARGE: 0.3}
TAKEN_BACK = {SMALL: 1.0, MIDDLE: 2.8, LARGE: 5.9}


class Machine:
    """A kernel whose pages cost what a test says."""

    def __init__(self, blocks: int, cost: Cost) -> None:
        self.cost = cost
        self.advice: list[PageSize | None] = [None] * blocks
        self.touched: list[PageSize | None] = [None] * blocks
        self.milliseconds = 0.0
        self.calls = 0

    def advise(self, start: int, size: int, pages: PageSize) -> None:
        self.calls += 1
        for number in range(start // BLOCK, -(-(start + size) // BLOCK)):
            self.advice[number] = pages

    def touch(self, start: int, size: int) -> float:
        number = start // BLOCK
        pages = self.advice[number] or SMALL
        assert self.touched[number] is None, "made present twice"
        self.touched[number] = pages
        cost = self.cost(number, pages) * size / BLOCK
        self.milliseconds += cost

        return cost / 1000


def fill(cost: Cost, blocks: int = 1024, sizes: tuple[PageSize, ...] = (LARGE, SMALL)) -> Machine:
    """Make memory present in steps, as a reader does."""
    machine = Machine(blocks, cost)
    pages = Pages(blocks * BLOCK, machine, PageCosts(sizes))
    for place in range(0, blocks * BLOCK, 4 * BLOCK):
        pages.prepare(place, 4 * BLOCK)

    assert sum(pages.chosen.values()) == blocks * BLOCK

    return machine


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "halves", [(BACKED, BACKED), (TAKEN_BACK, TAKEN_BACK), (BACKED, TAKEN_BACK), (TAKEN_BACK, BACKED)]
)
def test_pages_follow_what_faults_cost(halves: tuple[dict[PageSize, float], ...], seed: int) -> None:
    """A GiB of one kind of memory, then a GiB of the other."""
    noise = random.Random(seed)

    def cost(number: int, pages: PageSize) -> float:
        return halves[number // 512][pages] * noise.uniform(0.8, 1.3)

    machine = fill(cost)

    best = sum(512 * min(half[SMALL], half[LARGE]) for half in halves)
    assert machine.milliseconds < 1.25 * best


def test_large_pages_are_kept_where_they_are_cheap() -> None:
    machine = fill(lambda number, pages: BACKED[pages])

    assert machine.touched.count(LARGE) > 0.97 * 1024


def test_small_pages_are_taken_where_large_ones_are_dear() -> None:
    machine = fill(lambda number, pages: TAKEN_BACK[pages])

    assert machine.touched.count(SMALL) > 0.97 * 1024


def test_memory_whose_remainders_are_used_up_is_no_reason_for_small_pages() -> None:
    """Small pages become as dear as large ones when the host has taken back all that is left."""
    machine = fill(lambda number, pages: 6.5 if pages is SMALL and number > 100 else TAKEN_BACK[pages])

    assert machine.touched[200:].count(LARGE) > 0.9 * len(machine.touched[200:])


def test_one_dear_touch_does_not_end_the_large_pages() -> None:
    machine = fill(lambda number, pages: 2.5 if number == 300 else BACKED[pages])

    assert machine.touched[290:340].count(LARGE) > 45


def test_a_mix_is_judged_by_its_average() -> None:
    """Backed memory in runs of four blocks, then one that was taken back: large pages are still the cheaper ones."""
    machine = fill(lambda number, pages: 2.0 if pages is LARGE and number % 5 == 0 else BACKED[pages])

    assert machine.milliseconds < 0.85 * 1024 * BACKED[SMALL]


@pytest.mark.parametrize(
    ("costs", "expected"),
    [(BACKED, LARGE), (TAKEN_BACK, SMALL), ({SMALL: 1.0, MIDDLE: 0.4, LARGE: 5.9}, MIDDLE)],
)
def test_middle_sizes_are_tried_first(costs: dict[PageSize, float], expected: PageSize) -> None:
    machine = fill(lambda number, pages: costs[pages], sizes=(MIDDLE, LARGE, SMALL))

    assert machine.touched[0] is MIDDLE
    assert machine.touched.count(expected) > 0.95 * 1024


def test_the_kernel_is_not_asked_for_each_block() -> None:
    """Advice takes a lock that other threads hold while they make pages."""
    assert fill(lambda number, pages: TAKEN_BACK[pages]).calls < 100
    assert fill(lambda number, pages: BACKED[pages]).calls < 100


def test_threads_share_what_they_learn() -> None:
    blocks = 1024
    machine = Machine(blocks, lambda number, pages: TAKEN_BACK[pages])
    pages = Pages(blocks * BLOCK - 5000, machine, PageCosts((LARGE, SMALL)))
    # Parts that neither begin nor end where blocks do.
    steps = [(at, min(7_000_000, blocks * BLOCK - 5000 - at)) for at in range(0, blocks * BLOCK - 5000, 7_000_000)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda step: pages.prepare(*step), steps))

    assert None not in machine.touched
    assert machine.touched.count(LARGE) < 0.05 * blocks
    assert sum(pages.chosen.values()) == blocks * BLOCK - 5000


def test_a_kernel_that_cannot_touch_is_not_asked_again() -> None:
    class Old(Machine):
        def touch(self, start: int, size: int) -> None:  # type: ignore[override]
            self.calls += 1

    machine = Old(64, lambda number, pages: 0.0)
    pages = Pages(64 * BLOCK, machine, PageCosts((LARGE, SMALL)))
    for number in range(64):
        pages.prepare(number * BLOCK, BLOCK)

    assert machine.calls <= 4
    assert machine.advice == [LARGE] * 64
    assert pages.chosen == {}


# --- the real kernel --------------------------------------------------------------------------------------------------


def huge_bytes(address: int, size: int) -> int:
    """Return how many bytes of a part of this process's memory are in pages of 2 MiB."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) < address + size and int(match[2], 16) > address
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024

    return total


@pytest.mark.parametrize("choice", ["auto", "always", "never"])
def test_an_arena_holds_what_is_put_into_it(choice: str) -> None:
    size = 9 * BLOCK + 12345
    arena = HostArena(size, choice)  # type: ignore[arg-type]
    expected = torch.randint(0, 256, (size,), dtype=torch.uint8)
    for place in range(0, size, 3_000_001):
        part = expected[place : place + 3_000_001]
        memory = arena.direct(place, len(part))
        assert memory is not None
        memory[:] = part.numpy()

    found = arena.tensor(0, (size,), "U8")
    assert found.equal(expected)
    assert sum(arena.pages.values()) == size
    if choice == "never":
        assert list(arena.pages) == ["4 KiB"]
        assert huge_bytes(found.data_ptr(), size) == 0
    if choice == "always":
        assert arena.pages["2 MiB"] == 9 * BLOCK
        assert huge_bytes(found.data_ptr(), size) > 0 or not offered_sizes()


def test_pages_of_middle_size_leave_no_room_for_large_ones() -> None:
    memory = mmap.mmap(-1, 9 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = bytes([7]) * len(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    begin = -address % BLOCK
    fresh = mmap.mmap(-1, 9 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fresh_address = ctypes.addressof(ctypes.c_char.from_buffer(fresh))
    fresh_begin = fresh_address + -fresh_address % BLOCK

    kernel = LinuxKernel(fresh_begin, cut=True)
    kernel.advise(0, 8 * BLOCK, MIDDLE)
    assert kernel.touch(0, 8 * BLOCK) is not None
    assert huge_bytes(fresh_begin, 8 * BLOCK) == 0

    # What is there already stays.
    LinuxKernel(address + begin, cut=True).touch(0, 8 * BLOCK)
    assert memory[begin : begin + 8 * BLOCK] == bytes([7]) * (8 * BLOCK)


@pytest.mark.parametrize(
    ("overall", "sizes", "expected"),
    [
        ("madvise", {"2048": "inherit", "64": "never"}, [LARGE]),
        ("madvise", {"2048": "inherit", "64": "inherit"}, [MIDDLE, LARGE]),
        ("never", {"2048": "inherit", "64": "inherit"}, []),
        ("never", {"2048": "never", "16": "always"}, [MIDDLE]),
        ("always", {"2048": "madvise", "1024": "never", "8": "madvise"}, [MIDDLE, LARGE]),
        ("always", {}, [LARGE]),
        ("never", {}, []),
        (None, {}, []),
    ],
)
def test_what_the_kernel_offers(
    tmp_path: Path, overall: str | None, sizes: dict[str, str], expected: list[PageSize]
) -> None:
    def state(path: Path, value: str, values: tuple[str, ...]) -> None:
        path.write_text(" ".join(f"[{each}]" if each == value else each for each in values) + "\n")

    if overall is not None:
        state(tmp_path / "enabled", overall, ("always", "madvise", "never"))
    (tmp_path / "hugepages-4kB").mkdir()  # one without settings, as some kernels list it
    for size, value in sizes.items():
        (tmp_path / f"hugepages-{size}kB").mkdir()
        state(tmp_path / f"hugepages-{size}kB" / "enabled", value, ("always", "inherit", "madvise", "never"))

    assert offered_sizes(tmp_path) == expected


@pytest.mark.parametrize(("error", "calls"), [(errno.EAGAIN, 1), (errno.ENOMEM, 1), (errno.EINTR, 3)])
def test_advice_that_the_kernel_cannot_take_is_given_once(
    monkeypatch: pytest.MonkeyPatch, error: int, calls: int
) -> None:
    class Full:
        """A kernel whose process has as many areas of memory as it may have."""

        calls = 0

        def madvise(self, *arguments: object) -> int:
            self.calls += 1
            assert self.calls <= 3
            ctypes.set_errno(error)
            return 0 if self.calls == 3 else -1

    kernel = Full()
    monkeypatch.setattr(pages_module, "_libc", kernel)

    assert madvise(0, PAGE, mmap.MADV_NOHUGEPAGE) == (error == errno.EINTR)
    assert kernel.calls == calls
