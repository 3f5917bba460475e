"""The report of a load, and the clock that times its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from lading.system.display import counted, human_bytes, human_count, representation


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The report of a load."""

    name: str
    """The name of the card, or the path."""
    family: str
    model_class: str
    device: str
    dtypes: Mapping[str, int]
    """The elements in memory by dtype, the most frequent first."""
    parameters: int
    """The elements in memory, counting tied parameters once."""
    tensors: int
    """The tensors of the checkpoint that were used."""
    shards: int
    bytes_read: int
    bytes_mapped: int
    """The bytes that stay in the files; a weight with an adapter is copied when it is merged."""
    bytes_copied: int
    """The bytes that were copied again, because FSDP pads a shard that is smaller than that of the first rank."""
    reads: int
    """The reads, after adjacent ones were joined; the requests of a stream."""
    pages: Mapping[str, int]
    """The bytes of CPU memory by the page size that was chosen for them, the most frequent first."""
    phases: Mapping[str, float]
    """The seconds of each phase, in the order in which they ran."""
    adapters: tuple[str, ...] = ()
    """The paths or addresses of the adapters that were merged into the weights."""
    streamed: bool = False
    """True if the bytes came straight from the source of the checkpoint."""
    verified: bool | None = None
    """True if all streamed bytes, of all ranks, were compared with a digest; ``None`` if they came from files."""
    dropped: tuple[str, ...] = ()
    """The trained tensors of the checkpoint that the model does not need, such as those of a multimodal model for its
    decoder alone."""

    @property
    def transfer(self) -> str:
        """The bytes that were read, and how, for people."""
        size = human_bytes(self.bytes_read)
        if not self.streamed:
            return f"{size} read in {counted(self.reads, 'read')}"

        state = "verified" if self.verified else "unverified"

        return f"{size} streamed in {counted(self.reads, 'request')}, {state}"

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def __repr__(self) -> str:
        return representation(
            self,
            f"{self.name} as {self.model_class} on {self.device}",
            f"{human_count(self.parameters)} parameters",
            self.transfer,
            f"{human_bytes(self.bytes_mapped)} mapped" if self.bytes_mapped else "",
            f"{self.seconds:.3g} s",
        )


class Clock:
    """A clock that measures the phases of a load."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
