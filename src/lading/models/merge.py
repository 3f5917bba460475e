"""The merge of LoRA adapters into weights: W + s·BA for the box of each weight that this rank owns.

Source: PEFT 0.21 (``peft/tuners/lora/layer.py``) for the order of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lading.checkpoints.checkpoint import Checkpoint
from lading.models.adapters import Change, Factors
from lading.models.fit import Match
from lading.models.tensors import read_tensors
from lading.models.ties import are_same, tied_mismatch_error
from lading.planning.box import Box
from lading.planning.composition import Source, pieces, tensors_of
from lading.transfer.drive import busy, cores, drive
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES

_SLAB = 1 << 20
"""The most elements of a weight to merge at a time, so that the product stays in the cache."""

_BATCH = 64 << 20
"""The most bytes of factors to read together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """A merge whose files are on this machine."""

    match: Match
    base: Checkpoint
    adapters: Sequence[Checkpoint]

    def merge_into(self, tensors: Mapping[str, Tensor], *, progress: bool = False) -> None:
        """Merge the adapters into this rank's parts of targets, in place, in float32; round the result once.

        The factors of a weight are small, and read whole; of tensors that replace weights, this reads the part.

        :param tensors: the parts by name, contiguous. The content of those that an adapter has whole does not matter.
        :param progress: show a bar on stderr.

        :raises ModelCheckpointMismatchError: an adapter has different values for one tied parameter.
        """
        names, boxes = self.match.targets.names, self.match.targets.boxes
        mine = [target for target in self.match.merge.changes if names[target] in tensors and boxes[target].numel > 0]
        sources = dict(self.match.routed.sources())
        with _full_precision():
            for batch in self._batches(mine):
                values = [tensors[names[target]] for target in batch]
                factors = self._read_factors(batch, values[0].device)

                def merge(steps: Iterator[int], factors: _Read = factors) -> Iterator[int]:
                    with torch.no_grad():
                        for target in steps:
                            yield self._merge(tensors[names[target]], target, factors, sources.get(target))

                total = sum(t.nbytes for t in values)
                threads = busy(cores(), total) if values[0].device.type == "cpu" else 1
                drive(iter(batch), merge, threads, total, "merge" if progress else None)

    def _batches(self, mine: Sequence[int]) -> Iterator[list[int]]:
        """Yield the targets whose factors are read together."""
        batch: list[int] = []
        size = 0
        for target in mine:
            nbytes = sum(self.adapters[n].manifest.nbytes(i) for n, i in self._factors_of(target))
            if batch and size + nbytes > _BATCH:
                yield batch
                batch, size = [], 0
            batch.append(target)
            size += nbytes
        if batch:
            yield batch

    def _factors_of(self, target: int) -> Iterator[tuple[int, int]]:
        """Yield the adapter and the position of each factor that this rank's part of a target needs."""
        for change in self.match.merge.changes[target]:
            for tensor, _ in pieces(change.source, change.shapes, self.match.targets.boxes[target]):
                part = change.parts.get(tensor)
                if isinstance(part, Factors):
                    yield change.adapter, part.a
                    yield change.adapter, part.b

    def _read_factors(self, batch: Sequence[int], device: torch.device) -> _Read:
        needed: dict[int, dict[int, None]] = {}
        for target in batch:
            for adapter, position in self._factors_of(target):
                needed.setdefault(adapter, {})[position] = None
        read: _Read = {}
        for adapter, positions in needed.items():
            checkpoint = self.adapters[adapter]
            dtypes = ["F64" if checkpoint.manifest.dtypes[i] == "F64" else "F32" for i in positions]
            tensors = read_tensors(checkpoint, [*positions], dtypes)
            read |= {(adapter, i): tensor.to(device) for i, tensor in zip(positions, tensors, strict=True)}

        return read

    def _merge(self, value: Tensor, target: int, factors: _Read, source: Source | None) -> int:
        """Merge the changes of one target into ``value``; return its bytes."""
        box, own = self.match.targets.boxes[target], DTYPE_NAMES[value.dtype]
        exact = "F64" if own == "F64" else "F32"
        # Values that were rounded when they were read are read once more, as the sum is to be rounded once.
        again = (
            source is not None
            and own != exact
            and any(self.base.manifest.dtypes[tensor] != own for tensor in tensors_of(source))
        )

        for slab in box.slabs(_SLAB):
            chunk = value if slab == box else value[slab.starts[0] - box.starts[0] :][: slab.sizes[0]]
            if again and source is not None:
                total = read_tensors(self.base, [source], [exact], boxes=[slab])[0].to(value.device)
            else:
                total = chunk.to(TORCH_DTYPES[exact])
            replaced = False
            for change in self.match.merge.changes[target]:
                into = torch.empty_like(total) if change.replaces and replaced else total
                self._apply(change, slab, into, factors)
                if into is not total and not are_same(into, total):
                    adapter, name = self.adapters[change.adapter], self.match.targets.names[target]
                    raise tied_mismatch_error(adapter, self.match.config, self.match.targets.aliases_of(name)[0], name)
                replaced = replaced or change.replaces
            if total is not chunk:
                chunk.copy_(total)

        return value.nbytes

    def _apply(self, change: Change, slab: Box, total: Tensor, factors: _Read) -> None:
        """Apply a change to a box of a target, whose elements are ``total``."""
        for tensor, selection in pieces(change.source, change.shapes, slab):
            part = change.parts.get(tensor)
            if part is None:
                continue
            place = total.as_strided(selection.sizes, selection.strides, total.storage_offset() + selection.place)
            spans = tuple((n - 1) * step + 1 for n, step in zip(selection.sizes, selection.steps, strict=True))
            if isinstance(part, int):
                own = [Box(selection.starts, spans)]
                (saved,) = read_tensors(self.adapters[change.adapter], [part], [DTYPE_NAMES[total.dtype]], boxes=own)
                place.copy_(saved[tuple(slice(None, None, step) for step in selection.steps)])
                continue
            cut = [
                slice(start, start + span, step)
                for start, span, step in zip(selection.starts, spans, selection.steps, strict=True)
            ]
            a, b = (factors[change.adapter, i].to(total.dtype) for i in (part.a, part.b))
            b = b.reshape(-1, a.shape[0])
            if part.transposed:
                product = _product(b, a, cut[1], cut[0]).T
            elif a.ndim == 2:
                product = _product(b, a, cut[0], cut[1])
            else:
                flat = a.reshape(a.shape[0], -1)
                rows = _product(b, flat, cut[0], slice(0, flat.shape[1], 1))
                product = rows.reshape(-1, *a.shape[1:])[(slice(None), *cut[1:])]
            place += product * part.scale


