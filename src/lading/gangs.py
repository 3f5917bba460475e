"""Gangs: the processes that load one model together, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A group of processes along one axis of parallelism; for now always a gang of one."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    def first(self, produce: Callable[[], T]) -> T:
        """What rank 0 gets from ``produce``, a value or an exception, on every rank."""
        return produce()

    def agree(self, error: BaseException | None = None) -> None:
        """Return on every rank if no rank brings an error; raise on every rank otherwise."""
        if error is not None:
            raise error


@dataclass(frozen=True, slots=True, kw_only=True)
class Gangs:
    """All gangs that this process belongs to.

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


def create_fake_gangs(device: torch.device | str) -> Gangs:
    """Gangs of one process, for a model on a single device.

    :raises ValueError: the ``meta`` device, which holds no data.
    """
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("`device` must be a device that holds data, but is the meta device")

    one = Gang(rank=0, size=1, device=device)

    return Gangs(root=one, dp=one, rdp=one, sdp=one, tp=one, pp=one)
