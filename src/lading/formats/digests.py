"""Digests of tensors by blocks, so that a slice of a tensor can be verified without the rest. Pure.

A digest of a whole tensor cannot verify the slice that one rank of a tensor-parallel gang reads. Therefore a tensor is
cut along one dim into up to eight blocks, each with its own digest: the shard of a rank in a gang of 1, 2, 4 or 8
consists of whole blocks. The hash function is BLAKE3 in its key derivation mode (``derive_key``), with 32 bytes of
output and a different context string for each level, so that digests of different levels never coincide.

The complete definition, sufficient for another implementation:

1. *Blocks.* A tensor has a dtype ``D``, a shape ``S``, and a *dim* ``d``, the one that tensor parallelism shards
   (default: 0). It is cut along ``d`` into ``k`` equal blocks. ``k`` is 1 for a scalar and for a tensor without
   elements; else it is the greatest common divisor of ``S[d]`` and 8, halved until a block's part of one row (2.) is a
   whole number of bytes, which only dtypes of less than a byte need.
2. *Rows.* The tensor's bytes, contiguous and row-major, are viewed as ``rows × k × segment`` bytes: ``rows`` is the
   product of the sizes before ``d``, and the bytes of block ``b`` are those of ``[:, b, :]``. If ``k`` is 1, ``rows``
   is 1, too, whatever ``d`` is, and ``segment`` is the whole tensor.
3. *Leaves.* Rows form groups of ``g``: the largest power of two such that ``g · k · segment`` is at most :data:`LEAF`,
   or 1 if a single row is larger; the last group may be smaller. The bytes of a block in a group, row after row, are
   cut into pieces of :data:`LEAF` bytes (the last one may be shorter): these are the leaves of the block, ordered
   by group and then by piece. A tensor without elements has no leaves.
4. *Digest of a leaf*: the hash of its bytes, in the context :data:`LEAF_CONTEXT`.
5. *Digest of a block*: the hash of the concatenated digests of its leaves (even if there is one, or none), in the
   context :data:`BLOCK_CONTEXT`.
6. *Digest of the tensor*, the *root*: the hash, in the context :data:`ROOT_CONTEXT`, of a line of ASCII that ends in a
   newline, followed by the digests of all blocks. The line is ``D S d k``, separated by single spaces: ``D`` by its
   name in :data:`~lading.formats.manifest.BITS`, the sizes of ``S`` in decimal, separated by commas (nothing for a
   scalar): for example ``BF16 1024,4096 1 8``.

Tensors of equal dtype, shape and bytes thus have equal roots if they are cut along the same dim, in whatever file they
are, and SQL can compare them. A change of any bit changes the root and the digest of the block that holds it. Groups of
a power of two rows keep most leaves at lengths for which BLAKE3 is fastest.

Source of the hash function: https://github.com/BLAKE3-team/BLAKE3-specs.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from blake3 import blake3

from lading.formats.manifest import BITS, Manifest

LEAF = 1 << 20
"""The most bytes of a leaf: few enough to be hashed while they are still in the cache."""

MAX_BLOCKS = 8

SIZE = 32
"""The size of a digest in bytes."""

LEAF_CONTEXT = "lading tensor digest 1, leaf"
BLOCK_CONTEXT = "lading tensor digest 1, block"
ROOT_CONTEXT = "lading tensor digest 1, root"


class Cut(NamedTuple):
    """The bytes of a tensor as ``rows × blocks × segment``: block ``b`` is ``[:, b, :]``."""

    rows: int
    blocks: int
    segment: int
    """The bytes of one block in one row."""

    @property
    def nbytes(self) -> int:
        return self.rows * self.blocks * self.segment

    @property
    def group(self) -> int:
        """The number of rows in a group."""
        fitting = LEAF // max(1, self.blocks * self.segment)

        return 1 << (fitting.bit_length() - 1) if fitting else 1

    @property
    def leaves(self) -> int:
        """The number of leaves of each block."""
        # A segment can only be larger than a leaf if its row is, and then the row is a group of its own.
        return -(-self.rows // self.group) * -(-self.segment // LEAF)


def cut(dtype: str, shape: Sequence[int], dim: int) -> Cut:
    """Return how a tensor is cut into blocks along ``dim``.

    :param dim: a dim of the tensor; 0 for a scalar.

    :raises ValueError: the tensor has no such dim.
    """
    if not 0 <= dim < max(1, len(shape)):
        raise ValueError(f"a tensor of shape {tuple(shape)} has no dim {dim} along which it could be cut into blocks")

    bits = math.prod(shape) * BITS[dtype]
    if not shape or not bits:
        return Cut(1, 1, bits // 8)

    rows, blocks = math.prod(shape[:dim]), math.gcd(shape[dim], MAX_BLOCKS)
    while blocks > 1 and bits // (rows * blocks) % 8:
        blocks //= 2

    return Cut(rows, blocks, bits // (8 * rows * blocks)) if blocks > 1 else Cut(1, 1, bits // 8)


def leaf_digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digest of a leaf with the bytes ``data``; large ones are hashed without the GIL."""
    return blake3(data, derive_key_context=LEAF_CONTEXT).digest()


