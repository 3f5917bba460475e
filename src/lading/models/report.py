"""What a load did, and how long each part of it took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did."""

    name: str
    """Of the card, or the path."""
    family: str
    model_class: str
    device: str
    dtypes: Mapping[str, int]
    """Elements in memory by dtype, the most frequent first."""
    parameters: int
    """Elements in memory, tied parameters once."""
    tensors: int
    """Tensors of the checkpoint that were used."""
    shards: int
    bytes_read: int
    bytes_mapped: int
    bytes_copied: int
    """Bytes that were copied once more, where a shard is smaller than that of the first rank: FSDP pads it."""
    reads: int
    """Reads after neighbours were joined."""
    pages: Mapping[str, int]
    """Bytes of CPU memory by the size of the pages that were chosen for them, the most frequent first."""
    phases: Mapping[str, float]
    """Seconds of each phase, in the order in which they ran."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())


class Clock:
    """Measures the phases of a load."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
