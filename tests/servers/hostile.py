"""A web server on loopback that does all that a good one does, and misbehaves on command.

A behavior is a function of the exchange. ``honest`` is one; the others are named after what they get wrong.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Behaviour = Callable[["Exchange"], None]


@dataclass
class Server:
    """A running server."""

    scheme: str
    port: int
    files: dict[str, bytes]
    behavior: Behaviour
    etags: bool = True
    modified: str | None = None
    digests: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """(method, path, headers with names in lower case), in the order of their arrival."""
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    state: dict[str, Any] = field(default_factory=dict)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    def gets(self, path: str | None = None) -> list[dict[str, str]]:
        return [headers for method, where, headers in self.requests if method == "GET" and path in (None, where)]

    def count(self, key: str) -> int:
        """How often this was asked for this key, beginning with 1."""
        with self.lock:
            self.state[key] = self.state.get(key, 0) + 1
            return int(self.state[key])


@lru_cache(maxsize=64)
def _digest(name: str, data: bytes) -> bytes:
    return hashlib.new(name, data).digest()


class Exchange(BaseHTTPRequestHandler):
    """A request, and the means to answer it."""

    protocol_version = "HTTP/1.1"
    hub: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, headers))
        with contextlib.suppress(ConnectionError, TimeoutError, ssl.SSLError):
            self.hub.behavior(self)
            self.wfile.flush()

    @property
    def data(self) -> bytes | None:
        return self.hub.files.get(self.path.partition("?")[0])

    @property
    def etag(self) -> str:
        return f'"{_digest("md5", self.data or b"").hex()}"'

    def answer(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> None:
        headers = dict(headers or {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and "Transfer-Encoding" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def about(self) -> dict[str, str]:
        """The headers that say what the file is."""
        headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if self.hub.etags:
            headers["ETag"] = self.etag
        if self.hub.modified:
            headers["Last-Modified"] = self.hub.modified
        if self.hub.digests:
            digest = base64.b64encode(_digest("sha256", self.data or b"")).decode()
            headers["Repr-Digest"] = f"sha-512=:AAAA:, sha-256=:{digest}:"
        return headers

    def wanted(self) -> tuple[int, int] | None:
        """The range that is asked for, where the condition holds."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or self.data is None:
            return None
        if self.headers.get("If-Range") not in (None, self.etag, self.hub.modified):
            return None
        return int(match[1]), min(int(match[2]) + 1, len(self.data))

    def close(self) -> None:
        self.close_connection = True


# --- behaviors ------------------------------------------------------------------------------------------------------


