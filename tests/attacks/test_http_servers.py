"""Web servers that misbehave: each ends in an error of its type, or in the right bytes, and never in anything else."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from lading.errors import (
    AddressError,
    CheckpointNotFoundError,
    DigestMismatchError,
    FetchError,
    LadingError,
    PolicyError,
)
from lading.sources.cache import Cache
from lading.sources.hub.errors import retried, translated
from lading.sources.source import FetchedFile, read_bytes
from lading.sources.web import redirects
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.redirects import AddressScope
from lading.sources.web.source import HttpSource
from tests.servers import hostile
from tests.servers.hostile import (
    Behaviour,
    Exchange,
    Server,
    at,
    drops,
    first,
    on_get,
    on_ranges,
    redirect,
    serve,
    status,
)

PATH = "/org/model.safetensors"
DATA = os.urandom(300_000)
# Long enough for a machine that is busy with other things; what is about time has less, and so many attempts that
# it does not matter whether one more of them is late.
TIMEOUTS = Timeouts(
    connect=20, answer=20, silence=20, window=0.2, min_rate=1000, attempts=2, backoff=0.01, max_wait=0.05
)
HASTE = replace(TIMEOUTS, answer=1.0, silence=0.5)
CONCURRENCY = Concurrency(connections=4, piece=64 << 10, notes_every=0.01, undeclared=1 << 20)


@pytest.fixture(autouse=True)
def _no_proxy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def source(server: Server, tmp_path: Path, path: str = PATH, **options: object) -> HttpSource:
    options = {"timeouts": TIMEOUTS, "concurrency": CONCURRENCY, "offline": False, **options}
    return HttpSource(server.url(path), cache=Cache(tmp_path / "cache"), **options)  # type: ignore[arg-type]


def fetch(source: HttpSource) -> FetchedFile:
    snapshot = source.snapshot()
    (file,) = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
    return file


def left_over(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def require_data(file: FetchedFile, data: bytes = DATA) -> None:
    assert file.path.read_bytes() == data
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.path.stat().st_mode & 0o777 == 0o444


# --- what is mended --------------------------------------------------------------------------------------------------

MENDED: dict[str, Behaviour] = {
    "HEAD without a length": hostile.empty_head,
    "no HEAD": hostile.without_head,
    "no ranges": on_ranges(hostile.without_ranges),
    "another range": on_ranges(hostile.shifted_range),
    "another total": on_ranges(hostile.other_total),
    "more than the range": on_ranges(hostile.long_range),
    "a range without its end": on_ranges(hostile.unfinished_range),
    "416 to a good range": on_ranges(status(416)),
    "503 at first": first(1, status(503, {"Retry-After": "3600"})),
    "429 at first": first(1, status(429, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"})),
    "503 in between": on_ranges(first(1, status(503))),
    "a drop in a range": first(1, on_ranges(drops(1000))),
    "a drop in each first body": first(3, drops(50_000)),
    "silence at first": first(1, hostile.silent),
    "silence in a body": on_get(first(1, hostile.silent_body)),
    "drips at first": on_get(first(1, hostile.drips)),
    "headers that drip at first": first(1, hostile.drips_headers),
    "garbage at first": first(1, hostile.garbage),
    "headers that break off at first": first(1, hostile.drops_headers),
    "headers that break off in between": on_get(first(1, hostile.drops_headers)),
    "ten redirects": at({f"{PATH}{i or ''}": redirect(f"{PATH}{i + 1}") for i in range(10)}),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("name", MENDED)
def test_the_bytes_come_all_the_same(tmp_path: Path, name: str) -> None:
    files = {PATH: DATA, f"{PATH}10": DATA}
    with serve(files, MENDED[name]) as server:
        require_data(fetch(source(server, tmp_path, timeouts=replace(HASTE, attempts=10))))
    assert len(left_over(tmp_path)) == 2  # the file and the entry


# --- what is not -----------------------------------------------------------------------------------------------------

FATAL: dict[str, tuple[Behaviour, type[LadingError], str]] = {
    "dropped again and again": (drops(100), FetchError, "tried 2 times"),
    "half the length": (on_get(hostile.length(0.5)), FetchError, "150000 bytes, expected the published 300000"),
    "twice the length": (on_get(hostile.length(2)), FetchError, "600000 bytes, expected the published 300000"),
    "twice the length, always": (hostile.length(2), FetchError, "tried 2 times"),
    "two lengths": (hostile.two_lengths, FetchError, "tried 2 times"),
    "new content each time": (hostile.new_content_each_time, FetchError, "has changed"),
    "drips": (on_get(hostile.drips), FetchError, r"bytes a second .* at least 1000"),
    "drips of headers": (hostile.drips_headers, FetchError, "sent no useful data within 1 s"),
    "drips that are no bytes": (on_get(hostile.drips_of_nothing), FetchError, "sent no useful data within 1 s"),
    "silence": (hostile.silent, FetchError, "was silent for 0.5 s|sent no useful data within 1 s"),
    "silence in a body": (
        on_get(hostile.silent_body),
        FetchError,
        "was silent for 0.5 s|sent no useful data within 1 s",
    ),
    "garbage": (hostile.garbage, FetchError, "tried 2 times"),
    "headers that break off": (hostile.drops_headers, FetchError, "the headers end early .tried 2 times"),
    "a header that is none": (hostile.broken_headers, FetchError, "tried 2 times"),
    "a length and chunks": (hostile.length_and_chunks, FetchError, "tried 2 times"),
    "a loop": (redirect(PATH), FetchError, "redirects more than 10 times"),
    "eleven redirects": (
        at({f"{PATH}{i or ''}": redirect(f"{PATH}{i + 1}") for i in range(11)}),
        FetchError,
        "redirects more than 10 times",
    ),
    "a redirect to nowhere": (status(302), FetchError, "without a location"),
    "a redirect to no URL": (redirect("http://[::1/x"), FetchError, "not a URL|Invalid URL"),
    "a redirect to plain http": (redirect("http://example.com/x"), PolicyError, "plain http is refused"),
    "a redirect to a file": (redirect("file:///etc/passwd"), PolicyError, "over https only"),
    "a redirect with a password": (redirect("https://user:secret@example.com/x"), PolicyError, "user name"),
    "429": (status(429, {"Retry-After": "86400"}), FetchError, "answers 429"),
    "503": (status(503), FetchError, "answers 503"),
    "500 to GET": (on_get(status(500)), FetchError, "answers 500"),
    "401": (status(401), PolicyError, "answers 401.*netrc"),
    "403": (status(403), PolicyError, "answers 403.*netrc"),
    "404": (status(404), CheckpointNotFoundError, "answers 404"),
    "410": (status(410), CheckpointNotFoundError, "answers 410"),
    "404 to GET": (on_get(status(404)), CheckpointNotFoundError, "answers 404"),
    "418": (status(418), FetchError, "answers 418"),
    "206 to all": (on_get(status(206)), FetchError, "answers 206"),
    "a web page": (hostile.html, FetchError, "is a web page"),
    "a web page in disguise": (hostile.html_in_disguise, FetchError, "is a web page"),
    "gzip": (hostile.compressed, FetchError, "comes compressed"),
    "gzip to GET": (on_get(hostile.compressed), FetchError, "comes compressed"),
    "an endless body": (hostile.endless, FetchError, "more than the 1048576 bytes"),
    "a longer body": (on_get(hostile.endless), FetchError, "more than the 300000 bytes"),
}


@pytest.mark.few(12)
@pytest.mark.parametrize("name", FATAL)
def test_each_to_its_error_and_nothing_is_kept(tmp_path: Path, name: str) -> None:
    behavior, error, message = FATAL[name]
    timeouts = HASTE if "silence" in name or "drips" in name else TIMEOUTS
    with serve({PATH: DATA}, behavior) as server, pytest.raises(error, match=message) as raised:
        fetch(source(server, tmp_path, timeouts=timeouts))

    assert type(raised.value) is error
    assert not [path for path in left_over(tmp_path) if path.parent.name != "tmp"]
    assert "secret" not in str(raised.value)


def test_an_endless_body_ends_at_what_was_published(tmp_path: Path) -> None:
    with serve({PATH: DATA}, on_get(hostile.endless)) as server:
        with pytest.raises(FetchError):
            fetch(source(server, tmp_path))
        time.sleep(0.1)
        assert server.state.get("sent", 0) < 20 << 20  # what fits into the buffers of a connection or two

    assert left_over(tmp_path) == []


def test_ranges_that_begin_well_and_change(tmp_path: Path) -> None:
    def behave(exchange: Exchange) -> None:
        if exchange.command == "GET" and exchange.hub.count("gets") == 3:
            exchange.hub.files = {PATH: DATA[::-1]}
        hostile.honest(exchange)

    with serve({PATH: DATA}, behave) as server, pytest.raises(FetchError, match="has changed"):
        fetch(source(server, tmp_path))


def test_a_wrong_digest(tmp_path: Path) -> None:
    wrong = "sha-256=:" + "A" * 43 + "=:"

    def behave(exchange: Exchange) -> None:
        exchange.about = lambda: {**Exchange.about(exchange), "Repr-Digest": wrong}  # type: ignore[method-assign]
        hostile.honest(exchange)

    with serve({PATH: DATA}, behave) as server, pytest.raises(DigestMismatchError) as raised:
        fetch(source(server, tmp_path))

    assert (raised.value.expected, raised.value.found) == ("0" * 64, hashlib.sha256(DATA).hexdigest())
    assert left_over(tmp_path) == []


# --- where requests go -----------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {cert} -days 2 "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,IP:127.0.0.2,IP:127.0.0.3,DNS:localhost".split(),
        check=True,
        capture_output=True,
    )
    return cert, key


def test_over_tls(tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({PATH: DATA}, certificate=certificate) as server:
        with pytest.raises(FetchError, match="SSL_CERT_FILE"):
            fetch(source(server, tmp_path))
        assert server.requests == []

        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        require_data(fetch(source(server, tmp_path)))


@contextmanager
def answers(data: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """The URL of a server that answers every connection with ``data``, and how each began."""
    begun: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    begun.append(connection.recv(1 << 16))
                    connection.sendall(data)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"https://127.0.0.1:{listener.getsockname()[1]}{PATH}", begun
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


NO_TLS = {
    "plain http": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not TLS"),
    "another service": (b"SSH-2.0-x\r\n", "is not TLS"),
    "no common version": (bytes.fromhex("15 0301 0002 02 46"), "do not agree"),
    "no common cipher": (bytes.fromhex("15 0301 0002 02 28"), "do not agree"),
}


@pytest.mark.parametrize("what", NO_TLS)
def test_what_is_no_tls_is_asked_once(tmp_path: Path, what: str) -> None:
    data, says = NO_TLS[what]
    with answers(data) as (url, begun):
        with pytest.raises(FetchError, match=says):
            HttpSource(url, cache=Cache(tmp_path), offline=False, timeouts=TIMEOUTS).snapshot()
        assert len(begun) == 1
        with pytest.raises(FetchError, match=says), translated("a/b", "the list of its files"):
            retried(lambda: huggingface_hub.get_session().get(url), "the list of files of a/b")
        assert len(begun) == 2


def test_a_connection_that_breaks_off_is_tried_again(tmp_path: Path) -> None:
    with answers(b"") as (url, begun):
        with pytest.raises(FetchError, match="tried 2 times"):
            HttpSource(url, cache=Cache(tmp_path), offline=False, timeouts=TIMEOUTS).snapshot()
        assert len(begun) == 2


def test_never_from_https_to_http(
    tmp_path: Path, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with serve({PATH: DATA}) as plain, serve({}, redirect(plain.url(PATH)), certificate=certificate) as server:
        with pytest.raises(PolicyError, match="from https to http"):
            fetch(source(server, tmp_path))
        assert plain.requests == []


@pytest.mark.parametrize("start", ["127.0.0.2", "127.0.0.3"])
def test_never_further_inward_than_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, certificate: tuple[Path, Path], start: str
) -> None:
    # Addresses of this machine play the parts of a public one and of one in a private network.
    parts = {"127.0.0.2": AddressScope.EVERYWHERE, "127.0.0.3": AddressScope.NETWORK}
    monkeypatch.setattr(redirects, "reach", lambda address: parts.get(address, AddressScope.MACHINE))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))

    with serve({PATH: DATA}, certificate=certificate) as inner:
        outward = redirect(inner.url(PATH))
        with serve({}, outward, address=start, certificate=certificate) as server:
            opened = HttpSource(
                server.url(PATH, start), cache=Cache(tmp_path / "cache"), offline=False, timeouts=TIMEOUTS
            )
            with pytest.raises(PolicyError, match=r"127\.0\.0\.1, an address inside"):
                fetch(opened)
            assert len(server.requests) == 1
            assert inner.requests == []

        require_data(fetch(source(inner, tmp_path)))  # who is asked first may be anywhere


def test_credentials_go_to_the_exact_origin_only(home: Path, tmp_path: Path) -> None:
    (home / ".netrc").write_text("machine 127.0.0.1 login ann password s3cret\ndefault login x password y\n")

    with serve({PATH: DATA}) as other:
        places = {
            "/a/m.safetensors": redirect("/b/m.safetensors"),
            "/b/m.safetensors": lambda e: redirect(e.hub.url("/c/m.safetensors", "localhost"))(e),
            "/c/m.safetensors": redirect(other.url(PATH)),
        }
        with serve({}, at(places)) as server:
            require_data(fetch(source(server, tmp_path, "/a/m.safetensors")))

    sent = {(path, headers.get("authorization")) for _, path, headers in server.requests}
    basic = "Basic YW5uOnMzY3JldA=="
    assert sent == {("/a/m.safetensors", basic), ("/b/m.safetensors", basic), ("/c/m.safetensors", None)}
    assert {headers.get("authorization") for _, _, headers in other.requests} == {None}


def test_cookies_are_not_kept(tmp_path: Path) -> None:
    def behave(exchange: Exchange) -> None:
        exchange.about = lambda: {**Exchange.about(exchange), "Set-Cookie": "a=b; Path=/"}  # type: ignore[method-assign]
        hostile.honest(exchange)

    with serve({PATH: DATA}, behave) as server:
        require_data(fetch(source(server, tmp_path)))
    assert not any("cookie" in headers for _, _, headers in server.requests)


def test_a_lent_location_is_asked_for_again(tmp_path: Path) -> None:
    """A signed link that ends while ranges are still to come."""

    def behave(exchange: Exchange) -> None:
        path, _, query = exchange.path.partition("?")
        if path == PATH:
            redirect(f"/signed?{exchange.hub.count('signed')}")(exchange)
        elif exchange.hub.count(f"used {query}") > 2:
            exchange.answer(403)
        else:
            hostile.honest(exchange)

    with serve({"/signed": DATA}, behave) as server:
        require_data(fetch(source(server, tmp_path)))
        assert server.state["signed"] > 2


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = ["", ".", "..", "../x", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\nb", "\u202emodel", "x" * 256, " x", "\ud800"]


@pytest.mark.few(5)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_hostile_names_are_not_even_asked_for(tmp_path: Path, name: str) -> None:
    with serve({PATH: DATA}) as server:
        opened = source(server, tmp_path)
        snapshot = opened.snapshot()
        server.requests.clear()
        with pytest.raises(FetchError, match="plain file names"):
            opened.with_siblings(snapshot, ["good.safetensors", name])
        assert server.requests == []


def test_what_a_file_is_called_says_nothing_of_where_it_lies(tmp_path: Path) -> None:
    with serve({PATH: DATA, "/org/..%20a%26b.evil": b"x"}) as server:
        opened = source(server, tmp_path)
        snapshot = opened.with_siblings(opened.snapshot(), [".. a&b.evil"])
        assert [file.name for file in snapshot.files] == ["model.safetensors", ".. a&b.evil"]

        _, evil = opened.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)

    x = hashlib.sha256(b"x").hexdigest()
    assert evil.path == tmp_path / "cache" / "blobs" / x[:2] / f"{x}.blob"


REFUSED: list[tuple[str, type[LadingError]]] = [
    ("http://example.com/model.safetensors", PolicyError),
    ("http://10.0.0.1/model.safetensors", PolicyError),
    ("https://user:secret@example.com/model.safetensors", PolicyError),
    ("ftp://127.0.0.1/model.safetensors", PolicyError),
    ("https:///model.safetensors", AddressError),
    ("https://[::1/model.safetensors", AddressError),
    ("https://me:secret/@example.com/x", AddressError),
    ("https://example.com/", AddressError),
    ("https://example.com/a%2Fb", AddressError),
    ("https://example.com/%2e%2e", AddressError),
]


@pytest.mark.parametrize(("uri", "error"), REFUSED)
def test_uris_that_are_not_asked(tmp_path: Path, uri: str, error: type[LadingError]) -> None:
    with pytest.raises(error) as raised:
        HttpSource(uri, cache=Cache(tmp_path), offline=False).snapshot()
    assert type(raised.value) is error
    assert "secret" not in str(raised.value)


def test_a_read_past_the_end(tmp_path: Path) -> None:
    with serve({PATH: DATA}) as server:
        opened = source(server, tmp_path)
        snapshot = opened.snapshot()
        for offset, size in ((-1, 2), (0, len(DATA) + 1), (len(DATA), 1)):
            with pytest.raises(ValueError, match="there are no"):
                read_bytes(opened, snapshot, snapshot.files[0], offset, size)


READS: dict[str, tuple[Behaviour, str | None]] = {
    "honest": (hostile.honest, None),
    "no ranges": (on_ranges(hostile.without_ranges), None),
    "a drop at first": (first(1, on_ranges(drops(10))), None),
    "another range": (on_ranges(hostile.shifted_range), "cannot be read in parts"),
    "drops": (on_ranges(drops(10)), "tried 2 times"),
    "changes": (hostile.new_content_each_time, "has changed"),
    "416": (on_ranges(status(416)), "cannot be read in parts"),
}


@pytest.mark.parametrize("name", READS)
def test_reads(tmp_path: Path, name: str) -> None:
    behavior, message = READS[name]
    with serve({PATH: DATA}, behavior) as server:
        opened = source(server, tmp_path)
        snapshot = opened.snapshot()
        read: Callable[[], bytes] = lambda: read_bytes(opened, snapshot, snapshot.files[0], 1000, 5000)  # noqa: E731
        if message is None:
            assert read() == DATA[1000:6000]
        else:
            with pytest.raises(FetchError, match=message):
                read()