_BLOCK = 64
"""The rows and columns that libraries multiply at a time, or a multiple of them."""


def _product(b: Tensor, a: Tensor, rows: slice, columns: slice) -> Tensor:
    """Return some rows and columns of ``b @ a``.

    Libraries add in another order at the edges of a matrix. Multiplying whole blocks rounds each element as the product
    of the whole matrices does, whatever part of it a rank owns.
    """
    blocks = [_blocks(rows, b.shape[0]), _blocks(columns, a.shape[1])]
    inner = [
        slice(cut.start - block.start, cut.stop - block.start, cut.step)
        for cut, block in zip((rows, columns), blocks, strict=True)
    ]

    return (b[blocks[0]] @ a[:, blocks[1]])[tuple(inner)]


def _blocks(cut: slice, size: int) -> slice:
    """Return the blocks that contain a cut; the last one of ``size`` indices goes with the one before it."""
    start, stop = cut.start // _BLOCK * _BLOCK, min(size, -(-cut.stop // _BLOCK) * _BLOCK)
    if stop - start < _BLOCK:
        start = max(0, start - _BLOCK)

    return slice(start, stop)


_Read = dict[tuple[int, int], Tensor]
"""Factors by adapter and position."""


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 proper within the block, whatever this process allows."""
    places: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
    places = [place for place in places if hasattr(place, "fp32_precision")]
    if not places:  # before torch 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return

    # The function above refuses to answer if the process uses these settings.
    settings = [(place, place.fp32_precision) for place in places]
    try:
        for place, _ in settings:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, setting in settings:
            place.fp32_precision = setting