def honest(exchange: Exchange) -> None:
    data = exchange.data
    if data is None:
        exchange.answer(404)
    elif (wanted := exchange.wanted()) is None:
        exchange.answer(200, {**exchange.about(), "Content-Length": str(len(data))}, data)
    elif wanted[0] >= len(data):
        exchange.answer(416, {"Content-Range": f"bytes */{len(data)}"})
    else:
        start, end = wanted
        headers = {**exchange.about(), "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        exchange.answer(206, headers, data[start:end])


def on_get(behavior: Behaviour) -> Behaviour:
    """Honest to HEAD."""
    return lambda exchange: (honest if exchange.command == "HEAD" else behavior)(exchange)


def on_ranges(behavior: Behaviour) -> Behaviour:
    """Honest to all that does not ask for a range."""
    return lambda exchange: (honest if exchange.wanted() is None else behavior)(exchange)


def first(times: int, behavior: Behaviour, then: Behaviour = honest) -> Behaviour:
    """So often, then better."""
    return lambda exchange: (behavior if exchange.hub.count(f"first {id(behavior)}") <= times else then)(exchange)


def status(code: int, headers: Mapping[str, str] | None = None, body: bytes = b"") -> Behaviour:
    return lambda exchange: exchange.answer(code, headers, body)


def redirect(target: str, code: int = 302) -> Behaviour:
    return status(code, {"Location": target})


def at(places: Mapping[str, Behaviour], elsewhere: Behaviour = honest) -> Behaviour:
    return lambda exchange: places.get(exchange.path.partition("?")[0], elsewhere)(exchange)


def without_ranges(exchange: Exchange) -> None:
    """Answers the whole to whoever asks for a range."""
    del exchange.headers["Range"]
    honest(exchange)


def without_head(exchange: Exchange) -> None:
    if exchange.command == "HEAD":
        exchange.answer(405)
    else:
        honest(exchange)


def empty_head(exchange: Exchange) -> None:
    if exchange.command == "HEAD":
        exchange.answer(200)
    else:
        honest(exchange)


def drops(after: int) -> Behaviour:
    """Closes the connection when so many bytes of a body are sent."""

    def behave(exchange: Exchange) -> None:
        data = exchange.data
        assert data is not None
        start, end = exchange.wanted() or (0, len(data))
        headers = {**exchange.about(), "Content-Length": str(end - start)}
        if exchange.wanted() is not None:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        exchange.answer(206 if exchange.wanted() else 200, headers, data[start : min(end, start + after)])
        exchange.close()

    return on_get(behave)


def length(factor: float) -> Behaviour:
    """Says that the body is longer or shorter than it is."""

    def behave(exchange: Exchange) -> None:
        data = exchange.data or b""
        exchange.answer(200, {**exchange.about(), "Content-Length": str(int(len(data) * factor))}, data)
        exchange.close()

    return behave


def two_lengths(exchange: Exchange) -> None:
    exchange.send_response(200)
    exchange.send_header("Content-Length", "10")
    exchange.send_header("Content-Length", "20")
    exchange.end_headers()
    exchange.wfile.write(b"x" * 20)
    exchange.close()


def shifted_range(exchange: Exchange) -> None:
    """Sends the range that begins one byte later, and says so."""
    data, (start, end) = exchange.data or b"", exchange.wanted() or (0, 0)
    part = data[start + 1 : end + 1]
    headers = {**exchange.about(), "Content-Range": f"bytes {start + 1}-{start + len(part)}/{len(data)}"}
    exchange.answer(206, headers, part)


def other_total(exchange: Exchange) -> None:
    data, (start, end) = exchange.data or b"", exchange.wanted() or (0, 0)
    headers = {**exchange.about(), "Content-Range": f"bytes {start}-{end - 1}/{len(data) + 1}"}
    exchange.answer(206, headers, data[start:end])


def long_range(exchange: Exchange) -> None:
    """Says the right range, and sends more, in chunks."""
    data, (start, end) = exchange.data or b"", exchange.wanted() or (0, 0)
    headers = {
        **exchange.about(),
        "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
        "Transfer-Encoding": "chunked",
    }
    body = data[start:end] + b"more"
    exchange.answer(206, headers, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))


def unfinished_range(exchange: Exchange) -> None:
    """Sends the right range in chunks, and closes the connection before the one that says that it was the last."""
    data, (start, end) = exchange.data or b"", exchange.wanted() or (0, 0)
    headers = {
        **exchange.about(),
        "Content-Range": f"bytes {start}-{end - 1}/{len(data)}",
        "Transfer-Encoding": "chunked",
    }
    exchange.answer(206, headers, b"%x\r\n%b\r\n" % (end - start, data[start:end]))
    exchange.close()


def new_content_each_time(exchange: Exchange) -> None:
    """Content and validator change with each request."""
    exchange.hub.files = {path: data[:-8] + b"%08d" % exchange.hub.count("changes")
                          for path, data in exchange.hub.files.items()}  # fmt: skip
    honest(exchange)


