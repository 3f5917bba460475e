"""One gang: a group of processes along one axis of parallelism, and the operations on it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work
from torch.distributed.device_mesh import DeviceMesh

from lading.errors import GangError, InternalError
from lading.gangs.compare import differences, digest, flatten
from lading.gangs.control import ControlChannel
from lading.gangs.failure import Failure

T = TypeVar("T")

ReduceOperation: TypeAlias = Literal["sum", "mean", "product", "min", "max"]

_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A group of processes along one axis of parallelism.

    Every rank of a gang makes the same calls in the same order. No call hangs: a rank that dies is noticed at once, a
    suspended one within the timeout of the gangs, and all other ranks raise a :class:`GangError` that names it.

    :ivar rank: the rank of this process in the gang.
    :ivar size: the number of processes.
    :ivar device: the device of this process.
    :ivar ranks: the members, by their ranks in the root gang.
    :ivar hosts: a name for the host of each member, equal for members that share their files.
    :ivar mesh: the mesh of this axis, for ``parallelize_module`` and ``fully_shard``; that of ``dp`` has the two axes
        ``rdp`` and ``sdp``, that of ``root`` all five. ``None`` without a process group.
    :ivar group: the process group; ``None`` in a gang of one.
    :ivar channel: the control messages between the ranks; ``None`` in a gang of one, or a simulated one.
    """

    rank: int
    size: int
    device: torch.device
    ranks: tuple[int, ...] = (0,)
    hosts: tuple[str, ...] = ("",)
    mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    group: ProcessGroup | None = field(default=None, repr=False, compare=False)
    channel: ControlChannel | None = field(default=None, repr=False, compare=False)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this gang whose processes run on the same host as this one."""
        return tuple(r for r, host in enumerate(self.hosts) if host == self.hosts[self.rank])

    @property
    def local_rank(self) -> int:
        """The index of this process among the members on its host; 0 does the work that a host needs only once."""
        return self.local_ranks.index(self.rank)

    @property
    def local_size(self) -> int:
        """The number of processes of the gang on this host."""
        return len(self.local_ranks)

    # --- control -----------------------------------------------------------------------------------------------------

    def first(self, produce: Callable[[], T]) -> T:
        """Call ``produce`` on rank 0 only, and return its value, or raise its exception, on every rank.

        The other ranks wait for as long as rank 0 is alive and at work.

        :raises GangError: rank 0 was interrupted; a rank is gone, suspended, or at another call.
        :raises InternalError: on all ranks, the value cannot be pickled.
        """
        if self.channel is None:
            return produce()

        if self.rank != 0:
            received: T = _unpickle(self._exchange("first()", as_is=True)[0])
            return received

        try:
            with self.channel.at_work():
                value = produce()
            payload = _pickle(value)
        except BaseException as ex:
            self._report("first()", ex)
            raise
        self._exchange("first()", payload)

        return value

    def agree(self, error: BaseException | None = None) -> None:
        """Return on every rank if no rank passes an error; raise on every rank otherwise.

        A rank with an error should call this at once: it does not wait, and the others raise wherever they wait for one
        another. An error that a call of the gang raised is known to all ranks, and is only raised again.

        :param error: the error of this rank, which is also raised on it.
        :raises GangError: on the ranks that passed no error, with the rank, type and message of each error.
        """
        if error is not None:
            self._report("agree()", error)
            raise error
        if self.channel is not None:
            self._exchange("agree()")

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Raise on every rank if any rank raises inside the block, as :meth:`agree` does.

        The ranks are :meth:`at_work` inside the block.
        """
        try:
            with self.at_work():
                yield
        except BaseException as ex:
            self.agree(ex)
        self.agree()

    def _exchange(self, what: str, payload: bytes = b"", *, as_is: bool = False) -> list[memoryview]:
        """Return the payloads of all ranks; raise an exception that one brings, in a GangError or as it is."""
        assert self.channel is not None
        answer = self.channel.exchange(self.ranks, what, payload)
        if isinstance(answer, Failure):
            found = answer.exception() if as_is and answer.ranks == self.ranks[:1] else None
            error = found if isinstance(found, Exception) else answer.as_gang_error()
            self.channel.remember(self.ranks, error)
            raise error

        return answer

    def _report(self, what: str, error: BaseException) -> None:
        if self.channel is None or self.channel.is_known(self.ranks, error):
            return

        failure = Failure.of(self.ranks[self.rank], error)
        try:
            self.channel.exchange(self.ranks, what, pickle.dumps(failure), failed=True)
        except GangError:
            pass  # the error of this rank says more than any other failure of the gang
        self.channel.remember(self.ranks, error)

    def same(self, value: object, what: str) -> None:
        """Raise unless all ranks pass the same value: a card, a config, a dtype, a mapping or sequence of them.

        :param what: the noun for the value in the message.
        :raises GangError: on all ranks, naming the ranks that differ from the majority, and the fields that differ.
        :raises TypeError: the value holds a type without a stable form.
        """
        if self.channel is None:
            digest(value)
            return

        try:
            mine = digest(value)
        except BaseException as ex:
            self._report(f"same({what})", ex)
            raise

        digests = [bytes(p) for p in self._exchange(f"same({what})", mine)]
        if len(set(digests)) > 1:
            forms = [pickle.loads(p) for p in self._exchange(f"same({what})", pickle.dumps(flatten(value)))]
            ranks, text = differences(digests, forms, self.ranks)
            raise GangError(f"the ranks do not have the same {what}: {text}", ranks=ranks)

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of ranks; keep them small, because every rank gets them all."""
        return (
            [value]
            if self.channel is None
            else [_unpickle(p) for p in self._exchange("gather_objects()", _pickle(value))]
        )

    def broadcast_objects(self, objects: list[object], source_rank: int = 0) -> None:
        """Replace the items of ``objects`` by those of ``source_rank``, which are pickled."""
        self._check_rank(source_rank)
        if self.channel is None:
            return

        payload = b""
        try:
            if self.rank == source_rank:
                payload = _pickle(objects)
        except InternalError as ex:
            self._report("broadcast_objects()", ex)
            raise
        answer = self._exchange(f"broadcast_objects(source_rank={source_rank})", payload)[source_rank]
        if self.rank != source_rank:
            objects[:] = _unpickle(answer)

    def barrier(self) -> None:
        """Wait until every rank is here; it synchronizes processes, not the streams of their devices."""
        if self.channel is not None:
            self._exchange("barrier()")

    def check(self) -> None:
        """Raise if this rank knows of a failure on any rank; for long work that does not wait for the others.

        :raises GangError: a rank failed, is gone, or is suspended.
        """
        if self.channel is not None:
            self.channel.check()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the others wait for this rank inside the block while it runs, however long: a fetch takes hours."""
        with nullcontext() if self.channel is None else self.channel.at_work():
            yield

    @contextmanager
    def on_host(self) -> Iterator[Gang]:
        """Provide a gang on the CPU of the ranks on this host, inside the block.

        It has a process group of its own, so that operations that a failure leaves unfinished in it disturb no other
        gang. A rank that is alone on its host gets a gang of one.

        :raises GangError: another rank failed; or this is not the root gang.
        """
        channel = self.channel
        if channel is None:
            yield Gang(rank=0, size=1, device=torch.device("cpu"), ranks=(self.ranks[self.rank],))
            return
        if self.size != dist.get_world_size():
            raise GangError("`on_host()` needs the root gang, because all processes create their groups together")

        def make() -> ProcessGroup | None:
            mine = None
            # Every rank creates every group, in the same order, because torch counts them.
            for host in dict.fromkeys(self.hosts):
                ranks = [rank for rank, of in zip(self.ranks, self.hosts, strict=True) if of == host]
                group = dist.new_group(ranks, backend="gloo")
                mine = group if host == self.hosts[self.rank] else mine
            return mine

        group = channel.guard(make, "creating the process groups of hosts")
        local = self.local_ranks
        alone = len(local) == 1
        try:
            yield Gang(
                rank=self.local_rank,
                size=len(local),
                device=torch.device("cpu"),
                ranks=tuple(self.ranks[r] for r in local),
                hosts=tuple(self.hosts[r] for r in local),
                group=None if alone else group,
                channel=None if alone else channel,
            )
        finally:
            dist.destroy_process_group(group)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def as_process_group(self) -> ProcessGroup:
        """Return the process group of the gang.

        :raises GangError: the gang has one process, and therefore no process group.
        """
        if self.group is None:
            raise GangError("a gang of one process has no process group; check `gang.group is None` first")

        return self.group

    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        """Overwrite ``tensor`` with that of ``source_rank``, of the same shape and dtype."""
        self._check_rank(source_rank)
        if self.group is not None:
            source = self.ranks[source_rank]
            self._run("broadcast()", lambda g, wait: dist.broadcast(tensor, source, group=g, async_op=wait))

    def all_gather(self, output: Tensor, input: Tensor) -> None:  # noqa: A002 (torch's name)
        """Write the tensors of all ranks to ``output``, in the order of their ranks.

        :param output: contiguous, of shape ``(size, *input.shape)``.
        :param input: contiguous, of the same shape on every rank.
        """
        if output.shape != (self.size, *input.shape) or output.dtype != input.dtype:
            raise ValueError(
                f"`output` must have the shape {(self.size, *input.shape)} and the dtype {input.dtype}, "
                f"but has {tuple(output.shape)} and {output.dtype}"
            )
        if not output.is_contiguous() or not input.is_contiguous():
            raise ValueError("`output` and `input` must be contiguous")

        if self.group is None:
            output[0].copy_(input)
            return

        flat, own = output.view(-1), input.view(-1)
        self._run("all_gather()", lambda g, wait: _all_gather(flat, own, group=g, async_op=wait))

    def all_to_all(
        self,
        output: Tensor,
        output_sizes: Sequence[int],
        input: Tensor,  # noqa: A002
        input_sizes: Sequence[int],
    ) -> None:
        """Send each rank its part of ``input``, and write the parts from all ranks to ``output``, in order of rank.

        :param output: contiguous, with one dim.
        :param output_sizes: the number of elements from each rank, equal to that rank's ``input_sizes`` for this one.
        :param input: contiguous, with one dim and the same dtype.
        """
        if self.group is None:
            output.copy_(input)
            return

        received, sent = list(output_sizes), list(input_sizes)
        self._run(
            "all_to_all()",
            lambda g, wait: dist.all_to_all_single(output, input, received, sent, group=g, async_op=wait),
        )

    def all_reduce(self, tensor: Tensor, op: ReduceOperation = "sum") -> None:
        """Overwrite ``tensor`` with the reduction of the tensors of all ranks.

        :param op: ``sum``, ``mean`` (floating point), ``product``, ``min`` or ``max``.
        """
        if op not in _REDUCE_OPS:
            raise ValueError(f"`op` must be one of {', '.join(_REDUCE_OPS)}, but is {op!r}")
        if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"`op` must not be 'mean' for a tensor of integers, but the dtype is {tensor.dtype}")
        if self.group is None:
            return

        reduce = _REDUCE_OPS[op]
        self._run("all_reduce()", lambda g, wait: dist.all_reduce(tensor, reduce, group=g, async_op=wait))
        if op == "mean":
            tensor.div_(self.size)

    def _run(self, what: str, collective: Callable[[ProcessGroup, bool], Work | None]) -> None:
        """Run a collective, and stop waiting for it when a rank fails."""
        assert self.group is not None
        if self.channel is None:  # simulated: nothing is sent or received
            collective(self.group, False)
            return

        try:
            work = collective(self.group, True)
            assert work is not None
            self.channel.watch(work.is_completed, what)
            work.wait()
        except RuntimeError as ex:  # torch's: no error of lading is a RuntimeError
            raise self.channel.blame(what, ex) from ex

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"`source_rank` must be less than the size of the gang, {self.size}, but is {rank}")


def _pickle(value: object) -> bytes:
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as ex:
        raise InternalError(
            f"a value of type {type(value).__name__} cannot be pickled to send it to other ranks: {ex}"
        ) from ex


def _unpickle(payload: memoryview) -> Any:
    # The payload comes from a process of the same job, which has the token of the channel.
    try:
        return pickle.loads(payload)
    except Exception as ex:
        raise InternalError(f"a value from another rank cannot be unpickled: {ex}") from ex
