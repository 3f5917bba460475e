"""Mapped files, and the population of their pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

from lading.errors import LadingError
from lading.formats.manifest import Manifest
from lading.planning.plan import PAGE
from lading.transfer.drive import cores
from lading.transfer.files import ShardFile, open_shard
from lading.transfer.memory import populate
from lading.transfer.pages import BLOCK

CELL = 64 << 20
"""The bytes of a file that a thread populates before it takes the next part: shards are few, and differ in size."""

Range = tuple[int, int, int]
"""(shard, begin, end): bytes of a shard's file."""

Cell = tuple[int, int]
"""(shard, number): a part of a shard's file, in units of :data:`CELL` bytes."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """Files mapped before the load knows its tensors."""

    mappings: Mapping[int, mmap.mmap] = field(default_factory=dict)
    """The mappings by shard."""
    cells: Mapping[Cell, object] = field(default_factory=dict)
    """The cells of them that are populated ahead."""


NOTHING_AHEAD = Ahead()


@contextmanager
def mapped_ahead(files: Sequence[ShardFile], ranges: Iterable[Range]) -> Iterator[Ahead]:
    """Map files, and populate those of their pages that are in the page cache while the block runs.

    Mapping cached pages takes as long as the rest of a mapped load, and needs no Python. This reads nothing from a
    disk, as the load may not need all of it. A file that this cannot map is left to the next function that maps it,
    which raises the error.

    :param ranges: the bytes that the load may need.
    """
    mappings: dict[int, mmap.mmap] = {}
    cells: dict[Cell, list[tuple[int, int]]] = {}
    for i, own in groupby(cells_of(ranges).items(), lambda item: item[0][0]):
        try:
            with open_shard(files[i]) as shard:
                present = {cell: parts for cell, parts in own if shard.is_cached(parts[0][0])}
                if present:
                    mappings[i] = shard.map()
                    cells |= present
        except (LadingError, OSError):
            continue

    with ThreadPoolExecutor(cores(), thread_name_prefix="lading-mapper") as pool:
        for (i, _), parts in cells.items():
            pool.submit(_populate, mappings[i], parts)
        try:
            yield Ahead(mappings, cells)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def make_present(mappings: Mapping[int, mmap.mmap], ranges: Iterable[Range], ahead: Ahead) -> None:
    """Populate bytes of mappings, except for those populated ``ahead``, on as many threads as there are cores."""
    cells = {cell: parts for cell, parts in cells_of(ranges).items() if cell not in ahead.cells}
    if cells:
        with ThreadPoolExecutor(min(cores(), len(cells)), thread_name_prefix="lading-mapper") as pool:
            list(pool.map(lambda cell: _populate(mappings[cell[0]], cells[cell]), cells))


def may_be_mapped(manifest: Manifest, dtype: str | None) -> Iterator[Range]:
    """Yield the bytes of tensors that need no cast.

    :param dtype: the dtype to load as; ``None`` for that of each tensor.
    """
    if dtype is None:
        return ((i, 0, shard.size) for i, shard in enumerate(manifest.shards))

    manifest = manifest.flat()

    return (
        (manifest.shard_ids[i], manifest.offsets[i], manifest.offsets[i] + manifest.nbytes(i))
        for i, stored in enumerate(manifest.dtypes)
        if stored == dtype
    )


def cells_of(ranges: Iterable[Range]) -> dict[Cell, list[tuple[int, int]]]:
    """Return ranges by their cells, in order, joined if less than a huge page is between them. They begin at pages."""
    cells: dict[Cell, list[tuple[int, int]]] = {}
    for shard, begin, end in sorted(ranges):
        for number in range(begin // CELL, -(-end // CELL)):
            low, high = max(begin - begin % PAGE, number * CELL), min(end, (number + 1) * CELL)
            parts = cells.setdefault((shard, number), [])
            if parts and low - parts[-1][1] < BLOCK:
                parts[-1] = (parts[-1][0], max(high, parts[-1][1]))
            else:
                parts.append((low, high))

    return cells


def _populate(mapping: mmap.mmap, parts: Iterable[tuple[int, int]]) -> None:
    for begin, end in parts:
        populate(mapping, begin, end - begin)
