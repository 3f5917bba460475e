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
from functools import cached_property
from operator import gt
from typing import Literal, NamedTuple

from lading.errors import InternalError
from lading.system.display import counted, human_bytes, human_count, representation

Format = Literal["safetensors", "torch"]
"""A supported format of a file."""

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of each dtype, by the names of the safetensors format.

Source: the safetensors format specification, version 0.8 of its reference implementation.
"""

FLOAT_NAMES: Mapping[str, str] = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "fp64": "F64", "fp32": "F32", "bf16": "BF16", "fp16": "F16",
}  # fmt: skip
"""The dtypes of plain weights, by the names that people give them: torch's, and the short ones."""

FLOATS = frozenset(FLOAT_NAMES.values())
"""The dtypes of plain weights, between which a load may cast."""

SCALED = frozenset({"F8_E4M3", "F8_E5M2"})
"""The dtypes of weights that may have a scale for each block."""

BLOCK = 128
"""The rows and the columns of the blocks of a matrix that have one scale."""

SCALE_SUFFIX = "_scale_inv"
"""The end of the name of the tensor with the scales of a weight, behind the name of that weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a checkpoint."""

    name: str
    """The name within the checkpoint: a plain file name, or a relative path with forward slashes."""
    size: int
    """The size in bytes, the header included."""
    sha256: str | None = None
    """The SHA-256 of the whole file in hexadecimal, if it is known."""
    validator: str | None = None
    """The HTTP validator that the source had for the file when its header was read, if it publishes no digest."""


