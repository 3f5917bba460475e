"""The manifest of a checkpoint: the names, dtypes, shapes and file offsets of its tensors.

A manifest is a set of columns with one entry per tensor, as 100,000 tensors would take 120 MB as objects. The planner
and the catalog see checkpoints of all formats as manifests.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lading.errors import InternalError

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of each dtype, by the names of the safetensors format.

Source: the safetensors format specification, version 0.8 of its reference implementation.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a checkpoint."""

    name: str
    """The name within the checkpoint: a plain file name, or a relative path with forward slashes."""
    size: int
    """The size in bytes, the header included."""
    sha256: str | None = None
    """The SHA-256 of the whole file in hexadecimal, if it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One row of a manifest, for access to single tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int
    """The offset of its bytes from the start of the shard's file."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The tensors of a checkpoint in columns of equal length, in the order (shard, offset).

    :raises InternalError: the columns have different lengths, or a shard number does not exist.
    """

    format: str
    """``"safetensors"`` or ``"torch"``."""
    shards: tuple[Shard, ...]
    names: Sequence[str]
    """The names of the tensors, unique within the checkpoint."""
    dtypes: Sequence[str]
    """The dtypes of the tensors, keys of :data:`BITS`."""
    shapes: Sequence[tuple[int, ...]]
    shard_ids: array[int]
    """The position in ``shards`` of each tensor's file; type code ``I``."""
    offsets: array[int]
    """The offset of each tensor's bytes from the start of the shard's file; type code ``q``."""
    index_name: str | None = None
    """The name of the index that lists the shards of the checkpoint, if there is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The free-form ``__metadata__`` of the first shard."""

    def __post_init__(self) -> None:
        lengths = set(map(len, self._columns))
        if len(lengths) != 1:
            raise InternalError(f"the columns of a manifest must be of equal length, but are of lengths {lengths}")
        if len(self.shard_ids) and max(self.shard_ids) >= len(self.shards):
            raise InternalError(f"a manifest of {len(self.shards)} shards refers to shard {max(self.shard_ids)}")

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.names)

    def __getitem__(self, i: int) -> TensorInfo:
        return TensorInfo(
            name=self.names[i],
            dtype=self.dtypes[i],
            shape=self.shapes[i],
            shard=self.shards[self.shard_ids[i]],
            offset=self.offsets[i],
            nbytes=self.nbytes(i),
        )

    def __iter__(self) -> Iterator[TensorInfo]:
        return (self[i] for i in range(len(self)))

    def nbytes(self, i: int) -> int:
        """Return the size of tensor ``i`` in bytes."""
        return math.prod(self.shapes[i]) * BITS[self.dtypes[i]] // 8

    def has_files_of(self, other: Manifest) -> bool:
        """Return whether both have the same files, by name, size and, if both know it, digest."""
        return len(self.shards) == len(other.shards) and all(
            (a.name, a.size) == (b.name, b.size) and (None in (a.sha256, b.sha256) or a.sha256 == b.sha256)
            for a, b in zip(self.shards, other.shards, strict=True)
        )

    def tensors_equal(self, other: Manifest) -> bool:
        """Return whether both have the same tensors at the same offsets, in the same number of files."""
        return len(self.shards) == len(other.shards) and all(
            len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
            for a, b in zip(self._columns, other._columns, strict=True)
        )

    def only(self, shard: int) -> Manifest:
        """Return the manifest of one of the files."""
        part = self.take(self.tensors_of(shard))

        return replace(part, shards=(self.shards[shard],), shard_ids=array("I", [0]) * len(part))

    def tensors_of(self, shard: int) -> range:
        """Return the positions of the tensors in one of the files."""
        return range(bisect_left(self.shard_ids, shard), bisect_right(self.shard_ids, shard))

    def take(self, positions: Sequence[int]) -> Manifest:
        """Return the manifest of the tensors at ``positions``, in their order, with the same files."""
        return Manifest(
            format=self.format,
            shards=self.shards,
            names=[self.names[i] for i in positions],
            dtypes=[self.dtypes[i] for i in positions],
            shapes=[self.shapes[i] for i in positions],
            shard_ids=array("I", [self.shard_ids[i] for i in positions]),
            offsets=array("q", [self.offsets[i] for i in positions]),
        )

    @property
    def _columns(self) -> tuple[Sequence[object], ...]:
        return self.names, self.dtypes, self.shapes, self.shard_ids, self.offsets

    @property
    def total_bytes(self) -> int:
        """The size of all tensors in bytes, without headers."""
        return sum(map(self.nbytes, range(len(self))))

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def dtype_counts(self) -> dict[str, int]:
        """The number of elements of each dtype, the most frequent first."""
        counts: Counter[str] = Counter()
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            counts[dtype] += math.prod(shape)

        return dict(counts.most_common())
