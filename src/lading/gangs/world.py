"""All gangs of a process: of the ranks that torchrun started, of a single process, or of a simulated world."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lading.errors import GangError
from lading.gangs.control import ControlChannel
from lading.gangs.gang import Gang
from lading.gangs.torch_private import default_store, init_fake_process_group
from lading.system.filesystem import host_id

AXES = ("pp", "rdp", "sdp", "ep", "tp")
"""The axes of the mesh, from the one whose ranks are furthest apart to the one whose ranks are neighbors."""

TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gangs:
    """All gangs of this process; leave their ``with`` block, or call :meth:`close`, to end them.

    :ivar root: all processes.
    :ivar dp: data parallel, the product of ``rdp`` and ``sdp``.
    :ivar rdp: replicas of the same shards.
    :ivar sdp: fully sharded data parallel.
    :ivar ep: expert parallel.
    :ivar tp: tensor parallel.
    :ivar pp: pipeline parallel.
    """

    root: Gang
    dp: Gang
    rdp: Gang
    sdp: Gang
    ep: Gang
    tp: Gang
    pp: Gang

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the axes ``pp``, ``rdp``, ``sdp``, ``ep`` and ``tp``; ``None`` without a process group."""
        return self.root.mesh

    def close(self) -> None:
        """Close the connections of the gangs; for the other ranks, this one is then gone. The process group stays."""
        if self.root.channel is not None:
            self.root.channel.close()

    def __enter__(self) -> Gangs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def create_fake_gangs(device: torch.device | str) -> Gangs:
    """Create the gangs of a single process, for a model on a single device.

    :raises ValueError: ``device`` is the ``meta`` device, which holds no data.
    """
    device = _check_device(device)
    one = Gang(rank=0, size=1, device=device)

    return Gangs(root=one, dp=one, rdp=one, sdp=one, ep=one, tp=one, pp=one)


