"""The loading of planned tensors, by each rank alone or by the ranks of a host together, with optional digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lading.formats.digests import Digests, unknown
from lading.formats.manifest import Manifest
from lading.gangs import Gang
from lading.planning.composition import pieces
from lading.planning.plan import Plan, Wanted
from lading.transfer.arena import Arena
from lading.transfer.cooperative import Demand, Joint
from lading.transfer.dequantize import dequantize
from lading.transfer.exchange import execute_cooperatively
from lading.transfer.execute import execute
from lading.transfer.files import File
from lading.transfer.hashing import Hasher
from lading.transfer.mappings import NOTHING_AHEAD, Ahead

Require = Callable[[Sequence[int]], None]
"""A check of the tensors, by their positions in the manifest, that digests of blocks cannot verify."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedTensors:
    """The result of a plan."""

    tensors: Sequence[Tensor]
    """The wanted tensors, in their order, without the scales among them."""
    wanted: Sequence[int]
    """The positions in the manifest of the tensors with bytes that this rank read, or all ranks that read with it."""
    unvouched: Sequence[int]
    """The tensors with bytes outside of the blocks that were read whole."""
    digests: Digests | None
    """The digests of the blocks that were read whole by this rank, or by all ranks that read with it."""
    bytes_read: int
    """The bytes that this rank read."""
    reads: int
    pages: Mapping[str, int]
    """The bytes in memory by the size of their pages."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedLoad:
    """A plan, and all that its execution needs but memory."""

    manifest: Manifest
    wanted: Wanted
    plan: Plan
    """The plan for ``wanted``."""
    files: Sequence[File]
    """The files of the manifest's shards."""
    dims: Sequence[int] | None = None
    """The dims of the blocks to digest, one for each tensor of the manifest."""


def load_tensors(
    planned: PlannedLoad,
    *,
    arena: Arena,
    require: Require | None = None,
    progress: bool = False,
    ahead: Ahead = NOTHING_AHEAD,
) -> LoadedTensors:
    """Execute a plan.

    :param arena: memory of the plan's ``arena_bytes``.
    :param require: called before the first read with :attr:`LoadedTensors.unvouched`; it may raise.
    :param ahead: mappings of the same files.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    manifest, wanted = planned.manifest, planned.wanted
    hasher = None if planned.dims is None else Hasher(manifest, planned.dims, planned.plan, wanted)
    read, unvouched = _vouched(manifest, wanted, hasher)
    if require is not None:
        require(unvouched)
    tensors = execute(
        planned.plan, planned.files, wanted.outputs(), arena=arena, progress=progress, observer=hasher, ahead=ahead
    )

    return LoadedTensors(
        tensors=dequantize(tensors, wanted.scalings, progress=progress),
        wanted=read,
        unvouched=unvouched,
        digests=None if hasher is None else hasher.digests(),
        bytes_read=planned.plan.read_bytes,
        reads=planned.plan.num_reads,
        pages=arena.pages,
    )


def load_cooperatively(
    planned: PlannedLoad,
    *,
    arena: Arena,
    root: Gang,
    require: Require | None = None,
    progress: bool = False,
) -> LoadedTensors:
    """Execute a plan as :func:`load_tensors` does, with the ranks of a host reading together. All ranks must call it.

    :param planned: a plan that maps nothing.
    :param root: the gang of all ranks.

    :raises GangError: another rank failed.
    """
    with root.on_host() as host:
        if host.size > 1:
            # Pieces are read as they lie in the files. The digests are those of tensors, so reading does not hash.
            manifest, wanted, dims = planned.manifest.flat(), planned.wanted, planned.dims
            joint = Joint(
                manifest, host.gather_objects(Demand.of(planned.plan)), None if planned.manifest.pieces else dims
            )
            read, unvouched = _vouched(manifest, joint.wanted, joint.hasher)
            if require is not None:
                require(unvouched)
            schedule = joint.schedule()
            nothing = None if dims is None else unknown(planned.manifest, dims)
            tensors = execute_cooperatively(
                planned.plan, schedule, planned.files, wanted.outputs(), host=host, arena=arena, progress=progress
            )
            return LoadedTensors(
                tensors=dequantize(tensors, wanted.scalings, progress=progress),
                wanted=read,
                unvouched=unvouched,
                digests=nothing if joint.hasher is None else joint.hasher.digests(),
                bytes_read=schedule.bytes_of(host.rank),
                reads=sum(1 for _ in schedule.steps(host.rank)),
                pages=arena.pages,
            )

    return load_tensors(planned, arena=arena, require=require, progress=progress)


def _vouched(manifest: Manifest, wanted: Wanted, hasher: Hasher | None) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tensors with wanted bytes, and those that ``hasher`` does not see in whole blocks."""
    found: list[int] = []
    unvouched: list[int] = []
    for i, (first, box) in enumerate(zip(wanted.tensors, wanted.boxes, strict=True)):
        if not box.numel:
            continue
        source = wanted.composed.get(i)
        own = [first] if source is None else sorted({tensor for tensor, _ in pieces(source, manifest.shapes, box)})
        found += own
        if hasher is None or not hasher.vouched[i]:
            unvouched += own

    return found, unvouched
