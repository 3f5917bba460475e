"""Control messages between ranks, over one connection from each rank to rank 0 and apart from all collectives.

A collective cannot tell a slow rank from one that never comes. A connection can: the kernel closes it when its process
ends, however it ends, so the other ranks know at once. A suspended process keeps its connection; the others notice it
when it misses a call for longer than the timeout. A rank that works for long announces it
(:meth:`ControlChannel.at_work`), and the others wait for it as long as it sends heartbeats.

Every rank of a gang makes the same calls in the same order. The payload that a rank brings to a call reaches all others
through :meth:`ControlChannel.exchange`, on which everything else is built.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Condition, Thread
from typing import Any, TypeAlias, TypeVar
from weakref import WeakSet

from lading.errors import GangError, causes_of
from lading.gangs.coordinator import (
    GRACE,
    GREETING,
    Coordinator,
    Header,
    Outbox,
    Payload,
    configure_socket,
    heartbeat_interval,
    read_frame,
    silence_limit,
)
from lading.gangs.failure import KNOWN, Failure
from lading.gangs.torch_private import PrefixStore, Store, store_host

T = TypeVar("T")

_Cause: TypeAlias = tuple[str, Sequence[int]]
"""The message and ranks of a failure."""


@dataclass(slots=True)
class _Result:
    status: str
    ranks: list[int]
    payloads: list[memoryview]


class ControlChannel:
    """The connection of a rank to rank 0; on rank 0 also the coordinator at the other end.

    :param store: the store in which rank 0 publishes its address and a token for the others.
    :param timeout: the seconds that a rank may be late at a call without a heartbeat.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self._channel_id = secrets.token_hex(8)
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._changed = Condition()
        self._results: dict[tuple[int, tuple[int, ...], int], _Result] = {}
        self._calls: dict[tuple[int, ...], int] = {}
        self._epoch = 0
        self._broken: _Cause | None = None
        self._learned: _Cause | None = None
        self._last_heard = time.monotonic()
        self._silent: list[int] = []
        self._working = 0
        self._coordinator: Coordinator | None = None

        # Ranks open their channels in the same order, so the count of channels tells one from the next.
        place = PrefixStore(f"lading/channel/{store.add(f'lading/channels/{rank}', 1)}", store)
        try:
            if rank == 0:
                listener, token = _listen(store_host(store)), secrets.token_bytes(32)
                self._coordinator = Coordinator(listener, token, size, timeout)
                _publish_address(place, store_host(store), listener, token)
            self._sock = _connect(place, rank, timeout)
        except (OSError, RuntimeError, ValueError) as ex:
            if self._coordinator is not None:
                self._coordinator.sockets[0].close()
            raise GangError(f"rank {rank} cannot reach rank 0: {ex}", ranks=(0,)) from ex

        self._loop = asyncio.new_event_loop()
        self._leaving = asyncio.Event()
        self._outbox = Outbox(self._sock)
        self._tasks: list[asyncio.Task[None]] = []
        self._thread = Thread(target=self._run, name="lading-gangs", daemon=True)
        self._thread.start()
        _OPEN.add(self)
        atexit.register(self.close)

    # --- calls -------------------------------------------------------------------------------------------------------

    def exchange(
        self, members: tuple[int, ...], what: str, payload: Payload = b"", *, failed: bool = False
    ) -> list[memoryview] | Failure:
        """Return the payload that each of ``members`` brings to this call, in their order.

        :param what: the name of the call, the same on all ranks.
        :param failed: the payload is a :class:`Failure`; the call then ends for all ranks without waiting for those
            that have not arrived, and each of them gets the failure when it arrives.
        :returns: the payloads, or the failure that one or more ranks brought.
        :raises GangError: a rank is gone, did not arrive in time, or arrived at another call.
        """
        seq = self._calls.get(members, 0)
        self._calls[members] = seq + 1
        put = {"is": "put", "members": members, "epoch": self._epoch, "seq": seq, "what": what, "failed": failed}
        self._post(put, payload)
        try:
            result = self._await(members, seq, what)
            self._advance_epoch(members, result)
            if result.status != "ok":
                return self._failure_of(result, what)
            if len(members) == self._size:
                self._learned = None  # all ranks went on after that failure
            return result.payloads
        except GangError as ex:
            self.remember(members, ex)
            raise
        except BaseException as ex:
            # On an interrupt, the others must neither wait for nor rely on a rank that has left.
            self._post({**put, "failed": True}, pickle.dumps(Failure.of(self._rank, ex)))
            with contextlib.suppress(GangError):
                result = self._await(members, seq, what, patience=GRACE + 2)
                self._advance_epoch(members, result)
                if result.status != "ok":
                    self.remember(members, ex)
            raise

    def remember(self, members: tuple[int, ...], error: BaseException) -> None:
        """Record that a call has reported this error to all members, so that no later call reports it again."""
        setattr(error, KNOWN, self._call_position(members))

    def is_known(self, members: tuple[int, ...], error: BaseException) -> bool:
        """Return whether the last call reported this error, or one of its causes, to all members."""
        position = self._call_position(members)

        return any(getattr(cause, KNOWN, None) == position for cause in causes_of(error))

    def check(self) -> None:
        """Raise if this rank knows of a failure on any rank.

        :raises GangError: a rank is gone, or brought an error to a call that this rank has not reached yet.
        """
        with self._changed:
            self._check()

    def suspects(self) -> list[int]:
        """Return the ranks that seem to be suspended, after an operation between ranks broke or timed out.

        It waits up to two seconds for a failure to be reported: a broken collective is seen before the dead rank is
        known.

        :raises GangError: as :meth:`check` does.
        """
        end = time.monotonic() + 2
        while time.monotonic() < end:
            self.check()
            time.sleep(0.05)
        if time.monotonic() > self._last_heard + silence_limit(self._timeout):
            return [0]

        return self._silent

    def watch(self, done: Callable[[], bool], what: str) -> None:
        """Wait until ``done()`` is true, while no rank fails and for no longer than the timeout.

        :raises GangError: a rank failed, or the timeout expired.
        """
        start = time.monotonic()
        with self.at_work():  # the others must not take this rank for the late one
            while not done():
                self.check()
                waited = time.monotonic() - start
                if waited > self._timeout + 2:
                    raise self.blame(what, f"it did not end within {self._timeout:g} s")
                # The interval grows with the wait, so that completion is noticed at most a tenth of the wait late.
                time.sleep(min(max(waited / 10, 2e-5), 5e-3))

    def guard(self, make: Callable[[], T], what: str) -> T:
        """Return the result of ``make()``, or raise as soon as a rank dies; torch alone would wait until the timeout.

        :raises GangError: ``make`` raised, a rank failed, or the timeout expired.
        """
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(make())
            except BaseException as ex:
                errors.append(ex)

        thread = Thread(target=run, name="lading-gangs-guarded", daemon=True)
        thread.start()
        self.watch(lambda: not thread.is_alive(), what)
        if errors:
            raise self.blame(what, errors[0]) from errors[0]

        return results[0]

    def blame(self, what: str, why: object) -> GangError:
        """Return the error for an operation between ranks that broke; it names the ranks that seem to be the cause.

        :raises GangError: as :meth:`check` does, with a more specific cause.
        """
        suspects = self.suspects()
        stopped = f"; {_format_ranks(suspects)} stopped sending heartbeats" if suspects else ""

        return self._learn(f"{what} failed on rank {self._rank}: {why}{stopped}", suspects)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the others wait for this rank past the timeout inside the block, unless it dies or is suspended."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def close(self) -> None:
        """Close the connection; for the others this rank is then gone.

        If it learned of a failure, and not all ranks went on after it, the others raise that failure instead.
        """
        atexit.unregister(self.close)
        _OPEN.discard(self)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the others closed their connections first
            self._loop.call_soon_threadsafe(self._leaving.set)
        self._thread.join(10)

    # --- in the thread of the caller ---------------------------------------------------------------------------------

    def _call_position(self, members: tuple[int, ...]) -> tuple[object, ...]:
        return self._channel_id, members, self._epoch, self._calls.get(members, 0)

    def _advance_epoch(self, members: tuple[int, ...], result: _Result) -> None:
        if result.status != "ok" and len(members) == self._size:
            self._epoch += 1
            self._calls.clear()
            with self._changed:
                # A rank that is ahead may already have failed in the new epoch.
                self._results = {key: result for key, result in self._results.items() if key[0] >= self._epoch}

    def _await(self, members: tuple[int, ...], seq: int, what: str, patience: float = float("inf")) -> _Result:
        start = time.monotonic()
        with self._changed:
            while True:
                result = self._results.pop((self._epoch, members, seq), None)
                if result is not None:
                    return result

                self._check()
                if time.monotonic() > start + patience:
                    raise GangError(f"rank 0 does not answer {what}")
                if time.monotonic() - max(start, self._last_heard) > self._timeout + 1:
                    self._break(
                        f"rank 0 has sent no heartbeat for {self._timeout:g} s while rank {self._rank} waited for it "
                        f"at {what}: its process is suspended or its host is unreachable",
                        [0],
                    )
                    # This rank must not come back later: the others may no longer use its payloads.
                    self._loop.call_soon_threadsafe(self._leaving.set)
                self._changed.wait(0.5)

    def _check(self) -> None:
        # A result comes first: a rank may have left because of it.
        for (_, members, _), result in self._results.items():
            if result.status != "ok" and len(members) == self._size:
                bad = self._failure_of(result, "a call of all ranks")
                raise bad.as_gang_error()

        if self._broken is not None:
            raise GangError(*self._broken)

    def _failure_of(self, result: _Result, what: str) -> Failure:
        if result.status == "failed":
            failure = Failure.merge([pickle.loads(p) for p in result.payloads])
            self._learn(failure.text, failure.ranks)
            return failure
        if result.status == "late":
            raise self._learn(
                f"{_format_ranks(result.ranks)} did not reach {what} within {self._timeout:g} s: suspended, or busy "
                "outside `at_work()`",
                result.ranks,
            )

        at: dict[str, list[int]] = {}
        for rank, payload in zip(result.ranks, result.payloads, strict=True):
            at.setdefault(bytes(payload).decode(), []).append(rank)
        fewest = min(map(len, at.values()))
        raise self._learn(
            "the ranks do not make the same call: "
            + ", ".join(f"{_format_ranks(ranks)} at {call}" for call, ranks in at.items()),
            next(ranks for ranks in at.values() if len(ranks) == fewest),
        )

    def _learn(self, message: str, ranks: Sequence[int]) -> GangError:
        """Return the error for a failure, and record the failure as the reason if this rank leaves."""
        self._learned = message, ranks  # not the error, whose traceback would keep the tensors of its callers

        return GangError(message, ranks)

    def _break(self, message: str, ranks: Sequence[int]) -> None:
        """Record why no call can succeed any more; what comes later follows from the first cause."""
        with self._changed:
            self._broken = self._broken or (message, ranks)
            self._changed.notify_all()

    def _lose(self, rank: int) -> None:
        self._break(
            f"rank {rank} is gone: the process was killed, exited, or closed its gangs. Rank {self._rank} cannot "
            "finish any operation that it shares with it.",
            [rank],
        )

    def _post(self, header: Header, payload: Payload = b"") -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: a waiting call raises the reason
            self._loop.call_soon_threadsafe(self._outbox.put, header, payload)

    # --- in the thread of the channel --------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        jobs: list[Coroutine[Any, Any, None]] = [
            self._hang_up(),
            self._outbox.run(),
            self._read(),
            self._send_heartbeats(),
        ]
        if self._coordinator is not None:
            jobs.append(self._coordinator.serve())
        try:
            self._tasks = [self._loop.create_task(job) for job in jobs]
            self._loop.run_until_complete(self._all())
        finally:
            for sock in self._sockets():
                sock.close()
            self._loop.close()

    async def _all(self) -> None:
        try:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            if self._coordinator is not None and not self._tasks[-1].done():
                # The connection of this rank is closed, but the coordinator still has to inform the others.
                await asyncio.wait(self._tasks[-1:])
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._break(f"the connection of rank {self._rank} to the other ranks is closed", [self._rank])

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _hang_up(self) -> None:
        await self._leaving.wait()
        if cause := self._broken or self._learned:
            if self._coordinator is not None:
                self._coordinator.drop_rank(self._rank, cause)
            else:
                self._outbox.put({"is": "leave", "cause": cause})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._outbox.drained()
                if self._coordinator is not None:
                    await self._coordinator.drained()
        self._stop()

    async def _read(self) -> None:
        try:
            while True:
                header, payload = await read_frame(self._sock)
                with self._changed:
                    self._handle_frame(header, payload)
                    self._changed.notify_all()
        except (OSError, EOFError):
            self._lose(0)

    def _handle_frame(self, header: Header, payload: memoryview) -> None:
        self._last_heard = time.monotonic()
        if header["is"] == "ping":
            self._silent = header["silent"]
        elif header["is"] == "lost":
            self._lose(header["rank"])
        elif header["is"] == "failed":
            self._break(*header["cause"])
        elif header["is"] == "result":
            payloads, at = [], 0
            for size in header["sizes"]:
                payloads.append(payload[at : at + size])
                at += size
            key = header["epoch"], tuple(header["members"]), header["seq"]
            self._results[key] = _Result(header["status"], header["ranks"], payloads)

    async def _send_heartbeats(self) -> None:
        while True:
            self._outbox.put({"is": "heartbeat", "working": self._working > 0})
            await asyncio.sleep(heartbeat_interval(self._timeout))

    def _sockets(self) -> list[socket.socket]:
        return [self._sock, *(self._coordinator.sockets if self._coordinator else ())]

    def _disown(self) -> None:
        self._broken = "a forked process is not a member of the gangs of its parent", ()
        for sock in self._sockets():
            sock.close()


