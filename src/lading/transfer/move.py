"""The loading of planned tensors, by each rank alone or by the ranks of a host together, with optional digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lading.formats.digests import Digests, unknown
from lading.formats.manifest import Manifest
from lading.gangs import Gang
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


def load_tensors(
    manifest: Manifest,
    planned: Plan,
    wanted: Wanted,
    files: Sequence[File],
    *,
    arena: Arena,
    dims: Sequence[int] | None = None,
    require: Require | None = None,
    progress: bool = False,
    ahead: Ahead = NOTHING_AHEAD,
) -> LoadedTensors:
    """Execute a plan.

    :param planned: the plan for ``wanted``.
    :param arena: memory of ``planned.arena_bytes``.
    :param dims: the dims of the blocks to digest, one for each tensor of the manifest.
    :param require: called before the first read with :attr:`LoadedTensors.unvouched`; it may raise.
    :param ahead: mappings of the same files.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    hasher = None if dims is None else Hasher(manifest, dims, planned, wanted)
    read, unvouched = _vouched(wanted, hasher)
    if require is not None:
        require(unvouched)
    tensors = execute(planned, files, _shapes(wanted), arena=arena, progress=progress, observer=hasher, ahead=ahead)

    return LoadedTensors(
        tensors=dequantize(tensors, wanted.scalings, progress=progress),
        wanted=read,
        unvouched=unvouched,
        digests=None if hasher is None else hasher.digests(),
        bytes_read=planned.read_bytes,
        reads=planned.num_reads,
        pages=arena.pages,
    )


def load_cooperatively(
    manifest: Manifest,
    planned: Plan,
    wanted: Wanted,
    files: Sequence[File],
    *,
    arena: Arena,
    root: Gang,
    dims: Sequence[int] | None = None,
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
            # Pieces are read as they lie in the files. The digests are those of tensors, so none is taken on the way.
            joint = Joint(manifest.flat(), host.gather_objects(Demand.of(planned)), None if manifest.pieces else dims)
            read, unvouched = _vouched(joint.wanted, joint.hasher)
            if require is not None:
                require(unvouched)
            schedule = joint.schedule()
            nothing = None if dims is None else unknown(manifest, dims)
            tensors = execute_cooperatively(
                planned, schedule, files, _shapes(wanted), host=host, arena=arena, progress=progress
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

    return load_tensors(manifest, planned, wanted, files, arena=arena, dims=dims, require=require, progress=progress)


def _vouched(wanted: Wanted, hasher: Hasher | None) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tensors with wanted bytes, and those that ``hasher`` does not see in whole blocks."""
    tensors = [i for i, box in zip(wanted.tensors, wanted.boxes, strict=True) if box.numel]
    if hasher is None:
        return tensors, tensors

    return tensors, [i for i, vouched in zip(wanted.tensors, hasher.vouched, strict=True) if not vouched]


def _shapes(wanted: Wanted) -> list[tuple[tuple[int, ...], str]]:
    return [(box.sizes, dtype) for box, dtype in zip(wanted.boxes, wanted.dtypes, strict=True)]
