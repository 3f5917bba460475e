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
from lading.models.adapters import Change, Factors, Merge
from lading.models.targets import Targets
from lading.models.tensors import read_tensors
from lading.models.ties import are_same, tied_mismatch_error
from lading.planning.box import Box, Selection
from lading.planning.composition import Source, pieces, tensors_of
from lading.planning.rules import Route
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES

_SLAB = 16 << 20
"""The most elements of a weight to merge at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merger:
    """A merge whose files are on this machine."""

    merge: Merge
    adapters: Sequence[Checkpoint]
    base: Checkpoint
    targets: Targets
    routed: Route
    """The tensors of the base that make the targets."""
    config: Any

    def merge_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Merge the adapters into this rank's parts of targets, in place, in float32; round the result once.

        :param tensors: the parts by name, contiguous. The content of those that an adapter has whole does not matter.

        :raises ModelCheckpointMismatchError: an adapter has different values for one tied parameter.
        """
        sources = dict(self.routed.sources())
        with _full_precision(), torch.no_grad():
            for target, changes in self.merge.changes.items():
                name, box = self.targets.names[target], self.targets.boxes[target]
                if name in tensors and box.numel > 0:
                    self._merge(tensors[name], target, changes, sources.get(target))

    def _merge(self, value: Tensor, target: int, changes: Sequence[Change], source: Source | None) -> None:
        box, own = self.targets.boxes[target], DTYPE_NAMES[value.dtype]
        exact = "F64" if own == "F64" else "F32"
        # Values that were rounded when they were read are read once more, as the sum is to be rounded once.
        again = (
            source is not None
            and own != exact
            and any(self.base.manifest.dtypes[tensor] != own for tensor in tensors_of(source))
        )
        parts = [_read_parts(change, box, exact, self.adapters[change.adapter]) for change in changes]

        for slab in box.slabs(_SLAB):
            chunk = value if slab == box else value[slab.starts[0] - box.starts[0] :][: slab.sizes[0]]
            if again and source is not None:
                total = read_tensors(self.base, [source], [exact], boxes=[slab])[0].to(value.device)
            else:
                total = chunk.to(TORCH_DTYPES[exact])
            replaced = False
            for change, tensors in zip(changes, parts, strict=True):
                into = torch.empty_like(total) if change.replaces and replaced else total
                for tensor, selection in pieces(change.source, change.shapes, slab):
                    if tensor in tensors:
                        _apply(change.parts[tensor], tensors[tensor], into, selection)
                if into is not total and not are_same(into, total):
                    adapter, name = self.adapters[change.adapter], self.targets.names[target]
                    raise tied_mismatch_error(adapter, self.config, self.targets.aliases_of(name)[0], name)
                replaced = replaced or change.replaces
            if total is not chunk:
                chunk.copy_(total)


def _read_parts(change: Change, box: Box, dtype: str, adapter: Checkpoint) -> dict[int, tuple[Tensor, ...]]:
    """Read the tensors of an adapter that the box needs; they are small, so each is read whole."""
    needed = [tensor for tensor, _ in pieces(change.source, change.shapes, box) if tensor in change.parts]
    needed = list(dict.fromkeys(needed))
    wanted = [change.parts[tensor] for tensor in needed]
    positions = [i for part in wanted for i in ((part,) if isinstance(part, int) else (part.a, part.b))]
    if not positions:
        return {}
    read = iter(read_tensors(adapter, positions, [dtype] * len(positions)))

    return {
        tensor: (next(read),) if isinstance(part, int) else (next(read), next(read))
        for tensor, part in zip(needed, wanted, strict=True)
    }


def _apply(part: Factors | int, tensors: tuple[Tensor, ...], total: Tensor, selection: Selection) -> None:
    """Apply what becomes of a tensor of the base to a selection of it, which lies in the memory of ``total``."""
    place = total.as_strided(selection.sizes, selection.strides, total.storage_offset() + selection.place)
    cut = [
        slice(start, start + (size - 1) * step + 1, step)
        for start, size, step in zip(selection.starts, selection.sizes, selection.steps, strict=True)
    ]
    if isinstance(part, int):
        place.copy_(tensors[0][tuple(cut)])
        return

    a, b = tensors
    rank = a.shape[0]
    b = b.reshape(-1, rank)
    if part.transposed:
        product = (b[cut[1]].to(total.device) @ a[:, cut[0]].to(total.device)).T
    else:
        rest = a[(slice(None), *cut[1:])].reshape(rank, -1)
        product = (b[cut[0]].to(total.device) @ rest.to(total.device)).reshape(selection.sizes)
    place += product * part.scale


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 proper within the block, whatever this process allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
