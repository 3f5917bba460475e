"""The hashing of leaves while their bytes are in a core's cache, by the thread that put them there.

Threads hash the bytes of a tensor's blocks in *atoms*: an atom is the shortest run of bytes that can be hashed alone.
That is a group of rows, with a leaf for each block, or, if one row is larger than a leaf, a leaf.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lading.formats.digests import LEAF, SIZE, block_digest, leaf_digest

_WIDE = tuple(np.dtype(name) for name in ("u8", "u4", "u2"))
"""The dtypes for copies of bytes; the widest that fits has the fewest items."""


class Job(NamedTuple):
    """Consecutive blocks of a tensor, or one row of them, that are one run of bytes in a file or in memory."""

    begin: int
    """The start of the run."""
    rows: int
    blocks: int
    segment: int
    """The bytes of a row of a block; the run has ``rows × blocks × segment`` bytes."""
    group: int
    """The rows of an atom; 0 if rows are larger than a leaf, so that atoms are pieces of segments."""
    leaves: int
    """The number of leaves of each block."""
    leaf: int
    """The first leaf in this run."""
    slot: int
    """The slot of the first leaf of the first block; those of a block are consecutive."""

    @property
    def end(self) -> int:
        """The end of the run."""
        return self.begin + self.rows * self.blocks * self.segment

    def atom(self, at: int) -> tuple[int, int]:
        """Return the start and the end of the atom with the byte at ``at``."""
        within = at - self.begin
        if self.group:
            size = self.group * self.blocks * self.segment
            begin = within - within % size
            return self.begin + begin, min(self.begin + begin + size, self.end)

        segment = within - within % self.segment
        begin = within - (within - segment) % LEAF
        return self.begin + begin, self.begin + min(begin + LEAF, segment + self.segment)


class Part(NamedTuple):
    """Whole atoms of a job."""

    job: Job
    source: int
    """The source of the job: a read, an entry of the plan's rows, or a mapping."""
    begin: int
    end: int


class LeafHasher:
    """The hasher of one thread.

    :param slots: the digests, which all threads share.
    """

    def __init__(self, slots: bytearray) -> None:
        self.hashed = 0
        """The bytes hashed so far."""
        self._slots = slots
        self._gathered = bytearray()

    def hash(self, parts: Iterable[Part], begin: int, memory: memoryview) -> None:
        """Hash parts of ``memory``, which begins at the offset ``begin``."""
        for part in parts:
            job, atoms = part.job, memory[part.begin - begin : part.end - begin]
            if job.group:
                self._groups(job, part.begin - job.begin, atoms)
            else:
                self._pieces(job, part.begin - job.begin, atoms)
            self.hashed += len(atoms)

    def _groups(self, job: Job, begin: int, memory: memoryview) -> None:
        row = job.blocks * job.segment
        size = job.group * row
        for at in range(0, len(memory), size):
            atom = memory[at : at + size]
            each = len(atom) // row * job.segment
            if job.blocks > 1 and each > job.segment:
                atom = self._gather(atom, job)
            for b in range(job.blocks):
                self._put(job, b, (begin + at) // size, leaf_digest(atom[b * each : (b + 1) * each]))

    def _pieces(self, job: Job, begin: int, memory: memoryview) -> None:
        pieces = -(-job.segment // LEAF)
        at = 0
        while at < len(memory):
            row, within = divmod(begin + at, job.blocks * job.segment)
            b, within = divmod(within, job.segment)
            size = min(LEAF, job.segment - within)
            self._put(job, b, row * pieces + within // LEAF, leaf_digest(memory[at : at + size]))
            at += size

    def _put(self, job: Job, block: int, leaf: int, digest: bytes) -> None:
        if job.leaves == 1:
            digest = block_digest(digest)
        at = (job.slot + block * job.leaves + job.leaf + leaf) * SIZE
        self._slots[at : at + SIZE] = digest

    def _gather(self, atom: memoryview, job: Job) -> memoryview:
        """Return the same rows, but block by block."""
        if not self._gathered:
            self._gathered = bytearray(LEAF)

        # Wider items make fewer copies.
        address = np.frombuffer(atom, np.uint8).ctypes.data
        dtype = next((d for d in _WIDE if not (job.segment | address) % d.itemsize), np.dtype("u1"))
        rows = np.frombuffer(atom, dtype).reshape(-1, job.blocks, job.segment // dtype.itemsize)
        target = np.frombuffer(self._gathered, dtype, rows.size).reshape(job.blocks, rows.shape[0], -1)
        target[:] = rows.transpose(1, 0, 2)

        return memoryview(self._gathered)[: len(atom)]