class Piece(NamedTuple):
    """A part of a tensor that lies contiguous and row-major in one file, as a rank saved it."""

    starts: tuple[int, ...]
    """The index of its first element in the tensor, one number for each dim."""
    shape: tuple[int, ...]
    shard: int
    """The position of its file in the manifest's ``shards``."""
    offset: int
    """The byte of that file at which it begins."""


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

    A tensor of one piece, which almost all are, has one number in each column. One of several pieces has those of its
    first piece there, and all of them in ``pieces``.

    :raises InternalError: columns of different lengths, a shard number that does not exist, or pieces that do not make
        their tensor.
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
    pieces: Mapping[int, tuple[Piece, ...]] = field(default_factory=dict)
    """The pieces of the tensors that have several, by the position of the tensor. They do not overlap."""

    def __post_init__(self) -> None:
        lengths = set(map(len, self._columns))
        if len(lengths) != 1:
            raise InternalError(f"the columns of a manifest must be of equal length, but are of lengths {lengths}")
        if len(self.shard_ids) and max(self.shard_ids) >= len(self.shards):
            raise InternalError(f"a manifest of {len(self.shards)} shards refers to shard {max(self.shard_ids)}")
        for tensor, pieces in self.pieces.items():
            self._check_pieces(tensor, pieces)

    def _check_pieces(self, tensor: int, pieces: tuple[Piece, ...]) -> None:
        if not 0 <= tensor < len(self):
            raise InternalError(f"a manifest of {len(self)} tensors has pieces of tensor {tensor}")

        name, shape = self.names[tensor], self.shapes[tensor]
        for piece in pieces:
            ends = [start + size for start, size in zip(piece.starts, piece.shape, strict=True)]
            if len(ends) != len(shape) or min(piece.starts, default=0) < 0 or any(map(gt, ends, shape)):
                raise InternalError(f"a piece of {name!r}, {piece}, does not lie in its shape {shape}")
            if not 0 <= piece.shard < len(self.shards):
                raise InternalError(f"a manifest of {len(self.shards)} shards refers to shard {piece.shard}")
        first = (self.shard_ids[tensor], self.offsets[tensor])
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape) or pieces[0][2:] != first:
            raise InternalError(f"the pieces of {name!r} are not all of its shape {shape}, beginning at {first}")

    def __repr__(self) -> str:
        return representation(
            self,
            self.format,
            counted(len(self), "tensor"),
            f"{human_count(self.parameters)} parameters",
            f"{human_bytes(self.total_bytes)} in {counted(len(self.shards), 'file')}",
        )

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
        """Return whether both hold the same tensors at the same places of as many files."""
        return (
            len(self.shards) == len(other.shards)
            and self.pieces == other.pieces
            and all(
                len(a) == len(b) and all(x == y for x, y in zip(a, b, strict=True))
                for a, b in zip(self._columns, other._columns, strict=True)
            )
        )

    def only(self, shard: int) -> Manifest:
        """Return the manifest of one of the files, in which each tensor is of one piece."""
        part = self.take(self.tensors_of(shard))

        return replace(part, shards=(self.shards[shard],), shard_ids=array("I", [0]) * len(part))

    def tensors_of(self, shard: int) -> range:
        """Return the positions of the tensors in one of the files; of those in pieces, the ones that begin there."""
        return range(bisect_left(self.shard_ids, shard), bisect_right(self.shard_ids, shard))

    def tensors_in(self, shard: int) -> Sequence[int]:
        """Return the positions of the tensors with bytes in one of the files."""
        begin = self.tensors_of(shard)
        others = [i for i, pieces in self.pieces.items() if i not in begin and any(p.shard == shard for p in pieces)]

        return sorted([*begin, *others]) if others else begin

    def flat(self) -> Manifest:
        """Return the manifest with the same bytes in which each piece is a tensor of its own, of the same name."""
        if not self.pieces:
            return self

        rows = [
            (piece.shard, piece.offset, i, piece.shape)
            for i in range(len(self))
            for piece in self.pieces.get(i) or (Piece((), self.shapes[i], self.shard_ids[i], self.offsets[i]),)
        ]
        rows.sort()

        return Manifest(
            format=self.format,
            shards=self.shards,
            names=[self.names[i] for _, _, i, _ in rows],
            dtypes=[self.dtypes[i] for _, _, i, _ in rows],
            shapes=[shape for *_, shape in rows],
            shard_ids=array("I", [shard for shard, *_ in rows]),
            offsets=array("q", [offset for _, offset, *_ in rows]),
        )

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
            pieces={at: self.pieces[i] for at, i in enumerate(positions) if i in self.pieces} if self.pieces else {},
        )

    @cached_property
    def scales(self) -> Mapping[int, int]:
        """The positions of tensors whose values are products with a scale for each block, and of their scales."""
        if SCALED.isdisjoint(self.dtypes):
            return {}
        found = {name.removesuffix(SCALE_SUFFIX): i for i, name in enumerate(self.names) if name.endswith(SCALE_SUFFIX)}
        columns = zip(self.names, self.dtypes, self.shapes, strict=True)

        return {
            i: found[name]
            for i, (name, dtype, shape) in enumerate(columns)
            if dtype in SCALED and len(shape) > 1 and name in found
        }

    @cached_property
    def plain_dtype(self) -> str | None:
        """The dtype of most elements of plain weights, scales aside; ``None`` without such weights."""
        scales = set(self.scales.values())
        elements: Counter[str] = Counter()
        for i, (dtype, shape) in enumerate(zip(self.dtypes, self.shapes, strict=True)):
            if dtype in FLOATS and i not in scales:
                elements[dtype] += math.prod(shape)

        return max(sorted(elements), key=elements.__getitem__) if elements.total() else None

    def value_dtype(self, i: int) -> str:
        """Return the dtype of the values of tensor ``i``: of those with scales, the one of most plain weights."""
        return (self.plain_dtype or "F32") if i in self.scales else self.dtypes[i]

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


def by_layer(names: Sequence[str]) -> dict[str, list[int]]:
    """Return the positions of tensors by their layer: each stack of layers in order, and last those of no layer.

    The name of a layer is that of its tensors up to the first number: ``model.layers.20``; empty for those of none.
    Stacks are in the order of their first tensors.
    """
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        found.setdefault(_layer_of(name), []).append(i)

    stacks = {stack: n for n, stack in enumerate(dict.fromkeys(layer.rpartition(".")[0] for layer in found))}

    def place(layer: str) -> tuple[bool, int, int]:
        stack, _, number = layer.rpartition(".")

        return not layer, stacks[stack], int(number or 0)

    return {layer: found[layer] for layer in sorted(found, key=place)}


def _layer_of(name: str) -> str:
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdecimal() and len(part) < 10:
            return ".".join(parts[: i + 1])

    return ""
