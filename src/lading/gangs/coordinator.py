"""The coordinator on rank 0: the server that collects the payloads of each call and sends the result to all ranks.

A frame is a header (JSON) and a payload, which the coordinator forwards unread. A rank sends ``put`` (its payload for a
call), ``heartbeat`` (it runs, and is at work or not) and ``leave`` (it closes its connection because of a failure). The
coordinator sends ``result``, ``ping`` (rank 0 runs, and the ranks that seem to be suspended) and, once, why the ranks
cannot go on together: ``lost`` (a connection closed, so that process has ended) or ``failed`` (the failure because of
which a rank left). Ranks that leave after that do so because of it, and are not named.

Calls are counted per gang. A failed call of the whole world begins a new *epoch*: all counts restart at zero and
pending calls are dropped, so that ranks that were at different calls are in step again.
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
"""The greeting of a rank: token and rank."""

GRACE = 1.0
"""The seconds between the first failure in a call and its result: most ranks that fail do so together."""

_SIZES = struct.Struct("!IQ")
_MAX_HEADER = 1 << 24


async def read_frame(sock: socket.socket) -> tuple[Header, memoryview]:
    """Read the next frame, or raise ``EOFError`` if the other end is closed."""
    header_size, payload_size = _SIZES.unpack(await read_exactly(sock, _SIZES.size))
    if header_size > _MAX_HEADER:
        raise EOFError("not a frame")

    return json.loads(bytes(await read_exactly(sock, header_size))), await read_exactly(sock, payload_size)


async def read_exactly(sock: socket.socket, size: int) -> memoryview:
    """Read the next ``size`` bytes, or raise ``EOFError`` if the other end is closed."""
    data = memoryview(bytearray(size))
    loop, at = asyncio.get_running_loop(), 0
    while at < size:
        count = await loop.sock_recv_into(sock, data[at:])
        if count == 0:
            raise EOFError("the connection is closed")
        at += count

    return data


def heartbeat_interval(timeout: float) -> float:
    """Return the seconds between two heartbeats."""
    return min(1.0, timeout / 8)


def silence_limit(timeout: float) -> float:
    """Return the seconds without a heartbeat after which a rank seems to be suspended; a slow rank may be late."""
    return min(5.0, timeout / 2)


class Outbox:
    """The queue of frames to send over one connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: asyncio.Queue[tuple[bytes, Payload]] = asyncio.Queue()
        self._closed = False

    def put(self, header: Header, payload: Payload = b"") -> None:
        """Queue a frame; the payload is not copied, however many connections it goes to."""
        if self._closed:
            return

        text = json.dumps(header).encode()
        self._frames.put_nowait((_SIZES.pack(len(text), memoryview(payload).nbytes) + text, payload))

    async def run(self) -> None:
        """Send queued frames until the connection closes."""
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
        """Wait until every frame is sent, or the connection is closed."""
        await self._frames.join()


@dataclass(slots=True)
class _Call:
    """The state of a call: the names and payloads that ranks have brought so far."""

    since: float
    names: dict[int, str] = field(default_factory=dict)
    payloads: dict[int, memoryview] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    in_grace: bool = False