def create_gangs(
    device: torch.device | str | None = None,
    *,
    tp: int = 1,
    sdp: int = 1,
    pp: int = 1,
    ep: int = 1,
    timeout: timedelta = TIMEOUT,
) -> Gangs:
    """Create the gangs of all ranks of the default process group, which torchrun's environment initializes if needed.

    Every rank calls it with the same sizes. Ranks are laid out in the order pp, rdp, sdp, ep, tp, so that the ranks of
    a tp gang are neighbors. The rest of the world are replicas (``rdp``). A process that torchrun did not start is a
    world of its own.

    :param device: the CPU, or a CUDA device; by default the CUDA device of this rank on its host (``LOCAL_RANK``) if
        there is one, else the CPU.
    :param timeout: the time that a rank may be late at a call of its gang without a heartbeat; also the timeout of the
        process group, if it is initialized here.
    :raises ValueError: a size is not valid or does not divide the world; the ranks have different devices.
    :raises GangError: a rank did not arrive, or has other sizes; the environment is incomplete.
    """
    sizes = {"tp": tp, "ep": ep, "sdp": sdp, "pp": pp}
    if timeout <= timedelta(0):
        raise ValueError(f"`timeout` must be positive, but is {timeout}")

    device = _check_device(_default_device() if device is None else device)
    if not dist.is_initialized() and not _init_process_group(device, timeout):
        _replica_count(1, sizes)
        return create_fake_gangs(device)

    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        shape = (pp, _replica_count(1, sizes), sdp, ep, tp)
        return _build_gangs(_mesh(device, shape), 0, shape, device, (_host_name(),))

    channel = ControlChannel(default_store(), rank, size, timeout.total_seconds())
    try:
        everyone = Gang(rank=rank, size=size, device=device, ranks=tuple(range(size)), channel=channel)
        try:
            shape = (pp, _replica_count(size, sizes), sdp, ep, tp)
        except ValueError as ex:
            everyone.agree(ex)
            raise
        everyone.same({**sizes, "device": device.type}, "sizes of gangs and type of device")
        hosts = tuple(everyone.gather_objects(_host_name()))

        def make() -> tuple[DeviceMesh, ProcessGroup | None]:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # a per-thread setting
            mesh, dp_group = _mesh(device, shape), _dp_group(rank, shape)
            # NCCL connects at the first collective and blocks until all ranks arrive: do it here, under the guard.
            for group in (dist.group.WORLD, dp_group, *(mesh[axis].get_group() for axis in AXES)):
                if group is not None and group.size() > 1:
                    dist.all_reduce(torch.zeros(1, device=device), group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return mesh, dp_group

        mesh, dp_group = channel.guard(make, "creating the process groups")
        everyone.barrier()

        return _build_gangs(mesh, rank, shape, device, hosts, channel, dp_group)
    except BaseException:
        channel.close()
        raise


def simulate_gangs(
    rank: int,
    *,
    tp: int = 1,
    sdp: int = 1,
    pp: int = 1,
    rdp: int = 1,
    ep: int = 1,
    device: torch.device | str = "cpu",
) -> Gangs:
    """Create the gangs of one rank in a simulated world of ``pp × rdp × sdp × ep × tp`` processes, without the others.

    Meshes, placements and shards are those of the rank, so that its share can be inspected. Collectives send nothing
    and leave their outputs as they are; ``first`` and ``agree`` involve this process alone. The gangs that this process
    simulated before end, because torch has one default process group.

    :raises ValueError: a size is not valid, or the world has no such rank.
    :raises GangError: this process has a real process group.
    """
    device = _check_device(device)
    shape = (pp, rdp, sdp, ep, tp)
    _check_sizes(dict(zip(AXES, shape, strict=True)))
    size = prod(shape)
    if not 0 <= rank < size:
        text = " × ".join(f"{axis} {count}" for axis, count in zip(AXES, shape, strict=True))
        raise ValueError(
            f"`rank` must be at least 0 and less than the size of the world, {size} ({text}), but is {rank}"
        )
    if dist.is_initialized():
        if dist.get_backend() != "fake":
            raise GangError(
                "gangs cannot be simulated in a process that has a process group, because torch has one default group: "
                "simulate in another process, or destroy the group first"
            )
        dist.destroy_process_group()

    init_fake_process_group(rank, size)
    hosts = tuple(str(r) for r in range(size))

    return _build_gangs(_mesh(device, shape), rank, shape, device, hosts, dp_group=_dp_group(rank, shape))


# --- layout ----------------------------------------------------------------------------------------------------------


def _mesh(device: torch.device, shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(device.type, shape, mesh_dim_names=AXES)


def _dp_group(rank: int, shape: tuple[int, int, int, int, int]) -> ProcessGroup | None:
    """Create the group of ``rdp`` and ``sdp`` together; ``None`` if an existing group has the same ranks."""
    pp, rdp, sdp, ep, tp = shape
    if rdp == 1 or sdp == 1 or pp * ep * tp == 1:
        return None

    grid = torch.arange(prod(shape)).view(pp, rdp * sdp, ep * tp)
    # Every rank creates every group, in the same order, because torch counts them.
    groups = [(ranks, dist.new_group(ranks)) for stage in grid for ranks in stage.T.tolist()]

    mine: ProcessGroup = next(group for ranks, group in groups if rank in ranks)

    return mine


def _build_gangs(
    mesh: DeviceMesh,
    rank: int,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    hosts: tuple[str, ...],
    channel: ControlChannel | None = None,
    dp_group: ProcessGroup | None = None,
) -> Gangs:
    grid, world = torch.arange(prod(shape)).view(shape), dist.group.WORLD
    p, r, s, e, t = (int(i) for i in (grid == rank).nonzero()[0])

    def gang(ranks: torch.Tensor, mesh: DeviceMesh, group: ProcessGroup | None) -> Gang:
        members = tuple(ranks.flatten().tolist())
        alone = len(members) == 1
        return Gang(
            rank=members.index(rank),
            size=len(members),
            device=device,
            ranks=members,
            hosts=tuple(hosts[m] for m in members),
            mesh=mesh,
            group=None if alone else group,
            channel=None if alone else channel,
        )

    rdp = gang(grid[p, :, s, e, t], mesh["rdp"], mesh["rdp"].get_group())
    sdp = gang(grid[p, r, :, e, t], mesh["sdp"], mesh["sdp"].get_group())
    dp_ranks = grid[p, :, :, e, t]
    if dp_group is None:
        dp_group = world if dp_ranks.numel() == grid.numel() else sdp.group or rdp.group

    return Gangs(
        root=gang(grid, mesh, world),
        dp=gang(dp_ranks, mesh["rdp", "sdp"], dp_group),
        rdp=rdp,
        sdp=sdp,
        ep=gang(grid[p, r, s, :, t], mesh["ep"], mesh["ep"].get_group()),
        tp=gang(grid[p, r, s, e, :], mesh["tp"], mesh["tp"].get_group()),
        pp=gang(grid[:, r, s, e, t], mesh["pp"], mesh["pp"].get_group()),
    )


# --- arguments and environment ---------------------------------------------------------------------------------------


def _check_device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("`device` must be a device that holds data, but is the meta device")

    return device


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"`{name}` must be a number of processes, but is {size!r}")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {size}")


def _replica_count(world: int, sizes: dict[str, int]) -> int:
    """Return the number of replicas: the size of the world over the product of ``sizes``."""
    _check_sizes(sizes)
    for name, size in sizes.items():
        if world % size:
            raise ValueError(f"`{name}` must divide the size of the world, {world}, but is {size}")

    product = prod(sizes.values())
    if world % product:
        text = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(f"{text} = {product} must divide the size of the world, {world}")

    return world // product


def _host_name() -> str:
    """Return a name that is equal for processes that share files; clones share a machine id, containers a kernel."""
    parts = [host_id(), os.uname().nodename]
    for read, path in (
        (Path.read_text, Path("/proc/sys/kernel/random/boot_id")),
        (os.readlink, Path("/proc/self/ns/mnt")),
        (os.readlink, Path("/proc/self/ns/net")),
    ):
        try:
            parts.append(str(read(path)))
        except OSError:
            parts.append("")

    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")

    count, local = torch.cuda.device_count(), _environment_int("LOCAL_RANK") or 0
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)  # each rank of this host sees a device of its own
    if local >= count:
        raise GangError(
            f"`LOCAL_RANK` is {local}, but this host has {count} CUDA device{'s' if count > 1 else ''}: start no more "
            "processes on a host than it has devices, or pass `device`"
        )

    return torch.device("cuda", local)


def _init_process_group(device: torch.device, timeout: timedelta) -> bool:
    """Initialize the default process group from the environment; return whether the environment has one."""
    variables = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in variables if not os.environ.get(name)]
    if len(missing) == len(variables):
        return False
    if missing:
        raise GangError(
            f"the environment has {', '.join(n for n in variables if n not in missing)}, but not {', '.join(missing)}: "
            "start the processes with torchrun, or set all of them"
        )

    rank, size = _environment_int("RANK"), _environment_int("WORLD_SIZE")
    assert rank is not None
    assert size is not None
    if not 0 <= rank < size:
        raise GangError(f"`RANK` must be at least 0 and less than `WORLD_SIZE`, {size}, but is {rank}")

    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as ex:
        raise GangError(
            f"rank {rank} of {size} cannot find the others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {timeout.total_seconds():g} s: {ex}"
        ) from ex

    return True


def _environment_int(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None

    try:
        return int(text)
    except ValueError:
        raise GangError(f"the environment variable `{name}` must be a number, but is {text!r}") from None
