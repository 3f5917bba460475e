"""What a plan says, done: by each rank for itself, or by the ranks of a host together; with digests, if they are asked
for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lading.formats.digests import Digests
from lading.formats.manifest import Manifest
from lading.gangs import Gang
from lading.planning.plan import Plan, Wanted
from lading.transfer.exchange import execute_together
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.hashing import Hasher
from lading.transfer.mappings import NOTHING_AHEAD, Ahead
from lading.transfer.memory import Arena
from lading.transfer.together import Demand, Joint


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedTensors:
    """What has come of a plan."""

    tensors: Sequence[Tensor]
    """In the order in which they were wanted."""
    digests: Digests | None
    """Of the blocks that were read whole: by this rank, or by all ranks that read with it."""
    bytes_read: int
    """By this rank."""
    reads: int
    pages: Mapping[str, int]
    """Bytes in memory by the size of their pages."""


def load_tensors(
    manifest: Manifest,
    planned: Plan,
    wanted: Wanted,
    files: Sequence[ShardFile],
    *,
    arena: Arena,
    dims: Sequence[int] | None = None,
    progress: bool = False,
    ahead: Ahead = NOTHING_AHEAD,
) -> LoadedTensors:
    """Do what a plan says.

    :param planned: for ``wanted``.
    :param arena: memory of ``planned.arena_bytes``.
    :param dims: take digests of blocks along these, one for each tensor of the manifest.
    :param ahead: what is mapped already, of the same files.

    :raises CorruptModelCheckpointError: a file ends early, or is not the one that the plan was made for.
    :raises OSError: a file cannot be read.
    """
    hasher = None if dims is None else Hasher(manifest, dims, planned, wanted)
    tensors = execute(planned, files, _shapes(wanted), arena=arena, progress=progress, hasher=hasher, ahead=ahead)

    return LoadedTensors(
        tensors=tensors,
        digests=None if hasher is None else hasher.digests(),
        bytes_read=planned.read_bytes,
        reads=planned.num_reads,
        pages=arena.pages,
    )


def load_together(
    manifest: Manifest,
    planned: Plan,
    wanted: Wanted,
    files: Sequence[ShardFile],
    *,
    arena: Arena,
    root: Gang,
    dims: Sequence[int] | None = None,
    progress: bool = False,
) -> LoadedTensors:
    """As :func:`load_tensors`, but the ranks of a host read together. All ranks of all hosts have to call it.

    :param planned: one that maps nothing.
    :param root: all ranks.

    :raises GangError: another rank failed.
    """
    with root.on_host() as host:
        if host.size > 1:
            joint = Joint(manifest, host.gather_objects(Demand.of(planned)))
            hasher = None if dims is None else Hasher(manifest, dims, joint.plan, joint.wanted)
            schedule = joint.schedule(hasher)
            tensors = execute_together(
                planned, schedule, files, _shapes(wanted), host=host, arena=arena, progress=progress, hasher=hasher
            )
            return LoadedTensors(
                tensors=tensors,
                digests=None if hasher is None else hasher.digests(),
                bytes_read=schedule.bytes_of(host.rank),
                reads=sum(1 for _ in schedule.steps(host.rank)),
                pages=arena.pages,
            )

    return load_tensors(manifest, planned, wanted, files, arena=arena, dims=dims, progress=progress)


def _shapes(wanted: Wanted) -> list[tuple[tuple[int, ...], str]]:
    return [(box.sizes, dtype) for box, dtype in zip(wanted.boxes, wanted.dtypes, strict=True)]