_OPEN: WeakSet[ControlChannel] = WeakSet()


def _after_fork() -> None:
    # A forked child (of a data loader, say) would keep the connection open after its parent dies.
    for channel in list(_OPEN):
        channel._disown()
        atexit.unregister(channel.close)
    _OPEN.clear()


os.register_at_fork(after_in_child=_after_fork)


def _format_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# --- rendezvous ------------------------------------------------------------------------------------------------------


def _listen(host: str | None) -> socket.socket:
    """Return a listener on the address of this host that the others use, or on all addresses if it is not local."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or socket.gethostname(), 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=1024)
    except OSError:
        listener = socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)

    return listener


def _publish_address(place: Store, host: str | None, listener: socket.socket, token: bytes) -> None:
    bound, port = listener.getsockname()[:2]
    names = [host or socket.gethostname(), bound]
    place.set("address", f"{port} {token.hex()} {' '.join(dict.fromkeys(names))}")


def _connect(place: Store, rank: int, timeout: float) -> socket.socket:
    place.wait(["address"], timedelta(seconds=timeout))
    port, token, *hosts = place.get("address").decode().split(" ")
    deadline = time.monotonic() + 5  # rank 0 listens before it publishes its address
    while True:
        for host in hosts:
            try:
                sock = socket.create_connection((host, int(port)), timeout=5)
            except OSError as ex:
                error = ex
                continue
            sock.sendall(GREETING.pack(bytes.fromhex(token), rank))
            configure_socket(sock)
            return sock
        if time.monotonic() > deadline:
            raise error
        time.sleep(0.1)
