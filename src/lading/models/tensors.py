"""Reads of tensors of a local checkpoint, without a model."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.formats.digests import SIZE, Digests, starts_of
from lading.formats.manifest import Manifest
from lading.gangs import Gangs
from lading.models.construct import build_on_meta, split
from lading.models.family import Family
from lading.models.fit import problems_of_scales
from lading.models.targets import Targets
from lading.planning.block_scales import with_scales
from lading.planning.box import Box
from lading.planning.composition import Source, shape_of, tensors_of
from lading.planning.plan import Wanted, plan
from lading.planning.rules import rename, route
from lading.transfer.dequantize import dequantize
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.hashing import Hasher
from lading.transfer.memory import create_arena
from lading.transfer.pages import HugePages


def read_tensors(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    dtypes: Sequence[str],
    mmap: bool = False,
    *,
    boxes: Sequence[Box] | None = None,
    witness: DigestCollector | None = None,
    huge_pages: HugePages = "auto",
) -> list[Tensor]:
    """Read tensors of a checkpoint, or compositions of them, to the CPU.

    :param sources: positions of tensors in the manifest, or compositions.
    :param dtypes: the dtype of each in memory.
    :param boxes: the part of each; default: all.
    :param witness: collects digests of the tensors that are read as they are in the files.
    :param huge_pages: the pages of the memory that they are read into.

    :raises NotSupportedError: a tensor has a dtype that torch lacks.
    """
    if witness is not None:
        return _witnessed(checkpoint, sources, dtypes, witness)
    for source in sources:
        for i in tensors_of(source):
            if (stored := checkpoint.manifest.dtypes[i]) not in TORCH_DTYPES:
                raise NotSupportedError(
                    f"{checkpoint.manifest.names[i]!r} is stored as {stored}, a dtype that torch lacks, so it is "
                    f"not read. Use the checkpoint at {checkpoint.where} in its original precision."
                )
    if boxes is None:
        boxes = [Box.whole(shape_of(source, checkpoint.manifest.shapes)) for source in sources]
    wanted = with_scales(
        checkpoint.manifest,
        Wanted(
            tensors=[next(tensors_of(source)) for source in sources],
            boxes=boxes,
            dtypes=dtypes,
            composed={i: source for i, source in enumerate(sources) if not isinstance(source, int)},
        ),
    )
    planned = plan(checkpoint.manifest, wanted, mapped=mmap)
    arena = create_arena(planned.arena_bytes, torch.device("cpu"), huge_pages)

    return list(dequantize(execute(planned, checkpoint.readable(), wanted.outputs(), arena=arena), wanted.scalings))


class DigestCollector:
    """The digests of the tensors of a checkpoint, collected over several reads.

    :param dims: for each tensor the dim along which to cut it into blocks.
    """

    def __init__(self, manifest: Manifest, dims: Sequence[int]) -> None:
        self._manifest = manifest
        self.dims = array("b", dims)
        self._starts = starts_of(manifest, dims)
        self._blocks = bytearray(self._starts[-1] * SIZE)
        self._known = bytearray(len(manifest))

    def take(self, positions: Sequence[int], found: Digests) -> None:
        """Add the digests of tensors.

        :param positions: the positions of the tensors in the manifest.
        :param found: the digests of these tensors, in this order.
        """
        for n, i in enumerate(positions):
            at, end = found.starts[n] * SIZE, found.starts[n + 1] * SIZE
            self._blocks[self._starts[i] * SIZE : self._starts[i + 1] * SIZE] = found.blocks[at:end]
            self._known[i] = found.known[n]

    def digests(self) -> Digests:
        """Return the digests of all tensors that were read."""
        return Digests(dims=self.dims, starts=self._starts, blocks=bytes(self._blocks), known=bytes(self._known))


def _witnessed(
    checkpoint: Checkpoint, sources: Sequence[Source], dtypes: Sequence[str], witness: DigestCollector
) -> list[Tensor]:
    # A composed tensor does not have the bytes of the files, so this does not hash it.
    composed = [i for i, source in enumerate(sources) if not isinstance(source, int)]
    made = read_tensors(checkpoint, [sources[i] for i in composed], [dtypes[i] for i in composed]) if composed else []
    tensors = dict(zip(composed, made, strict=True))

    # A manifest of these alone: looking at all 100,000 tensors for each few would take longer than reading them.
    plain = {i: source for i, source in enumerate(sources) if isinstance(source, int)}
    if not plain:
        return made
    scales = checkpoint.manifest.scales
    positions = sorted({*plain.values(), *(scales[i] for i in plain.values() if i in scales)})
    at = {position: n for n, position in enumerate(positions)}
    part = checkpoint.manifest.take(positions)
    boxes = [Box.whole(part.shapes[at[position]]) for position in plain.values()]
    wanted = with_scales(
        part,
        Wanted(tensors=[at[position] for position in plain.values()], boxes=boxes, dtypes=[dtypes[i] for i in plain]),
    )
    planned = plan(part, wanted)
    hasher = Hasher(part, [witness.dims[position] for position in positions], planned, wanted)
    read = execute(planned, checkpoint.readable(), wanted.outputs(), observer=hasher)
    witness.take(positions, hasher.digests())
    tensors |= dict(zip(plain, dequantize(read, wanted.scalings), strict=True))

    return [tensors[i] for i in range(len(sources))]


def iter_tensors(
    checkpoint: Checkpoint,
    family: Family[Any, Any],
    config: Any,
    *,
    gangs: Gangs,
    mmap: bool = False,
    huge_pages: HugePages = "auto",
) -> Iterator[tuple[str, Tensor]]:
    """Yield pairs (parameter name, tensor) of a checkpoint, in the order of its files, one tensor in memory at a time.

    For a parameter that is split over ``gangs``, this yields the part of this rank. It skips other stages of a
    pipeline; a table that stages share has its name in the checkpoint.

    :raises ModelCheckpointMismatchError: parts that make a parameter together are missing, or claim the same place;
        scales do not fit their tensor; or a tensor that would be cut is not of the shape of its parameter.
    :raises NotSupportedError: a tensor has a dtype that torch lacks.
    """
    manifest = checkpoint.manifest
    module = build_on_meta(family, config)
    targets = split(module, family, config, gangs, dtype=None)
    owned = _owned(module, targets) if gangs.root.size > 1 else {}
    sources = [
        (name, source) for name, source in _made(checkpoint, family, config, targets) if owned.get(name, ()) is not None
    ]
    shapes = [shape_of(source, manifest.shapes) for _, source in sources]
    parts = [owned.get(name) or (shape, Box.whole(shape)) for (name, _), shape in zip(sources, shapes, strict=True)]

    for (name, source), shape, (expected, box) in zip(sources, shapes, parts, strict=True):
        if shape != expected:
            problem = f"mis-shaped: {name} is expected to be {expected}, but is {shape}"
            raise ModelCheckpointMismatchError(
                checkpoint.where, f"The checkpoint at {checkpoint.where} does not fit: {problem}.", [problem]
            )

        dtype = manifest.value_dtype(next(tensors_of(source)))
        (tensor,) = read_tensors(checkpoint, [source], [dtype], mmap, boxes=[box], huge_pages=huge_pages)
        yield name, tensor


def _owned(module: Module, targets: Targets) -> Mapping[str, tuple[tuple[int, ...], Box] | None]:
    """Return the shape and this rank's box of each parameter, under each of its names.

    ``None`` marks the parameters of other pipeline stages.
    """
    held = {targets.aliases.get(name, name) for name in module.state_dict()}
    owned = {
        name: (shape, box) if name in held else None
        for name, shape, box in zip(targets.names, targets.shapes, targets.boxes, strict=True)
    }

    return owned | {alias: owned[first] for alias, first in targets.aliases.items()}


def _made(checkpoint: Checkpoint, family: Family[Any, Any], config: Any, targets: Targets) -> list[tuple[str, Source]]:
    """Return the sources that the tensors make, including those that no parameter needs."""
    manifest = checkpoint.manifest
    rules = family.rules_for(config, manifest.names)
    shapes = dict(zip(targets.names, targets.shapes, strict=True))
    names = list(dict.fromkeys(name for name in rename(manifest.names, rules) if name is not None))
    # Another name of a tied parameter has its shape.
    target_shapes = [shapes.get(targets.aliases.get(name, name), ()) for name in names]

    made = route(manifest.names, names, rules, shapes=manifest.shapes, target_shapes=target_shapes)
    problems = [f"claimed by {len(by)} tensors: {name} by {', '.join(by)}" for name, by in made.clashes]
    problems += [f"incomplete: {name}: {why}" for name, why in made.incomplete]
    problems += problems_of_scales(manifest, made)
    if problems:
        raise ModelCheckpointMismatchError(
            checkpoint.where,
            f"The checkpoint at {checkpoint.where} does not make the parameters of {checkpoint.name}: "
            + "; ".join(problems[:20]),
            problems,
        )

    return sorted(
        ((names[target], source) for target, source in made.sources()),
        key=lambda pair: next(tensors_of(pair[1])),
    )
