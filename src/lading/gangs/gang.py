"""One gang: a group of processes along one axis of parallelism, and what they can do together."""

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

_OPERATIONS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "product": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """A group of processes along one axis of parallelism.

    Every rank of a gang makes the same calls in the same order. No call hangs: a rank that is gone is noticed at once,
    one that is stopped within the timeout of the gangs; the :class:`GangError` that all others get names it.

    :ivar rank: this process in the gang.
    :ivar size: how many processes it has.
    :ivar device: where this process keeps its tensors.
    :ivar ranks: its members, as counted in the root gang.
    :ivar hosts: a name for the host of each member: equal for those that share their files.
    :ivar mesh: the mesh of this axis, for ``parallelize_module`` and ``fully_shard``; the one of ``dp`` has the two
        axes ``rdp`` and ``sdp``, the one of ``root`` all four. ``None`` without a process group.
    :ivar group: the process group; ``None`` in a gang of one.
    """

    rank: int
    size: int
    device: torch.device
    ranks: tuple[int, ...] = (0,)
    hosts: tuple[str, ...] = ("",)
    mesh: DeviceMesh | None = field(default=None, repr=False, compare=False)
    group: ProcessGroup | None = field(default=None, repr=False, compare=False)
    line: ControlChannel | None = field(default=None, repr=False, compare=False)

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """The ranks of this gang whose processes run on the same host as this one."""
        return tuple(r for r, host in enumerate(self.hosts) if host == self.hosts[self.rank])

    @property
    def local_rank(self) -> int:
        """The place of this process among those of the gang on its host; who is 0 does what a host does once."""
        return self.local_ranks.index(self.rank)

    @property
    def local_size(self) -> int:
        """How many processes of the gang are on this host."""
        return len(self.local_ranks)

    # --- control -----------------------------------------------------------------------------------------------------

    def first(self, produce: Callable[[], T]) -> T:
        """What rank 0 gets from ``produce``, a value or an exception, on every rank; the others do not call it.

        The others wait for as long as rank 0 is alive and at work.

        :raises GangError: rank 0 was interrupted; a rank is gone, stopped, or at another call.
        :raises InternalError: on all ranks, the value cannot be pickled.
        """
        if self.line is None:
            return produce()

        if self.rank != 0:
            told: T = _unpickle(self._exchange("first()", as_is=True)[0])
            return told

        try:
            with self.line.at_work():
                value = produce()
            payload = _pickle(value)
        except BaseException as ex:
            self._bring("first()", ex)
            raise
        self._exchange("first()", payload)

        return value

    def agree(self, error: BaseException | None = None) -> None:
        """Return on every rank if no rank brings an error; raise on every rank otherwise.

        A rank that has an error to bring should do so at once: it is not kept waiting, and the others hear of it
        wherever they wait for one another. An error that a call of the gang has raised is known to all, and only raised
        again.

        :param error: what went wrong on this rank, which is also what is raised on it.
        :raises GangError: on the ranks that brought none, with their ranks, types and messages.
        """
        if error is not None:
            self._bring("agree()", error)
            raise error
        if self.line is not None:
            self._exchange("agree()")

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """Leave the block on every rank if no rank raises in it; raise on every rank otherwise, as :meth:`agree` does.

        Within, the ranks are :meth:`at_work`.
        """
        try:
            with self.at_work():
                yield
        except BaseException as ex:
            self.agree(ex)
        self.agree()

    def _exchange(self, what: str, payload: bytes = b"", *, as_is: bool = False) -> list[memoryview]:
        """What all ranks bring; where one brings an exception, it is raised: in a GangError, or as it is."""
        assert self.line is not None
        answer = self.line.exchange(self.ranks, what, payload)
        if isinstance(answer, Failure):
            found = answer.exception() if as_is and answer.ranks == self.ranks[:1] else None
            error = found if isinstance(found, Exception) else answer.as_gang_error()
            self.line.remember(self.ranks, error)
            raise error

        return answer

    def _bring(self, what: str, error: BaseException) -> None:
        if self.line is None or self.line.is_known(self.ranks, error):
            return

        failure = Failure.of(self.ranks[self.rank], error)
        try:
            self.line.exchange(self.ranks, what, failure.dump(), failed=True)
        except GangError:
            pass  # whatever else is wrong with the gang, the error of this rank says more
        self.line.remember(self.ranks, error)

    def same(self, value: object, what: str) -> None:
        """Return if all ranks pass the same value: a card, a config, a dtype, a mapping or sequence of them.

        :param what: what the value is, for the message.
        :raises GangError: on all ranks, naming those that differ from the most, and where.
        :raises TypeError: a type that has no stable form.
        """
        if self.line is None:
            digest(value)
            return

        try:
            mine = digest(value)
        except BaseException as ex:
            self._bring(f"same({what})", ex)
            raise

        digests = [bytes(p) for p in self._exchange(f"same({what})", mine)]
        if len(set(digests)) > 1:
            forms = [pickle.loads(p) for p in self._exchange(f"same({what})", pickle.dumps(flatten(value)))]
            ranks, text = differences(digests, forms, self.ranks)
            raise GangError(f"the ranks do not have the same {what}: {text}", ranks=ranks)

    def gather_objects(self, value: T) -> list[T]:
        """The values of all ranks, in the order of their ranks; small ones, as each rank gets them all."""
        return (
            [value] if self.line is None else [_unpickle(p) for p in self._exchange("gather_objects()", _pickle(value))]
        )

    def broadcast_objects(self, objects: list[object], source_rank: int = 0) -> None:
        """Replace the items of ``objects`` by those of ``source_rank``; they travel by pickle."""
        self._check_rank(source_rank)
        if self.line is None:
            return

        payload = b""
        try:
            if self.rank == source_rank:
                payload = _pickle(objects)
        except InternalError as ex:
            self._bring("broadcast_objects()", ex)
            raise
        answer = self._exchange(f"broadcast_objects(source_rank={source_rank})", payload)[source_rank]
        if self.rank != source_rank:
            objects[:] = _unpickle(answer)

    def barrier(self) -> None:
        """Return once every rank is here. It is about the processes, not the streams of their devices."""
        if self.line is not None:
            self._exchange("barrier()")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the others wait for this rank for as long as it is alive and not stopped: a fetch takes hours."""
        with nullcontext() if self.line is None else self.line.at_work():
            yield

    @contextmanager
    def on_host(self) -> Iterator[Gang]:
        """The ranks of the root gang that are on this host, as a gang on the CPU, until the block is left.

        Its process group is its own, so that what a failure leaves unfinished in it is in nobody's way. Where this rank
        is alone on its host, it is a gang of one.

        :raises GangError: another rank failed; or the gang is not that of all processes.
        """
        line = self.line
        if line is None:
            yield Gang(rank=0, size=1, device=torch.device("cpu"), ranks=(self.ranks[self.rank],))
            return
        if self.size != dist.get_world_size():
            raise GangError("the ranks of a host are asked of the root gang: all processes make their groups together")

        def make() -> ProcessGroup | None:
            mine = None
            # Every rank makes every group, in the same order: torch counts them.
            for host in dict.fromkeys(self.hosts):
                ranks = [rank for rank, of in zip(self.ranks, self.hosts, strict=True) if of == host]
                group = dist.new_group(ranks, backend="gloo")
                mine = group if host == self.hosts[self.rank] else mine
            return mine

        group = line.guard(make, "making the process groups of hosts")
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
                line=None if alone else line,
            )
        finally:
            dist.destroy_process_group(group)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def as_process_group(self) -> ProcessGroup:
        """The process group of the gang.

        :raises GangError: a gang of one has none.
        """
        if self.group is None:
            raise GangError("a gang of one process has no process group; ask `gang.group is None` first")

        return self.group

    def broadcast(self, tensor: Tensor, source_rank: int = 0) -> None:
        """Overwrite ``tensor`` with the one of ``source_rank``, of the same shape and dtype."""
        self._check_rank(source_rank)
        if self.group is not None:
            source = self.ranks[source_rank]
            self._run("broadcast()", lambda g, wait: dist.broadcast(tensor, source, group=g, async_op=wait))

    def all_gather(self, output: Tensor, input: Tensor) -> None:  # noqa: A002 (the name that torch has for it)
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
        """Send each rank its part of ``input``, and write to ``output`` what comes from each, in the order of ranks.

        :param output: contiguous, of one dim.
        :param output_sizes: how many elements come from each rank; what that rank has in its ``input_sizes`` for this.
        :param input: likewise, of the same dtype.
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
        """Overwrite ``tensor`` with the reduction of those of all ranks.

        :param op: ``sum``, ``mean`` (floating point), ``product``, ``min`` or ``max``.
        """
        if op not in _OPERATIONS:
            raise ValueError(f"`op` must be one of {', '.join(_OPERATIONS)}, but is {op!r}")
        if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"`op` must not be 'mean' for a tensor of integers, but the dtype is {tensor.dtype}")
        if self.group is None:
            return

        reduce = _OPERATIONS[op]
        self._run("all_reduce()", lambda g, wait: dist.all_reduce(tensor, reduce, group=g, async_op=wait))
        if op == "mean":
            tensor.div_(self.size)

    def _run(self, what: str, collective: Callable[[ProcessGroup, bool], Work | None]) -> None:
        """Run a collective, but wait for it only while all ranks are well."""
        assert self.group is not None
        if self.line is None:  # simulated: nothing is sent, nothing comes
            collective(self.group, False)
            return

        try:
            work = collective(self.group, True)
            assert work is not None
            self.line.watch(work.is_completed, what)
            work.wait()
        except RuntimeError as ex:  # of torch; none of ours is one
            raise self.line.blame(what, ex) from ex

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise ValueError(f"`source_rank` must be less than the size of the gang, {self.size}, but is {rank}")


def _pickle(value: object) -> bytes:
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as ex:
        raise InternalError(
            f"a value of type {type(value).__name__} was to be sent to other ranks, but cannot be pickled: {ex}"
        ) from ex


def _unpickle(payload: memoryview) -> Any:
    # It comes from a process of the same job, which has the token of this line.
    try:
        return pickle.loads(payload)
    except Exception as ex:
        raise InternalError(f"a value that another rank has sent cannot be unpickled here: {ex}") from ex
