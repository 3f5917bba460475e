"""All gangs of a process: of the ranks that torchrun started, of one process, or of a world that is only simulated."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from datetime import timedelta
from math import prod
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

AXES = ("pp", "rdp", "sdp", "tp")
"""The axes of the mesh, from the one whose ranks lie furthest apart to the one whose ranks are neighbours."""

TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gangs:
    """All gangs that this process belongs to; leave their ``with`` block, or call :meth:`close`, to end them.

    :ivar root: all processes.
    :ivar dp: data parallel, the product of ``rdp`` and ``sdp``.
    :ivar rdp: replicas of the same shards.
    :ivar sdp: fully sharded data parallel.
    :ivar tp: tensor parallel.
    :ivar pp: pipeline parallel.
    """

    root: Gang
    dp: Gang
    rdp: Gang
    sdp: Gang
    tp: Gang
    pp: Gang

    @property
    def mesh(self) -> DeviceMesh | None:
        """The mesh of the axes ``pp``, ``rdp``, ``sdp`` and ``tp``; ``None`` without a process group."""
        return self.root.mesh

    def close(self) -> None:
        """End what the gangs tell one another; to the other ranks, this one is gone. The process group stays."""
        if self.root.line is not None:
            self.root.line.close()

    def __enter__(self) -> Gangs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def create_fake_gangs(device: torch.device | str) -> Gangs:
    """Gangs of one process, for a model on a single device.

    :raises ValueError: the ``meta`` device, which holds no data.
    """
    device = _checked(device)
    one = Gang(rank=0, size=1, device=device)

    return Gangs(root=one, dp=one, rdp=one, sdp=one, tp=one, pp=one)


def create_gangs(
    device: torch.device | str | None = None,
    *,
    tp: int = 1,
    sdp: int = 1,
    pp: int = 1,
    timeout: timedelta = TIMEOUT,
) -> Gangs:
    """Gangs of all ranks of the default process group, which is made from torchrun's environment if there is none.

    Every rank calls it with the same sizes. Ranks are laid out in the order pp, rdp, sdp, tp: those of a tp gang are
    neighbours. What the sizes leave of the world are replicas (``rdp``). A process that was not started by torchrun is
    a world of its own.

    :param device: the CPU, or a CUDA device; by default the CUDA device of this rank on its host (``LOCAL_RANK``)
        where there are any, and the CPU elsewhere.
    :param timeout: how long a rank may be late at a call of its gang without a sign of life; also that of the process
        group, if it is made here.
    :raises ValueError: a size that is no size or does not divide the world; a device that the others do not have.
    :raises GangError: a rank did not come, or came with other sizes; the environment is incomplete.
    """
    sizes = {"tp": tp, "sdp": sdp, "pp": pp}
    if timeout <= timedelta(0):
        raise ValueError(f"`timeout` must be positive, but is {timeout}")

    device = _checked(_default_device() if device is None else device)
    if not dist.is_initialized() and not _init_process_group(device, timeout):
        _remainder(1, sizes)
        return create_fake_gangs(device)

    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        shape = (pp, _remainder(1, sizes), sdp, tp)
        return _lay_out(_mesh(device, shape), 0, shape, device, (_host(),), None, dist.group.WORLD)

    line = ControlChannel(default_store(), rank, size, timeout.total_seconds())
    try:
        everybody = Gang(rank=rank, size=size, device=device, ranks=tuple(range(size)), line=line)
        try:
            shape = (pp, _remainder(size, sizes), sdp, tp)
        except ValueError as ex:
            everybody.agree(ex)
            raise
        everybody.same({**sizes, "device": device.type}, "sizes of gangs and type of device")
        hosts = tuple(everybody.gather_objects(_host()))

        def make() -> tuple[DeviceMesh, ProcessGroup | None]:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # it is a setting of the thread
            mesh, dp_group = _mesh(device, shape), _dp_group(rank, shape)
            # NCCL connects at the first collective, and blocks until all have come: here, where it is guarded.
            for group in (dist.group.WORLD, dp_group, *(mesh[axis].get_group() for axis in AXES)):
                if group is not None and group.size() > 1:
                    dist.all_reduce(torch.zeros(1, device=device), group=group)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return mesh, dp_group

        mesh, dp_group = line.guard(make, "making the process groups")
        everybody.barrier()

        return _lay_out(mesh, rank, shape, device, hosts, line, dist.group.WORLD, dp_group)
    except BaseException:
        line.close()
        raise


def simulate_gangs(
    rank: int, *, tp: int = 1, sdp: int = 1, pp: int = 1, rdp: int = 1, device: torch.device | str = "cpu"
) -> Gangs:
    """The gangs of one rank of a world of ``pp × rdp × sdp × tp`` processes, of which none but this one exists.

    For looking at what a rank would own and do: meshes, placements and shards are those of the rank. Collectives send
    nothing and leave what they would overwrite as it is; ``first`` and ``agree`` know this process alone. The gangs
    that this process has simulated before end: torch has one default process group.

    :raises ValueError: a size that is no size; a rank that the world does not have.
    :raises GangError: this process has a real process group.
    """
    device = _checked(device)
    shape = (pp, rdp, sdp, tp)
    _check_sizes(dict(zip(AXES, shape, strict=True)))
    size = prod(shape)
    if not 0 <= rank < size:
        raise ValueError(
            f"`rank` must be at least 0 and less than the size of the world, {size} (pp {pp} × rdp {rdp} × sdp {sdp} × "
            f"tp {tp}), but is {rank}"
        )
    if dist.is_initialized():
        if dist.get_backend() != "fake":
            raise GangError(
                "gangs cannot be simulated in a process that has a process group: torch has one default group only. "
                "Simulate in another process, or destroy the group first."
            )
        dist.destroy_process_group()

    init_fake_process_group(rank, size)
    hosts = tuple(str(r) for r in range(size))

    return _lay_out(_mesh(device, shape), rank, shape, device, hosts, None, dist.group.WORLD, _dp_group(rank, shape))


# --- layout ----------------------------------------------------------------------------------------------------------


def _mesh(device: torch.device, shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh(device.type, shape, mesh_dim_names=AXES)


def _dp_group(rank: int, shape: tuple[int, int, int, int]) -> ProcessGroup | None:
    """The group of ``rdp`` and ``sdp`` together; ``None`` where one of them alone has all of its ranks."""
    pp, rdp, sdp, tp = shape
    if rdp == 1 or sdp == 1 or pp * tp == 1:
        return None

    grid = torch.arange(prod(shape)).view(pp, rdp * sdp, tp)
    # Every rank makes every group, in the same order: torch counts them.
    groups = [(ranks, dist.new_group(ranks)) for p in range(pp) for t in range(tp) if (ranks := grid[p, :, t].tolist())]

    mine: ProcessGroup = next(group for ranks, group in groups if rank in ranks)

    return mine


def _lay_out(
    mesh: DeviceMesh,
    rank: int,
    shape: tuple[int, int, int, int],
    device: torch.device,
    hosts: tuple[str, ...],
    line: ControlChannel | None,
    world: ProcessGroup | None,
    dp_group: ProcessGroup | None = None,
) -> Gangs:
    grid = torch.arange(prod(shape)).view(shape)
    p, r, s, t = (int(i) for i in (grid == rank).nonzero()[0])

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
            line=None if alone else line,
        )

    rdp = gang(grid[p, :, s, t], mesh["rdp"], mesh["rdp"].get_group())
    sdp = gang(grid[p, r, :, t], mesh["sdp"], mesh["sdp"].get_group())
    dp_ranks = grid[p, :, :, t]
    if dp_group is None:
        dp_group = world if dp_ranks.numel() == grid.numel() else sdp.group or rdp.group

    return Gangs(
        root=gang(grid, mesh, world),
        dp=gang(dp_ranks, mesh["rdp", "sdp"], dp_group),
        rdp=rdp,
        sdp=sdp,
        tp=gang(grid[p, r, s, :], mesh["tp"], mesh["tp"].get_group()),
        pp=gang(grid[:, r, s, t], mesh["pp"], mesh["pp"].get_group()),
    )


# --- arguments and environment ---------------------------------------------------------------------------------------


def _checked(device: torch.device | str) -> torch.device:
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


def _remainder(world: int, sizes: dict[str, int]) -> int:
    """How many replicas the sizes leave of the world."""
    _check_sizes(sizes)
    for name, size in sizes.items():
        if world % size:
            raise ValueError(f"`{name}` must divide the size of the world, {world}, but is {size}")

    product = prod(sizes.values())
    if world % product:
        text = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(f"{text} = {product} must divide the size of the world, {world}")

    return world // product


def _host() -> str:
    """A name for what a process shares its files with: cloned images share a machine id, containers share a kernel."""
    parts = [host_id(), os.uname().nodename]
    for read, path in (
        (_text, "/proc/sys/kernel/random/boot_id"),
        (os.readlink, "/proc/self/ns/mnt"),
        (os.readlink, "/proc/self/ns/net"),
    ):
        try:
            parts.append(read(path))
        except OSError:
            parts.append("")

    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _text(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")

    count, local = torch.cuda.device_count(), _environment_int("LOCAL_RANK") or 0
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return torch.device("cuda", 0)  # each rank of this host is shown a device of its own
    if local >= count:
        raise GangError(
            f"`LOCAL_RANK` is {local}, but this host has {count} CUDA device{'s' if count > 1 else ''}: start no more "
            "processes on a host than it has devices, or give `device`"
        )

    return torch.device("cuda", local)


def _init_process_group(device: torch.device, timeout: timedelta) -> bool:
    """Make the default process group from the environment; whether there is such an environment."""
    wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if not os.environ.get(name)]
    if len(missing) == len(wanted):
        return False
    if missing:
        raise GangError(
            f"the environment has {', '.join(n for n in wanted if n not in missing)}, but not {', '.join(missing)}: "
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
