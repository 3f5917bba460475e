"""What a checkpoint holds, tensor by tensor: names, dtypes, shapes and the place of each in its file.

A manifest is kept in columns, one entry per tensor in each: a checkpoint of 100,000 tensors would cost 120 MB as
objects. It is the one form in which every checkpoint format reaches the planner and the catalog.
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
"""Bits per element of each dtype, by the names that the safetensors format gives them.

Source: the safetensors format specification, version 0.8 of its reference implementation.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a checkpoint."""

    name: str
    """Its name within the checkpoint: a plain file name, or a relative path with forward slashes."""
    size: int
    """Bytes in all, the header included."""
    sha256: str | None = None
    """Of the whole file, in hexadecimal, where it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One row of a manifest, for those who look at one tensor rather than at all of them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    offset: int
    """Where its bytes begin in the shard's file, counted from the beginning of that file."""
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The tensors of a checkpoint in columns of equal length, in the order (shard, offset).

    :raises InternalError: columns of different lengths, or a shard number that does not exist.
    """

    format: str
    """``"safetensors"`` or ``"torch"``."""
    shards: tuple[Shard, ...]
    names: Sequence[str]
    """Unique within the checkpoint."""
    dtypes: Sequence[str]
    """Keys of :data:`BITS`."""
    shapes: Sequence[tuple[int, ...]]
    shard_ids: array[int]
    """Positions in ``shards``; type code ``I``."""
    offsets: array[int]
    """Where the bytes of each tensor begin, counted from the beginning of the shard's file; type code ``q``."""
    index_name: str | None = None
    """The file that says which shards belong to the checkpoint, where there is one."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The free-form ``__metadata__`` of the first shard."""

    def __post_init__(self) -> None:
        lengths = set(map(len, self._columns))
        if len(lengths) != 1:
            raise InternalError(f"the columns of a manifest must be of equal length, but are of lengths {lengths}")
        if len(self.shard_ids) and max(self.shard_ids) >= len(self.shards):
            raise InternalError(f"a manifest of {len(self.shards)} shards refers to shard {max(self.shard_ids)}")

    def __len__(self) -> int:
        """The number of tensors."""
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
        """The bytes of tensor ``i``."""
        return math.prod(self.shapes[i]) * BITS[self.dtypes[i]] // 8

    def has_files_of(self, other: Manifest) -> bool:
        """Whether both are of the same files, as far as names, sizes and the digests that both know tell."""
        return len(self.shards) == len(other.shards) and all(
            (a.name, a.size) == (b.name, b.size) and (None in (a.sha256, b.sha256) or a.sha256 == b.sha256)
            for a, b in zip(self.shards, other.shards, strict=True)
        )

    def tensors_equal(self, other: Manifest) -> bool:
        """Whether both hold the same tensors at the same places of as many files."""
        return len(self.shards) == len(other.shards) and all(
            len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
            for a, b in zip(self._columns, other._columns, strict=True)
        )

    def only(self, shard: int) -> Manifest:
        """The manifest of one of the files."""
        part = self.take(self.tensors_of(shard))

        return replace(part, shards=(self.shards[shard],), shard_ids=array("I", [0]) * len(part))

    def tensors_of(self, shard: int) -> range:
        """The positions of the tensors in one of the files."""
        return range(bisect_left(self.shard_ids, shard), bisect_right(self.shard_ids, shard))

    def take(self, positions: Sequence[int]) -> Manifest:
        """The manifest of some of the tensors, in their order; of the same files."""
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
        """The bytes of all tensors, headers apart."""
        return sum(map(self.nbytes, range(len(self))))

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors."""
        return sum(map(math.prod, self.shapes))

    @property
    def dtype_counts(self) -> dict[str, int]:
        """Elements per dtype, the most frequent first."""
        counts: Counter[str] = Counter()
        for dtype, shape in zip(self.dtypes, self.shapes, strict=True):
            counts[dtype] += math.prod(shape)

        return dict(counts.most_common())
