"""Digests of tensors, in blocks, so that a part of a tensor can be vouched for as well as all of it. Pure.

A digest of a whole tensor says nothing of the slice that one rank of a tensor-parallel gang reads. Therefore a tensor
is cut along one dim into up to eight blocks, each with a digest of its own: a shard of a gang of 1, 2, 4 or 8 is whole
blocks. All of it is BLAKE3 in its key derivation mode (``derive_key``), with 32 bytes of output and a context string
for each level, so that no digest of one level is ever one of another.

The definition, complete enough to be written again elsewhere:

1. *Blocks.* A tensor has a dtype ``D``, a shape ``S``, and a *dim* ``d``, the one that tensor parallelism shards (0
   where nobody says otherwise). It is cut along ``d`` into ``k`` equal blocks. ``k`` is 1 for a scalar and for a tensor
   without elements; else it is the greatest common divisor of ``S[d]`` and 8, halved until a block's part of one row
   (2.) is a whole number of bytes, which only dtypes of less than a byte need.
2. *Rows.* The tensor's bytes, contiguous and row-major, are seen as ``rows × k × segment`` bytes: ``rows`` is the
   product of the sizes before ``d``, and the bytes of block ``b`` are those of ``[:, b, :]``. Where ``k`` is 1,
   ``rows`` is 1 as well, whatever ``d`` is, and ``segment`` is all of the tensor.
3. *Leaves.* Rows are taken in groups of ``g``: the largest power of two such that ``g · k · segment`` is at most
   :data:`LEAF`, or 1 where not even one row is; the last group may be smaller. What a group holds of a block, row after
   row, is cut into pieces of :data:`LEAF` bytes, the last of which may be shorter: these are the block's leaves, in the
   order of groups and then of pieces. A tensor without elements has none.
4. *Digest of a leaf*: of its bytes, in the context :data:`LEAF_CONTEXT`.
5. *Digest of a block*: of the digests of its leaves, one behind the other (also of a single one, also of none), in the
   context :data:`BLOCK_CONTEXT`.
6. *Digest of the tensor*, the *root*: in the context :data:`ROOT_CONTEXT`, of a line of ASCII that ends in a newline,
   and behind it the digests of all blocks. The line is ``D S d k``, with one space between: ``D`` by its name in
   :data:`~lading.formats.manifest.BITS`, the sizes of ``S`` in decimal with commas between (nothing for a scalar): for
   example ``BF16 1024,4096 1 8``.

So tensors of equal dtype, shape and bytes have equal roots if they were cut along the same dim, in whatever file they
are, and this is what SQL compares. Any bit that changes, changes the root and the digest of the one block that holds
it. Rows in powers of two keep most leaves at lengths for which BLAKE3 is fastest.

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
"""Bytes that are hashed at once, at most: they have to be still in the cache in which they were read."""

MAX_BLOCKS = 8

SIZE = 32
"""Bytes of a digest."""

LEAF_CONTEXT = "lading tensor digest 1, leaf"
BLOCK_CONTEXT = "lading tensor digest 1, block"
ROOT_CONTEXT = "lading tensor digest 1, root"


class Cut(NamedTuple):
    """The bytes of a tensor as ``rows × blocks × segment``: block ``b`` is ``[:, b, :]``."""

    rows: int
    blocks: int
    segment: int
    """Bytes of one block in one row."""

    @property
    def nbytes(self) -> int:
        return self.rows * self.blocks * self.segment

    @property
    def group(self) -> int:
        """Rows that are hashed together."""
        fitting = LEAF // max(1, self.blocks * self.segment)

        return 1 << (fitting.bit_length() - 1) if fitting else 1

    @property
    def leaves(self) -> int:
        """Leaves of each block."""
        # Only a row that is larger than a leaf has segments that may be, and it is a group of its own.
        return -(-self.rows // self.group) * -(-self.segment // LEAF)


def cut(dtype: str, shape: Sequence[int], dim: int) -> Cut:
    """How a tensor is cut into blocks along ``dim``.

    :param dim: of the tensor; 0 for a scalar.

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
    """The digest of the bytes of a leaf. Other threads run meanwhile, if there are many."""
    return blake3(data, derive_key_context=LEAF_CONTEXT).digest()


def block_digest(leaves: bytes | bytearray | memoryview) -> bytes:
    """The digest of a block, from the digests of its leaves, one behind the other."""
    return blake3(leaves, derive_key_context=BLOCK_CONTEXT).digest()


