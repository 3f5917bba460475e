"""How control flows between ranks: small messages over a connection of each rank to rank 0, besides all collectives.

A collective cannot tell a rank that is slow from one that will never come. A connection can: the kernel closes it when
its process ends, however it ends, so that the others know at once. A process that is stopped keeps its connection; it
is noticed as it misses a call for longer than the timeout. A rank that works for long says so (:meth:`Line.at_work`)
and is waited for as long as it still breathes.

Every rank of a gang makes the same calls in the same order. What it brings to a call reaches all others through
:meth:`Line.exchange`, on which everything else is built.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Condition, Thread
from typing import Any, TypeVar
from weakref import WeakSet

from lading.errors import GangError
from lading.gangs.coordinator import (
    GRACE,
    GREETING,
    Coordinator,
    Header,
    Outbox,
    Payload,
    beat,
    prepare,
    read_frame,
    silence,
)
from lading.gangs.failure import KNOWN, Failure
from lading.gangs.torch_private import PrefixStore, Store, store_host

T = TypeVar("T")


@dataclass(slots=True)
class _Verdict:
    how: str
    ranks: list[int]
    payloads: list[memoryview]


class ControlChannel:
    """The connection of a rank to rank 0, which also holds the other ends.

    :param store: where rank 0 leaves its address and a token for the others.
    :param timeout: seconds that a rank may be late at a call without a sign of life.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        self._id = secrets.token_hex(8)
        self._rank = rank
        self._size = size
        self._timeout = timeout
        self._news = Condition()
        self._verdicts: dict[tuple[int, tuple[int, ...], int], _Verdict] = {}
        self._calls: dict[tuple[int, ...], int] = {}
        self._epoch = 0
        self._gone: list[int] = []
        self._broken: GangError | None = None
        self._heard = time.monotonic()
        self._silent: list[int] = []
        self._working = 0
        self._switchboard: Coordinator | None = None

        # Ranks make their lines in the same order, so the count of them tells one line from the next.
        place = PrefixStore(f"lading/line/{store.add(f'lading/lines/{rank}', 1)}", store)
        try:
            if rank == 0:
                listener, token = _listen(store_host(store)), secrets.token_bytes(32)
                self._switchboard = Coordinator(listener, token, size, timeout)
                _leave_address(place, store_host(store), listener, token)
            self._sock = _connect(place, rank, timeout)
        except (OSError, RuntimeError, ValueError) as ex:
            if self._switchboard is not None:
                self._switchboard.sockets[0].close()
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
        """What each of ``members`` brings to this call, in their order.

        :param what: the name of the call; all have to be at the same.
        :param failed: the payload is a :class:`Failure`; the call then ends for all without waiting for those
            that are still on their way, and every one of them gets it when it comes.
        :returns: the payloads, or a failure that one or more of the ranks have brought.
        :raises GangError: a rank is gone, did not come in time, or came to another call.
        """
        seq = self._calls.get(members, 0)
        self._calls[members] = seq + 1
        put = {"is": "put", "members": members, "epoch": self._epoch, "seq": seq, "what": what, "failed": failed}
        self._post(put, payload)
        try:
            verdict = self._await(members, seq, what)
            self._adopt(members, verdict)
            return verdict.payloads if verdict.how == "ok" else self._judge(verdict, what)
        except GangError as ex:
            self.remember(members, ex)
            raise
        except BaseException as ex:
            # An interrupt: the others must not wait for, nor count on, a rank that has left.
            self._post({**put, "failed": True}, Failure.of(self._rank, ex).dump())
            with contextlib.suppress(GangError):
                verdict = self._await(members, seq, what, patience=GRACE + 2)
                self._adopt(members, verdict)
                if verdict.how != "ok":
                    self.remember(members, ex)
            raise

    def remember(self, members: tuple[int, ...], error: BaseException) -> None:
        """Note that a call has told all members of this error, so that no other call has to."""
        setattr(error, KNOWN, self._position(members))

    def is_known(self, members: tuple[int, ...], error: BaseException | None) -> bool:
        """Whether the last call has told all members of this error, or of one that it came from."""
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            if getattr(error, KNOWN, None) == self._position(members):
                return True
            seen.add(id(error))
            error = error.__cause__ or error.__context__

        return False

    def check(self) -> None:
        """Return if, as far as is known here, all ranks are well.

        :raises GangError: a rank is gone, or has brought an error to a call that this rank has not come to yet.
        """
        with self._news:
            self._check()

    def suspects(self) -> list[int]:
        """The ranks that seem to be stopped, where something between ranks has broken or not ended in time.

        It waits a moment for bad news, as what a death breaks is seen before it is known who died.

        :raises GangError: what :meth:`check` raises.
        """
        end = time.monotonic() + 2
        while time.monotonic() < end:
            self.check()
            time.sleep(0.05)
        if time.monotonic() > self._heard + silence(self._timeout):
            return [0]

        return self._silent

    def watch(self, done: Callable[[], bool], what: str) -> None:
        """Wait until ``done()``, for as long as all ranks are well, and no longer than the timeout.

        :raises GangError: it is not done, and why.
        """
        start = time.monotonic()
        with self.at_work():  # for the others: it is not this rank that is late
            while not done():
                self.check()
                waited = time.monotonic() - start
                if waited > self._timeout + 2:
                    raise self.blame(what, f"it did not end within {self._timeout:g} s")
                # What takes long is looked at seldom, and noticed late by a tenth of what it took.
                time.sleep(min(max(waited / 10, 2e-5), 5e-3))

    def guard(self, make: Callable[[], T], what: str) -> T:
        """What ``make`` returns, unless a rank dies meanwhile: torch would wait for it until the timeout.

        :raises GangError: it did not end well, and why.
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
        """The error for something between ranks that broke; it names those that seem to be the cause.

        :raises GangError: what :meth:`check` raises, which says more.
        """
        suspects = self.suspects()
        stopped = f"; {_names(suspects)} gave no sign of life for some time" if suspects else ""

        return GangError(f"{what} failed on rank {self._rank}: {why}{stopped}", ranks=suspects)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the others wait for this rank for longer than the timeout, unless it dies or is stopped."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    def close(self) -> None:
        """Hang up; to the others this rank is gone."""
        atexit.unregister(self.close)
        _OPEN.discard(self)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the others have hung up before
            self._loop.call_soon_threadsafe(self._leaving.set)
        self._thread.join(10)

    # --- waiting, in the thread of the caller ------------------------------------------------------------------------

    def _position(self, members: tuple[int, ...]) -> tuple[object, ...]:
        return self._id, members, self._epoch, self._calls.get(members, 0)

    def _adopt(self, members: tuple[int, ...], verdict: _Verdict) -> None:
        if verdict.how != "ok" and len(members) == self._size:
            self._epoch += 1
            self._calls.clear()
            with self._news:
                # A rank that is ahead may have failed in the new epoch already.
                self._verdicts = {key: v for key, v in self._verdicts.items() if key[0] >= self._epoch}

    def _await(self, members: tuple[int, ...], seq: int, what: str, patience: float = float("inf")) -> _Verdict:
        start = time.monotonic()
        with self._news:
            while True:
                verdict = self._verdicts.pop((self._epoch, members, seq), None)
                if verdict is not None:
                    return verdict

                self._check()
                if time.monotonic() > start + patience:
                    raise GangError(f"there is no answer to {what}")
                if time.monotonic() - max(start, self._heard) > self._timeout + 1:
                    # One that has left does not come back: what it brought may be used by others no more.
                    self._loop.call_soon_threadsafe(self._stop)
                    self._broken = GangError(
                        f"rank 0 gives no sign of life for {self._timeout:g} s: rank {self._rank} waited for it at "
                        f"{what}. Its process is stopped or its host cannot be reached.",
                        ranks=(0,),
                    )
                self._news.wait(0.5)

    def _check(self) -> None:
        if self._gone:
            names = _names(self._gone)
            raise GangError(
                f"{names} {'is' if len(self._gone) == 1 else 'are'} gone: the process was killed, has exited, or has "
                f"closed its gangs. Nothing that rank {self._rank} shares with it can be finished.",
                ranks=self._gone,
            )
        if self._broken is not None:
            raise GangError(self._broken.message, ranks=self._broken.ranks)

        for (_, members, _), verdict in self._verdicts.items():
            if verdict.how != "ok" and len(members) == self._size:
                bad = self._judge(verdict, "a call of all ranks")
                raise bad.as_gang_error()

    def _judge(self, verdict: _Verdict, what: str) -> Failure:
        if verdict.how == "failed":
            return Failure.merge([Failure.load(p) for p in verdict.payloads])
        if verdict.how == "late":
            raise GangError(
                f"{_names(verdict.ranks)} did not come to {what} within {self._timeout:g} s: stopped, or busy with "
                "something else without saying so",
                ranks=verdict.ranks,
            )

        at: dict[str, list[int]] = {}
        for rank, payload in zip(verdict.ranks, verdict.payloads, strict=True):
            at.setdefault(bytes(payload).decode(), []).append(rank)
        fewest = min(map(len, at.values()))
        raise GangError(
            "the ranks do not do the same: " + ", ".join(f"{_names(ranks)} at {call}" for call, ranks in at.items()),
            ranks=next(ranks for ranks in at.values() if len(ranks) == fewest),
        )

    def _post(self, header: Header, payload: Payload = b"") -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: whoever waits sees why
            self._loop.call_soon_threadsafe(self._outbox.put, header, payload)

    # --- in the thread of the line -----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        jobs: list[Coroutine[Any, Any, None]] = [self._hang_up(), self._outbox.run(), self._read(), self._beat()]
        if self._switchboard is not None:
            jobs.append(self._switchboard.serve())
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
            if self._switchboard is not None and not self._tasks[-1].done():
                # This rank has been cut off; the others still have to hear of it.
                await asyncio.wait(self._tasks[-1:])
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            with self._news:
                self._broken = self._broken or GangError(
                    f"the connection of rank {self._rank} to the other ranks is closed", ranks=(self._rank,)
                )
                self._news.notify_all()

    def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    async def _hang_up(self) -> None:
        await self._leaving.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await self._outbox.drained()
                if self._switchboard is not None:
                    await self._switchboard.drained()
        self._stop()

    async def _read(self) -> None:
        try:
            while True:
                header, payload = await read_frame(self._sock)
                with self._news:
                    self._hear(header, payload)
                    self._news.notify_all()
        except (OSError, EOFError):
            with self._news:
                self._gone = self._gone or [0]
                self._news.notify_all()

    def _hear(self, header: Header, payload: memoryview) -> None:
        self._heard = time.monotonic()
        if header["is"] == "ping":
            self._silent = header["silent"]
        elif header["is"] == "gone":
            self._gone = sorted({*self._gone, header["rank"]})
        elif header["is"] == "verdict":
            payloads, at = [], 0
            for size in header["sizes"]:
                payloads.append(payload[at : at + size])
                at += size
            key = header["epoch"], tuple(header["members"]), header["seq"]
            self._verdicts[key] = _Verdict(header["how"], header["ranks"], payloads)

    async def _beat(self) -> None:
        while True:
            self._outbox.put({"is": "beat", "working": self._working > 0})
            await asyncio.sleep(beat(self._timeout))

    def _sockets(self) -> list[socket.socket]:
        return [self._sock, *(self._switchboard.sockets if self._switchboard else ())]

    def _abandon(self) -> None:
        self._broken = GangError("a forked process is not a member of the gangs of its parent")
        for sock in self._sockets():
            sock.close()


_OPEN: WeakSet[ControlChannel] = WeakSet()


def _after_fork() -> None:
    # A forked child (of a data loader, say) would hold the connection open when its parent has died.
    for line in list(_OPEN):
        line._abandon()
        atexit.unregister(line.close)
    _OPEN.clear()


os.register_at_fork(after_in_child=_after_fork)


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


# --- finding one another ---------------------------------------------------------------------------------------------


def _listen(host: str | None) -> socket.socket:
    """A listener on the address that the others know this host by, or on all where that is not one of its own."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host or socket.gethostname(), 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family, backlog=1024)
    except OSError:
        listener = socket.create_server(("", 0), backlog=1024)
    listener.setblocking(False)

    return listener


def _leave_address(place: Store, host: str | None, listener: socket.socket, token: bytes) -> None:
    bound, port = listener.getsockname()[:2]
    names = [host or socket.gethostname(), bound]
    place.set("address", f"{port} {token.hex()} {' '.join(dict.fromkeys(names))}")


def _connect(place: Store, rank: int, timeout: float) -> socket.socket:
    place.wait(["address"], timedelta(seconds=timeout))
    port, token, *hosts = place.get("address").decode().split(" ")
    deadline = time.monotonic() + 5  # it listened before it left its address
    while True:
        for host in hosts:
            try:
                sock = socket.create_connection((host, int(port)), timeout=5)
            except OSError as ex:
                error = ex
                continue
            sock.sendall(GREETING.pack(bytes.fromhex(token), rank))
            prepare(sock)
            return sock
        if time.monotonic() > deadline:
            raise error
        time.sleep(0.1)
