"""The end of all lines, on rank 0: collects what each rank says at a call, and tells all of them how it went.

A frame is a header (JSON) and a payload, which nobody reads here. A rank sends ``put`` (what it brings to a call) and
``beat`` (it has not stopped, and is at work or not). The switchboard sends ``verdict``, ``gone`` (a connection closed,
so that process is no more) and ``ping`` (rank 0 has not stopped, and who seems to have).

Calls are counted for each gang. A failed call of the whole world begins a new *epoch*: all counts start anew and what
was pending is dropped, so that ranks that were at different calls when it failed are in step again.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Header: TypeAlias = dict[str, Any]
Payload: TypeAlias = bytes | memoryview

GREETING = struct.Struct("!32sI")
"""Token and rank."""

GRACE = 1.0
"""Seconds between the first bad news of a call and its verdict: most ranks that fail do so together."""

_SIZES = struct.Struct("!IQ")
_MAX_HEADER = 1 << 24


async def read_frame(sock: socket.socket) -> tuple[Header, memoryview]:
    """The next frame; ``EOFError`` where the other end is closed."""
    header_size, payload_size = _SIZES.unpack(await read_exactly(sock, _SIZES.size))
    if header_size > _MAX_HEADER:
        raise EOFError("not a frame")

    return json.loads(bytes(await read_exactly(sock, header_size))), await read_exactly(sock, payload_size)


async def read_exactly(sock: socket.socket, size: int) -> memoryview:
    """The next ``size`` bytes; ``EOFError`` where the other end is closed."""
    data = memoryview(bytearray(size))
    loop, at = asyncio.get_running_loop(), 0
    while at < size:
        count = await loop.sock_recv_into(sock, data[at:])
        if count == 0:
            raise EOFError("the connection is closed")
        at += count

    return data


def beat(timeout: float) -> float:
    """Seconds between two signs of life."""
    return min(1.0, timeout / 8)


def silence(timeout: float) -> float:
    """Seconds after which a rank that gives no sign of life seems to be stopped; one may be slow to."""
    return min(5.0, timeout / 2)


class Outbox:
    """The frames that wait to be sent over one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: asyncio.Queue[tuple[bytes, Payload]] = asyncio.Queue()
        self._closed = False

    def put(self, header: Header, payload: Payload = b"") -> None:
        """Send a frame after those that wait; the payload is not copied, however many connections it goes to."""
        if self._closed:
            return

        text = json.dumps(header).encode()
        self._frames.put_nowait((_SIZES.pack(len(text), memoryview(payload).nbytes) + text, payload))

    async def run(self) -> None:
        """Send what is put, until the connection closes."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                head, payload = await self._frames.get()
                try:
                    await loop.sock_sendall(self._sock, head)
                    await loop.sock_sendall(self._sock, payload)
                finally:
                    self._frames.task_done()
        finally:
            self._closed = True
            while not self._frames.empty():
                self._frames.get_nowait()
                self._frames.task_done()

    async def drained(self) -> None:
        """Return once all is sent, or can be sent no more."""
        await self._frames.join()


@dataclass(slots=True)
class _Call:
    """What the ranks have brought to a call so far."""

    since: float
    whats: dict[int, str] = field(default_factory=dict)
    payloads: dict[int, memoryview] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    in_grace: bool = False


class Coordinator:
    """Serves ``size`` ranks on ``listener``; all of it runs in the event loop that calls :meth:`serve`."""

    def __init__(self, listener: socket.socket, token: bytes, size: int, timeout: float) -> None:
        self._listener = listener
        self._token = token
        self._size = size
        self._timeout = timeout
        self._connections: dict[int, socket.socket] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._gone: set[int] = set()
        self._epoch = 0
        self._calls: dict[tuple[tuple[int, ...], int], _Call] = {}
        self._settled: dict[tuple[int, ...], int] = {}
        self._heard: dict[int, float] = {}
        self._worked: dict[int, float] = {}
        self._ticked = 0.0

    @property
    def sockets(self) -> list[socket.socket]:
        """All that is open here."""
        return [self._listener, *self._connections.values()]

    async def serve(self) -> None:
        """Answer until cancelled."""
        loop = asyncio.get_running_loop()
        self._ticked = loop.time()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick())
            while True:
                sock, _ = await loop.sock_accept(self._listener)
                tasks.create_task(self._serve(sock))

    async def drained(self) -> None:
        """Return once every rank has been sent all that it should know."""
        await asyncio.gather(*(box.drained() for rank, box in self._outboxes.items() if rank not in self._gone))

    async def _serve(self, sock: socket.socket) -> None:
        rank = await self._greet(sock)
        if rank is None:
            sock.close()
            return

        self._connections[rank] = sock
        box = self._outboxes[rank] = Outbox(sock)
        for gone in self._gone:
            box.put({"is": "gone", "rank": gone})

        sending = asyncio.create_task(box.run())
        sending.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while True:
                header, payload = await read_frame(sock)
                self._take(rank, header, payload)
        except (OSError, EOFError):
            self._lose(rank)
        finally:
            sending.cancel()
            sock.close()

    async def _greet(self, sock: socket.socket) -> int | None:
        """The rank at the other end; ``None`` for a stranger."""
        prepare(sock)
        try:
            async with asyncio.timeout(10):
                token, rank = GREETING.unpack(await read_exactly(sock, GREETING.size))
        except (OSError, EOFError, TimeoutError):
            return None

        if not hmac.compare_digest(token, self._token) or rank >= self._size or rank in self._outboxes:
            return None

        return int(rank)

    def _take(self, rank: int, header: Header, payload: memoryview) -> None:
        self._notice_own_stop()
        now = asyncio.get_running_loop().time()
        self._heard[rank] = now
        if header["is"] == "put" or header["working"]:
            self._worked[rank] = now
        members = tuple(header.get("members", ()))
        if header["is"] != "put" or header["epoch"] != self._epoch or self._gone.intersection(members):
            return

        seq = header["seq"]
        if seq <= self._settled.get(members, -1):
            return

        call = self._calls.setdefault((members, seq), _Call(since=now))
        call.whats[rank] = header["what"]
        call.payloads[rank] = payload
        if header["failed"]:
            call.failed.add(rank)

        if len(call.payloads) == len(members):
            self._settle(members, seq)
        elif not call.in_grace and (call.failed or len(set(call.whats.values())) > 1):
            call.in_grace = True
            asyncio.get_running_loop().call_later(GRACE, self._settle, members, seq, call)

    def _settle(self, members: tuple[int, ...], seq: int, of: _Call | None = None) -> None:
        call = self._calls.get((members, seq))
        if call is None or (of is not None and call is not of):
            return

        if call.failed:
            failed = sorted(call.failed)
            self._tell(members, seq, "failed", failed, [call.payloads[r] for r in failed])
        elif len(set(call.whats.values())) > 1:
            ranks = sorted(call.whats)
            self._tell(members, seq, "differ", ranks, [call.whats[r].encode() for r in ranks])
        else:
            self._tell(members, seq, "ok", members, [call.payloads[r] for r in members])

    def _tell(
        self, members: tuple[int, ...], seq: int, how: str, ranks: Sequence[int], payloads: Sequence[Payload] = ()
    ) -> None:
        header = {
            "is": "verdict",
            "members": members,
            "epoch": self._epoch,
            "seq": seq,
            "how": how,
            "ranks": ranks,
            "sizes": [memoryview(p).nbytes for p in payloads],
        }
        del self._calls[members, seq]
        self._settled[members] = seq
        if how != "ok" and len(members) == self._size:
            self._epoch += 1
            self._calls.clear()
            self._settled.clear()

        joined = b"".join(payloads)
        for rank in members:
            if rank in self._outboxes and rank not in self._gone:
                self._outboxes[rank].put(header, joined)

    def _lose(self, rank: int) -> None:
        """A connection closed: no call that this rank takes part in can end well any more."""
        self._notice_own_stop()
        self._gone.add(rank)
        self._calls = {key: call for key, call in self._calls.items() if rank not in key[0]}
        for other, box in self._outboxes.items():
            if other not in self._gone:
                box.put({"is": "gone", "rank": rank})

    async def _tick(self) -> None:
        while True:
            self._notice_own_stop()
            now = self._ticked = asyncio.get_running_loop().time()
            ping = {
                "is": "ping",
                "silent": [r for r, heard in self._heard.items() if now > heard + silence(self._timeout)],
            }
            for rank, box in self._outboxes.items():
                if rank not in self._gone:
                    box.put(ping)
            for (members, seq), call in list(self._calls.items()):
                late = [
                    r
                    for r in members
                    if r not in call.payloads and now > max(call.since, self._worked.get(r, 0.0)) + self._timeout
                ]
                if late and (members, seq) in self._calls:
                    # One that waits at another call, of another gang, is not the one that all wait for.
                    waiting = {r for other in self._calls.values() for r in other.payloads}
                    self._tell(members, seq, "late", [r for r in late if r not in waiting] or late)
            await asyncio.sleep(beat(self._timeout))

    def _notice_own_stop(self) -> None:
        """Fail what is pending where this process was itself stopped: the others have given up long ago."""
        if asyncio.get_running_loop().time() > self._ticked + self._timeout:
            for members, seq in list(self._calls):
                if (members, seq) in self._calls:
                    self._tell(members, seq, "late", [0])


def prepare(sock: socket.socket) -> None:
    """Small frames go at once; a host that lost its power or its network is noticed in less than a minute."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