def block_digest(leaves: bytes | bytearray | memoryview) -> bytes:
    """Return the digest of a block from the concatenated digests of its leaves."""
    return blake3(leaves, derive_key_context=BLOCK_CONTEXT).digest()


def root_digest(dtype: str, shape: Sequence[int], dim: int, blocks: bytes | bytearray | memoryview) -> str:
    """Return the digest of a tensor, in hexadecimal, from the concatenated digests of its blocks."""
    header = f"{dtype} {','.join(map(str, shape))} {dim} {len(blocks) // SIZE}\n"

    return blake3(header.encode("ascii"), derive_key_context=ROOT_CONTEXT).update(blocks).hexdigest()


EMPTY_BLOCK = block_digest(b"")
"""The digest of the only block of a tensor without elements."""


# --- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """The digests of one tensor."""

    dim: int
    """The dim along which the tensor is cut into blocks."""
    blocks: bytes
    """The digests of all blocks, :data:`SIZE` bytes each."""
    root: str
    """The digest of the whole tensor, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Digests:
    """The known digests of the tensors of a manifest, in columns.

    A million blocks take 32 MB, and are compared at the speed of memory.
    """

    dims: array[int]
    """The dim along which each tensor is cut; type code ``b``."""
    starts: array[int]
    """The position of each tensor's first block, followed by the number of all blocks; type code ``q``."""
    blocks: bytes
    """The digests of all blocks, :data:`SIZE` bytes each; zeros if unknown."""
    known: bytes
    """One byte per tensor, in which bit ``b`` is set if the digest of block ``b`` is known."""

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.dims)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digests):
            return NotImplemented

        # Comparing bytes is fast; arrays are compared item by item.
        return (
            self.known == other.known
            and self.dims.tobytes() == other.dims.tobytes()
            and self.starts.tobytes() == other.starts.tobytes()
            and self.blocks == other.blocks
        )

    __hash__ = None  # type: ignore[assignment]

    def is_complete(self, i: int) -> bool:
        """Return whether the digests of all blocks of tensor ``i`` are known."""
        return self.known[i] == (1 << (self.starts[i + 1] - self.starts[i])) - 1

    @property
    def complete(self) -> bool:
        """``True`` if the digests of all blocks of all tensors are known."""
        return all(map(self.is_complete, range(len(self))))

    def of(self, manifest: Manifest, i: int) -> TensorDigest | None:
        """Return the digests of tensor ``i``; ``None`` unless all are known.

        :param manifest: the manifest of the tensors.
        """
        if not self.is_complete(i):
            return None

        blocks = self.blocks[self.starts[i] * SIZE : self.starts[i + 1] * SIZE]
        root = root_digest(manifest.dtypes[i], manifest.shapes[i], self.dims[i], blocks)

        return TensorDigest(dim=self.dims[i], blocks=blocks, root=root)

    def iter(self, manifest: Manifest) -> Iterator[TensorDigest | None]:
        """Yield the result of :meth:`of` for each tensor."""
        return (self.of(manifest, i) for i in range(len(self)))