def drips(exchange: Exchange) -> None:
    """A byte at a time, never silent for long."""
    data = exchange.data or b""
    start, end = exchange.wanted() or (0, len(data))
    headers = {**exchange.about(), "Content-Length": str(end - start)}
    if exchange.wanted() is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
    exchange.answer(206 if exchange.wanted() else 200, headers)
    for i in range(start, end):
        if exchange.hub.closing.wait(0.02):
            return
        exchange.wfile.write(data[i : i + 1])
        exchange.wfile.flush()


def drips_headers(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not exchange.hub.closing.wait(0.02):
        exchange.wfile.write(b"x")
        exchange.wfile.flush()


def drips_of_nothing(exchange: Exchange) -> None:
    """A body in chunks; the header of the first one never ends, though a byte of it comes every now and then."""
    exchange.answer(200, {**exchange.about(), "Transfer-Encoding": "chunked"}, b"5;")
    while not exchange.hub.closing.wait(0.02):
        exchange.wfile.write(b"x")
        exchange.wfile.flush()


def drops_headers(exchange: Exchange) -> None:
    """Closes the connection among the headers, before it says the length."""
    exchange.wfile.write(b'HTTP/1.1 200 OK\r\nETag: "a"\r\nContent-')
    exchange.close()


def broken_headers(exchange: Exchange) -> None:
    """Has a line among the headers that is none."""
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\nthis is not one\r\nContent-Length: 4\r\n\r\nabcd")
    exchange.close()


def length_and_chunks(exchange: Exchange) -> None:
    exchange.answer(200, {"Content-Length": "4", "Transfer-Encoding": "chunked"}, b"4\r\nabcd\r\n0\r\n\r\n")
    exchange.close()


def silent(exchange: Exchange) -> None:
    exchange.hub.closing.wait(60)
    exchange.close()


def silent_body(exchange: Exchange) -> None:
    data = exchange.data or b""
    exchange.answer(200, {**exchange.about(), "Content-Length": str(len(data))}, data[:100])
    exchange.wfile.flush()
    silent(exchange)


def endless(exchange: Exchange) -> None:
    """In chunks, so that no length is said."""
    if exchange.command == "HEAD":
        exchange.answer(200, {**exchange.about(), "Transfer-Encoding": "chunked"})
        return
    exchange.answer(200, {**exchange.about(), "Transfer-Encoding": "chunked"})
    while not exchange.hub.closing.is_set():
        exchange.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        with exchange.hub.lock:
            exchange.hub.state["sent"] = exchange.hub.state.get("sent", 0) + 0x10000


def garbage(exchange: Exchange) -> None:
    exchange.wfile.write(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
    exchange.close()


def html(exchange: Exchange) -> None:
    exchange.answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<!DOCTYPE html><html>Please log in</html>")


def html_in_disguise(exchange: Exchange) -> None:
    body = b"\n <!DOCTYPE HTML><html>Please log in</html>"
    exchange.answer(200, {"Content-Type": "application/octet-stream"}, body)


def compressed(exchange: Exchange) -> None:
    import gzip

    exchange.answer(200, {**exchange.about(), "Content-Encoding": "gzip"}, gzip.compress(exchange.data or b""))


# --- the server ------------------------------------------------------------------------------------------------------


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve(
    files: Mapping[str, bytes],
    behavior: Behaviour = honest,
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    certificate: tuple[Path, Path] | None = None,
    etags: bool = True,
    old: bool = False,
    digests: bool = False,
) -> Iterator[Server]:
    """Serve ``files``, by their paths.

    :param certificate: a certificate and its key; then over TLS.
    :param etags: whether files have strong validators.
    :param old: whether they have a date on which they were last modified, long ago.
    :param digests: whether their SHA-256 is published.
    """
    hub = Server(
        "http" if certificate is None else "https",
        0,
        dict(files),
        behavior,
        etags,
        formatdate(1_600_000_000, usegmt=True) if old else None,
        digests,
    )
    server = _Quiet((address, port), type("Handler", (Exchange,), {"hub": hub}))
    hub.port = server.server_address[1]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)

    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