def root_digest(dtype: str, shape: Sequence[int], dim: int, blocks: bytes | bytearray | memoryview) -> str:
    """The digest of a tensor, in hexadecimal, from the digests of its blocks, one behind the other."""
    header = f"{dtype} {','.join(map(str, shape))} {dim} {len(blocks) // SIZE}\n"

    return blake3(header.encode("ascii"), derive_key_context=ROOT_CONTEXT).update(blocks).hexdigest()


EMPTY_BLOCK = block_digest(b"")
"""The one block of a tensor without elements."""


# --- boxes -----------------------------------------------------------------------------------------------------------


# --- of a checkpoint -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """The digests of one tensor."""

    dim: int
    """The dim along which it is cut into blocks."""
    blocks: bytes
    """The digests of all blocks, :data:`SIZE` bytes each."""
    root: str
    """Of the whole tensor, in hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Digests:
    """The digests of the tensors of a manifest, in columns, as far as they are known.

    A million blocks are 32 MB, and two of these are compared as fast as memory is.
    """

    dims: array[int]
    """For each tensor the dim along which it is cut; type code ``b``."""
    starts: array[int]
    """For each tensor its first block, and the number of all blocks behind the last; type code ``q``."""
    blocks: bytes
    """The digests of all blocks, :data:`SIZE` bytes each; zeros where not known."""
    known: bytes
    """For each tensor the blocks whose digest is known: bit ``b`` stands for block ``b``."""

    def __len__(self) -> int:
        """The number of tensors."""
        return len(self.dims)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Digests):
            return NotImplemented

        # By their bytes, as arrays are compared number by number.
        return (
            self.known == other.known
            and self.dims.tobytes() == other.dims.tobytes()
            and self.starts.tobytes() == other.starts.tobytes()
            and self.blocks == other.blocks
        )

    __hash__ = None  # type: ignore[assignment]

    def is_complete(self, i: int) -> bool:
        """Whether all blocks of tensor ``i`` are known."""
        return self.known[i] == (1 << (self.starts[i + 1] - self.starts[i])) - 1

    def of(self, manifest: Manifest, i: int) -> TensorDigest | None:
        """The digests of tensor ``i``; ``None`` unless all are known.

        :param manifest: whose tensors these are the digests of.
        """
        if not self.is_complete(i):
            return None

        blocks = self.blocks[self.starts[i] * SIZE : self.starts[i + 1] * SIZE]
        root = root_digest(manifest.dtypes[i], manifest.shapes[i], self.dims[i], blocks)

        return TensorDigest(dim=self.dims[i], blocks=blocks, root=root)

    def iter(self, manifest: Manifest) -> Iterator[TensorDigest | None]:
        """What :meth:`of` gives, for one tensor after the other."""
        return (self.of(manifest, i) for i in range(len(self)))


def starts_of(manifest: Manifest, dims: Sequence[int]) -> array[int]:
    """The column ``starts`` of the digests of a manifest.

    :param dims: for each tensor the dim along which it is cut.

    :raises ValueError: a tensor has no such dim, or there are not as many dims as tensors.
    """
    starts = array("q", [0])
    end = 0
    for dtype, shape, dim in zip(manifest.dtypes, manifest.shapes, dims, strict=True):
        end += cut(dtype, shape, dim).blocks
        starts.append(end)

    return starts


def default_dims(manifest: Manifest) -> array[int]:
    """Dim 0 for every tensor."""
    return array("b", [0]) * len(manifest)


def recorded(manifest: Manifest, rows: Iterable[tuple[int, bytes] | None]) -> Digests:
    """The digests of a manifest's tensors that were recorded as (dim, blocks).

    :param rows: one for each tensor, in the manifest's order; ``None`` where nothing is known of it.

    :raises ValueError: a row that cannot be of its tensor, or not as many rows as tensors.
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


def joined(a: Digests, b: Digests) -> Digests:
    """The digests of two manifests, one behind the other."""
    return Digests(
        dims=a.dims + b.dims,
        starts=a.starts + array("q", [a.starts[-1] + start for start in b.starts[1:]]),
        blocks=a.blocks + b.blocks,
        known=a.known + b.known,
    )


def differences(expected: Digests, found: Digests) -> list[tuple[int, tuple[int, ...]]]:
    """The tensors that differ, and which of their blocks do: (position in the manifest, blocks), ascending.

    Blocks that only one side knows are passed over.

    :raises ValueError: the two are not of the same manifest, or a tensor that both know is cut along different dims.
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
