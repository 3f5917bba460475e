"""Real processes over gloo, kept alive between cases: a pool of N ranks with torchrun's environment.

::

    with Pool(4) as pool:
        outcomes = pool.run(function, "argument")       # on every rank; a value or an exception of each
        outcomes = pool.run(function, each=[1, 2, 3, 4])  # with an argument of its own for each rank
        pool.start(function); pool.send(2, SIGKILL); outcomes = pool.collect(within=10)

A function is found by its file and name, so a test passes one that its own module defines at top level. Processes are
forked by a server that has torch imported already: a fresh pool takes a fraction of a second.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

PRELOAD = ["torch", "torch.distributed.device_mesh", "torch.distributed.tensor.parallel", "torch.distributed.fsdp"]
PRELOAD += ["lading.models.hub", "lading.gangs", "lading.errors", "transformers.modeling_utils"]

PATIENCE = 120.0
"""The seconds after which a rank counts as hanging; slowness is not a failure."""


class WorkerHangError(Exception):
    """A rank did not answer in time; the pool is killed."""


@dataclass(frozen=True)
class Outcome:
    """What came of a function on one rank.

    ``error`` is the exception (a ``RuntimeError`` with its text where it does not pickle); ``dead`` says that the
    process ended instead.
    """

    rank: int
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    dead: bool = False

    def get(self) -> Any:
        """The value; raises what the function raised."""
        if self.dead:
            raise RuntimeError(f"the process of rank {self.rank} ended")
        if self.error is not None:
            self.error.add_note(self.trace)
            raise self.error
        return self.value


class Pool:
    """``size`` processes with the environment that torchrun gives them; rank 0 or the parent serves the store.

    :param agent: the parent serves the store, as torchrun does; rank 0 otherwise.
    :param env: more of the environment, the same for every rank.
    """

    def __init__(self, size: int, *, agent: bool = True, env: dict[str, str] | None = None) -> None:
        import torch.distributed as dist

        self.size = size
        # The port of a store that the parent serves is taken; so that rank 0 can have it, it is let go.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._env = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": str(agent),
            **(env or {}),
        }
        if not agent:
            del self._store
        self._started = 0.0
        self._outcomes: dict[int, Outcome] = {}
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, {**self._env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, list(sys.path)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    @property
    def closed(self) -> bool:
        """Whether its processes have been ended."""
        return not self._processes

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to the process of a rank."""
        os.kill(self.pid(rank), number)

    def start(self, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None) -> None:
        """Have every rank call ``function``; the argument in ``each`` for the rank, if given, comes first."""
        name = (function.__module__, function.__code__.co_filename, function.__qualname__)
        self._outcomes = {}
        self._started = time.monotonic()
        for rank, connection in enumerate(self._connections):
            own = (*([each[rank]] if each is not None else []), *args)
            try:
                connection.send_bytes(pickle.dumps((name, own)))
            except OSError:
                self._outcomes[rank] = Outcome(rank, dead=True)

    def collect(self, *, within: float = PATIENCE, without: Sequence[int] = ()) -> list[Outcome]:
        """What came of it, in the order of the ranks; those in ``without`` are not waited for, nor returned.

        :raises WorkerHangError: a rank did not answer ``within`` so many seconds of the start.
        """
        awaited = set(range(self.size)) - set(without)
        while missing := awaited - self._outcomes.keys():
            left = self._started + within - time.monotonic()
            ready = wait([self._connections[r] for r in missing], timeout=max(left, 0))
            if not ready:
                self.close()
                others = "\n".join(f"rank {r}: {o.trace or o}" for r, o in sorted(self._outcomes.items()))
                raise WorkerHangError(f"ranks {sorted(missing)} did not answer within {within} s\n{others}")
            for rank in missing:
                if self._connections[rank] in ready:
                    self._outcomes[rank] = self._receive(rank)

        return [self._outcomes[rank] for rank in sorted(awaited)]

    def _receive(self, rank: int) -> Outcome:
        try:
            value, error, trace = pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionError):
            return Outcome(rank, dead=True)
        return Outcome(rank, value, error, trace)

    def run(
        self, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None, within: float = PATIENCE
    ) -> list[Outcome]:
        """:meth:`start`, then :meth:`collect`."""
        self.start(function, *args, each=each)
        return self.collect(within=within)

    def values(
        self, function: Callable[..., Any], *args: Any, each: Sequence[Any] | None = None, within: float = PATIENCE
    ) -> list[Any]:
        """The values of all ranks; raises what one of them raised."""
        return [outcome.get() for outcome in self.run(function, *args, each=each, within=within)]

    def close(self) -> None:
        """End all processes, the stopped ones too, and leave no zombie."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
            process.close()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(connection: Connection, env: dict[str, str], path: list[str]) -> None:
    os.environ.update(env)
    warnings.simplefilter("error")
    sys.path[:] = path
    while True:
        try:
            (module, file, name), args = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

        try:
            answer = (_find(module, file, name)(*args), None, "")
        except BaseException as ex:
            answer = (None, ex, traceback.format_exc())
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)
        except Exception as ex:
            error = RuntimeError(f"{type(answer[1]).__name__}: {answer[1]}" if answer[1] is not None else str(ex))
            data = pickle.dumps((None, error, answer[2]))
        connection.send_bytes(data)


def _find(module: str, file: str, name: str) -> Callable[..., Any]:
    # By file: how pytest names the modules of tests is its own affair, but their values pickle by that name.
    if module not in sys.modules:
        spec = importlib.util.spec_from_file_location(module, file)
        assert spec is not None
        assert spec.loader is not None
        loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)

    found: Any = sys.modules[module]
    for part in name.split("."):
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]