class Coordinator:
    """The server of ``size`` ranks on ``listener``; it runs in the event loop that calls :meth:`serve`."""

    def __init__(self, listener: socket.socket, token: bytes, size: int, timeout: float) -> None:
        self._listener = listener
        self._token = token
        self._size = size
        self._timeout = timeout
        self._connections: dict[int, socket.socket] = {}
        self._outboxes: dict[int, Outbox] = {}
        self._lost: set[int] = set()
        self._cause: Header | None = None
        self._epoch = 0
        self._calls: dict[tuple[tuple[int, ...], int], _Call] = {}
        self._settled: dict[tuple[int, ...], int] = {}
        self._last_heard: dict[int, float] = {}
        self._last_worked: dict[int, float] = {}
        self._last_tick = 0.0

    @property
    def sockets(self) -> list[socket.socket]:
        """The listener and all open connections."""
        return [self._listener, *self._connections.values()]

    async def serve(self) -> None:
        """Serve ranks until cancelled."""
        loop = asyncio.get_running_loop()
        self._last_tick = loop.time()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_ranks())
            while True:
                sock, _ = await loop.sock_accept(self._listener)
                tasks.create_task(self._serve(sock))

    async def drained(self) -> None:
        """Wait until all frames to all ranks are sent."""
        await asyncio.gather(*(box.drained() for rank, box in self._outboxes.items() if rank not in self._lost))

    async def _serve(self, sock: socket.socket) -> None:
        rank = await self._authenticate(sock)
        if rank is None:
            sock.close()
            return

        self._connections[rank] = sock
        box = self._outboxes[rank] = Outbox(sock)
        if self._cause is not None:
            box.put(self._cause)

        sending = asyncio.create_task(box.run())
        sending.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            while True:
                header, payload = await read_frame(sock)
                self._handle_frame(rank, header, payload)
        except (OSError, EOFError):
            self.drop_rank(rank)
        finally:
            sending.cancel()
            sock.close()

    async def _authenticate(self, sock: socket.socket) -> int | None:
        """Return the rank at the other end, or ``None`` if it does not present the token."""
        configure_socket(sock)
        try:
            async with asyncio.timeout(10):
                token, rank = GREETING.unpack(await read_exactly(sock, GREETING.size))
        except (OSError, EOFError, TimeoutError):
            return None

        if not hmac.compare_digest(token, self._token) or rank >= self._size or rank in self._outboxes:
            return None

        return int(rank)

    def _handle_frame(self, rank: int, header: Header, payload: memoryview) -> None:
        self._detect_own_pause()
        now = asyncio.get_running_loop().time()
        self._last_heard[rank] = now
        if header["is"] == "leave":
            self.drop_rank(rank, header["cause"])
            return
        if header["is"] == "put" or header["working"]:
            self._last_worked[rank] = now
        members = tuple(header.get("members", ()))
        if header["is"] != "put" or header["epoch"] != self._epoch or self._lost.intersection(members):
            return

        seq = header["seq"]
        if seq <= self._settled.get(members, -1):
            return

        call = self._calls.setdefault((members, seq), _Call(since=now))
        call.names[rank] = header["what"]
        call.payloads[rank] = payload
        if header["failed"]:
            call.failed.add(rank)

        if len(call.payloads) == len(members):
            self._settle(members, seq)
        elif not call.in_grace and (call.failed or len(set(call.names.values())) > 1):
            call.in_grace = True
            asyncio.get_running_loop().call_later(GRACE, self._settle, members, seq, call)

    def _settle(self, members: tuple[int, ...], seq: int, expected: _Call | None = None) -> None:
        call = self._calls.get((members, seq))
        if call is None or (expected is not None and call is not expected):
            return

        if call.failed:
            failed = sorted(call.failed)
            self._send_result(members, seq, "failed", failed, [call.payloads[r] for r in failed])
        elif len(set(call.names.values())) > 1:
            ranks = sorted(call.names)
            self._send_result(members, seq, "differ", ranks, [call.names[r].encode() for r in ranks])
        else:
            self._send_result(members, seq, "ok", members, [call.payloads[r] for r in members])

    def _send_result(
        self, members: tuple[int, ...], seq: int, status: str, ranks: Sequence[int], payloads: Sequence[Payload] = ()
    ) -> None:
        header = {
            "is": "result",
            "members": members,
            "epoch": self._epoch,
            "seq": seq,
            "status": status,
            "ranks": ranks,
            "sizes": [memoryview(p).nbytes for p in payloads],
        }
        del self._calls[members, seq]
        self._settled[members] = seq
        if status != "ok" and len(members) == self._size:
            self._epoch += 1
            self._calls.clear()
            self._settled.clear()

        joined = b"".join(payloads)
        for rank in members:
            if rank in self._outboxes and rank not in self._lost:
                self._outboxes[rank].put(header, joined)

    def drop_rank(self, rank: int, cause: object = None) -> None:
        """Drop a rank that left, with all pending calls that it takes part in.

        :param cause: the message and ranks of the failure that made it leave, if any.
        """
        self._detect_own_pause()
        self._lost.add(rank)
        self._calls = {key: call for key, call in self._calls.items() if rank not in key[0]}
        if self._cause is not None:
            return

        self._cause = {"is": "lost", "rank": rank} if cause is None else {"is": "failed", "cause": cause}
        for other, box in self._outboxes.items():
            if other not in self._lost:
                box.put(self._cause)

    async def _watch_ranks(self) -> None:
        while True:
            self._detect_own_pause()
            now = self._last_tick = asyncio.get_running_loop().time()
            ping = {
                "is": "ping",
                "silent": [r for r, heard in self._last_heard.items() if now > heard + silence_limit(self._timeout)],
            }
            for rank, box in self._outboxes.items():
                if rank not in self._lost:
                    box.put(ping)
            for (members, seq), call in list(self._calls.items()):
                late = [
                    r
                    for r in members
                    if r not in call.payloads and now > max(call.since, self._last_worked.get(r, 0.0)) + self._timeout
                ]
                if late and (members, seq) in self._calls:
                    # A rank that waits at a call of another gang is not the one that delays the others.
                    waiting = {r for other in self._calls.values() for r in other.payloads}
                    self._send_result(members, seq, "late", [r for r in late if r not in waiting] or late)
            await asyncio.sleep(heartbeat_interval(self._timeout))

    def _detect_own_pause(self) -> None:
        """Fail the pending calls if this process was itself suspended: the others have given up by then."""
        if asyncio.get_running_loop().time() > self._last_tick + self._timeout:
            for members, seq in list(self._calls):
                if (members, seq) in self._calls:
                    self._send_result(members, seq, "late", [0])


def configure_socket(sock: socket.socket) -> None:
    """Send small frames without delay, and detect a host without power or network in less than a minute."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
