"""The plan of a load on all ranks of gangs, from a manifest alone: without processes, and without reading a byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lading.cards.card import AssetCard
from lading.catalog.own_store import CardStore
from lading.checkpoints.adapter import Adapter
from lading.checkpoints.checkpoint import Checkpoint
from lading.formats.manifest import Manifest
from lading.gangs.world import AXES
from lading.models.construct import build_on_meta, gc_disabled, other_dtypes
from lading.models.dtype import dtypes_of_others, model_dtype, resolve_dtypes
from lading.models.family import Family, check_config_type
from lading.models.fit import fit
from lading.models.parallelize import placements
from lading.models.pipeline import holders
from lading.models.resolve import ResolveOptions, resolve_model
from lading.models.targets import targets_of
from lading.operations.plan_reads import Layout, forecast, lay_out, memory_of_others
from lading.system.display import counted, human_bytes, representation
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES, parse_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """The plan of one rank."""

    rank: int
    pp: int
    """The place in its gang along this axis; likewise below."""
    rdp: int
    sdp: int
    ep: int
    tp: int
    bytes_read: int
    reads: int
    files: int
    """The files that it reads."""
    memory: Mapping[str, int]
    """The bytes of parameters and persistent buffers, by dtype; activations, gradients and optimizers take more."""

    @property
    def memory_bytes(self) -> int:
        """The bytes of parameters and persistent buffers."""
        return sum(self.memory.values())

    def __repr__(self) -> str:
        return representation(
            self,
            f"rank {self.rank}",
            f"{human_bytes(self.bytes_read)} read in {counted(self.reads, 'read')}",
            f"{human_bytes(self.memory_bytes)} of memory",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """The bytes of a checkpoint that the ranks of gangs read, and the parts that they own."""

    name: str
    """The name of the card, or the path."""
    family: str
    sizes: Mapping[str, int]
    """The sizes of the gangs ``pp``, ``rdp``, ``sdp``, ``ep`` and ``tp``."""
    checkpoint_bytes: int
    """The size of all tensors in bytes."""
    adapter_bytes: int
    """The size of all tensors of the adapters, which every rank reads, in bytes."""
    files: int
    """The number of files of the checkpoint."""
    ranks: tuple[RankPlan, ...]
    """The plans of the requested ranks."""
    manifest: Manifest = field(repr=False)
    """All tensors, and their places."""
    layout: Layout = field(repr=False, compare=False)
    """The parts that each rank owns, over ``sdp``, ``ep`` and ``tp``, and over ``pp`` if the family has stages; the
    other axes have copies."""

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes.values())

    def __repr__(self) -> str:
        largest = max((rank.memory_bytes for rank in self.ranks), default=0)

        return representation(
            self,
            self.name,
            f"{human_bytes(self.checkpoint_bytes)} in {counted(self.files, 'file')}",
            counted(self.world_size, "rank"),
            f"at most {human_bytes(largest)} of memory each",
        )

    def copies_of(self, seat: int) -> list[int]:
        """Return the ranks that own the same parts as the rank ``seat`` of the layout."""
        stage_size = self.sizes["sdp"] * self.sizes["ep"] * self.sizes["tp"]
        if self.layout.ranks == stage_size:
            return list(range(seat, self.world_size, stage_size))

        stage, place = divmod(seat, stage_size)
        rdp = self.sizes["rdp"]

        return [(stage * rdp + r) * stage_size + place for r in range(rdp)]


def plan_checkpoint(
    checkpoint: Checkpoint,
    family: Family[Any, Any],
    config: Any,
    *,
    sizes: Mapping[str, int],
    dtype: torch.dtype | None,
    ranks: Sequence[int] | None,
    adapters: Sequence[Adapter] = (),
) -> LoadPlan:
    """Plan the load of a resolved model, as :func:`plan_load`.

    :param adapters: the adapters to merge; each weight is read as without them.
    :param sizes: the sizes of all of :data:`~lading.gangs.world.AXES`.
    :param dtype: the dtype of floating-point tensors; ``None`` keeps the checkpoint's own.
    """
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{axis}` must be at least 1, but is {size}")
    world = math.prod(sizes.values())
    for rank in ranks or ():
        if not 0 <= rank < world:
            raise ValueError(f"a rank must be at least 0 and less than the size of the world, {world}, but is {rank}")
    check_config_type(config, family)
    manifest = checkpoint.manifest
    sdp, ep, tp = sizes["sdp"], sizes["ep"], sizes["tp"]

    with gc_disabled():
        module = build_on_meta(family, config)
        others = other_dtypes(module, family, config, dtype, sdp=sdp)
        targets = targets_of(module, dtype=dtype, others=others)
        parameters = {name for name, _ in module.named_parameters()}
        parallel_plan = family.parallel_plan(config)
        placed = placements(parallel_plan, targets.names, targets.shapes, parameters, sdp=sdp, ep=ep, tp=tp)
        # Without stages, the axis has copies.
        staged = parallel_plan.stages
        pp = 1 if staged is None else sizes["pp"]
        held = [None] * len(targets.names) if staged is None else holders(staged, targets.names, targets.aliases, pp)
        match = fit(checkpoint, targets, family, config, adapters)
        routed = match.routed
        layout = lay_out(
            manifest,
            routed.tensors,
            [targets.shapes[i] for i in routed.targets],
            resolve_dtypes(match, sdp=sdp),
            [placed[i] for i in routed.targets],
            (pp, sdp, ep, tp),
            routed.composed,
            stages=[held[i] for i in routed.targets],
        )
        # What adapters have whole, and what the checkpoint lacks, takes memory all the same.
        unread = dtypes_of_others(match, [*match.merge.replaced.values(), *routed.drawn])
        places = [targets.names.index(name) for name in unread]
        memory_of_unread = memory_of_others(
            [targets.shapes[i] for i in places],
            [DTYPE_NAMES[dtype] for dtype in unread.values()],
            [placed[i] for i in places],
            (pp, sdp, ep, tp),
            stages=[held[i] for i in places],
        )
        found = forecast(manifest, layout, memory_of_unread)

    memory = {str(TORCH_DTYPES[name]).removeprefix("torch."): column for name, column in found.memory.items()}
    files = found.files.sum(0)

    def of_rank(rank: int) -> RankPlan:
        copy, place = divmod(rank, sdp * ep * tp)
        p, r = divmod(copy, sizes["rdp"])
        s, expert = divmod(place, ep * tp)
        e, t = divmod(expert, tp)
        seat = place + p % pp * sdp * ep * tp  # the other axes have copies of one another
        return RankPlan(
            rank=rank,
            pp=p,
            rdp=r,
            sdp=s,
            ep=e,
            tp=t,
            bytes_read=int(found.bytes_read[seat]),
            reads=int(found.reads[seat]),
            files=int(files[seat]),
            memory={name: int(column[seat]) for name, column in memory.items()},
        )

    return LoadPlan(
        name=checkpoint.name,
        family=family.name,
        sizes={axis: sizes[axis] for axis in AXES},
        checkpoint_bytes=manifest.total_bytes,
        adapter_bytes=sum(adapter.checkpoint.manifest.total_bytes for adapter in adapters),
        files=len(manifest.shards),
        ranks=tuple(map(of_rank, range(world) if ranks is None else ranks)),
        manifest=manifest,
        layout=layout,
    )


def plan_load(
    target: AssetCard | str | Path,
    *,
    tp: int = 1,
    sdp: int = 1,
    pp: int = 1,
    rdp: int = 1,
    ep: int = 1,
    dtype: torch.dtype | str = "auto",
    ranks: Sequence[int] | None = None,
    revision: str | None = None,
    restrict: bool = True,
    store: CardStore | None = None,
) -> LoadPlan:
    """Plan the load of a model on every rank of gangs of these sizes, without reading any weights.

    :param target: as :func:`check_model` takes it; likewise ``revision``.
    :param dtype: as ``load_model`` takes it.
    :param ranks: the ranks to include, from 0 to ``pp × rdp × sdp × ep × tp - 1``; default: all.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.

    :raises ValueError: a size that is less than 1; a rank outside of the world.
    :raises ModelCheckpointMismatchError: the checkpoint does not fit the model's architecture.
    :raises NotSupportedError: a size of the architecture does not divide over ``tp``, or the experts over ``ep × tp``;
        there are fewer layers than stages; the checkpoint is quantized.

    It also raises what :func:`check_model` does.
    """
    chosen = parse_dtype(dtype)
    model = resolve_model(target, store, options=ResolveOptions(revision=revision, restrict=restrict))

    return plan_checkpoint(
        model.checkpoint,
        model.family,
        model.config,
        sizes={"pp": pp, "rdp": rdp, "sdp": sdp, "ep": ep, "tp": tp},
        dtype=model_dtype(chosen, model.checkpoint, store=model.store),
        ranks=ranks,
        adapters=model.adapters,
    )