def starts_of(manifest: Manifest, dims: Sequence[int]) -> array[int]:
    """Return the column ``starts`` of the digests of a manifest.

    :param dims: the dim along which each tensor is cut.

    :raises ValueError: a tensor has no such dim, or the numbers of dims and tensors differ.
    """
    starts = array("q", [0])
    end = 0
    for dtype, shape, dim in zip(manifest.dtypes, manifest.shapes, dims, strict=True):
        end += cut(dtype, shape, dim).blocks
        starts.append(end)

    return starts


def default_dims(manifest: Manifest) -> array[int]:
    """Return dim 0 for each tensor."""
    return array("b", [0]) * len(manifest)


def unknown(manifest: Manifest, dims: Sequence[int]) -> Digests:
    """Return the digests of a manifest's tensors before any block of them is known.

    :param dims: the dim along which each tensor is cut.

    :raises ValueError: a tensor has no such dim, or the numbers of dims and tensors differ.
    """
    starts = starts_of(manifest, dims)

    return Digests(dims=array("b", dims), starts=starts, blocks=bytes(starts[-1] * SIZE), known=bytes(len(dims)))


def recorded(manifest: Manifest, rows: Iterable[tuple[int, bytes] | None]) -> Digests:
    """Return the digests of a manifest's tensors from records of (dim, blocks).

    :param rows: one record for each tensor, in the order of the manifest; ``None`` if its digests are unknown.

    :raises ValueError: a record does not fit its tensor, or the numbers of records and tensors differ.
    """
    found = list(rows)
    dims = array("b", [0 if row is None else row[0] for row in found])
    starts = starts_of(manifest, dims)
    blocks, known = bytearray(starts[-1] * SIZE), bytearray(len(found))

    for i, row in enumerate(found):
        if row is None:
            continue
        count = starts[i + 1] - starts[i]
        if len(row[1]) != count * SIZE:
            raise ValueError(
                f"the digests of tensor {manifest.names[i]!r} are expected to be {count * SIZE} bytes for {count} "
                f"blocks along dim {row[0]}, but are {len(row[1])}"
            )
        blocks[starts[i] * SIZE : starts[i + 1] * SIZE] = row[1]
        known[i] = (1 << count) - 1

    return Digests(dims=dims, starts=starts, blocks=bytes(blocks), known=bytes(known))


def differences(expected: Digests, found: Digests) -> list[tuple[int, tuple[int, ...]]]:
    """Return the positions of tensors that differ, each with its blocks that do, in ascending order.

    Blocks that only one side knows are skipped.

    :raises ValueError: the numbers of tensors differ, or a tensor that both know is cut along different dims.
    """
    if len(expected) != len(found):
        raise ValueError(f"digests of {len(expected)} tensors cannot be compared with those of {len(found)}")
    if expected == found:
        return []

    result = []
    for i, (one, other) in enumerate(zip(expected.known, found.known, strict=True)):
        both = one & other
        if not both:
            continue

        mine, its = expected.starts[i], found.starts[i]
        count = expected.starts[i + 1] - mine
        if expected.dims[i] != found.dims[i] or count != found.starts[i + 1] - its:
            raise ValueError(
                f"the digests of tensor {i} cannot be compared: one tensor is cut along dim {expected.dims[i]}, the "
                f"other along dim {found.dims[i]}"
            )

        if expected.blocks[mine * SIZE : (mine + count) * SIZE] == found.blocks[its * SIZE : (its + count) * SIZE]:
            continue
        different = tuple(
            b
            for b in range(count)
            if both >> b & 1 and _block(expected.blocks, mine + b) != _block(found.blocks, its + b)
        )
        if different:
            result.append((i, different))

    return result


def _block(blocks: bytes, i: int) -> bytes:
    return blocks[i * SIZE : (i + 1) * SIZE]
