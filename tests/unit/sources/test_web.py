from __future__ import annotations

import gc
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lading.errors import CheckpointNotFoundError, FetchError, PolicyError, SettingsError
from lading.sources.cache import Cache
from lading.sources.hub import client as hf_client
from lading.sources.hub.source import HubSource
from lading.sources.source import FetchedFile, RemoteFile, Snapshot, Source, read_bytes
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.proxies import require_proxies
from lading.sources.web.source import HttpSource
from lading.sources.web.transport import Location
from lading.system.filesystem import FileStat
from tests.servers import hostile
from tests.servers.hostile import Exchange, Server, at, on_ranges, redirect, serve

PATH = "/org/model.safetensors"
DATA = os.urandom(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
CONCURRENCY = Concurrency(connections=4, piece=64 << 10)


@pytest.fixture(autouse=True)
def _environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NETRC", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def open_source(server: Server, cache: Cache, path: str = PATH, *, offline: bool = False) -> HttpSource:
    timeouts = Timeouts(attempts=2, backoff=0.01)
    return HttpSource(server.url(path), cache=cache, offline=offline, concurrency=CONCURRENCY, timeouts=timeouts)


def nothing_known(sha256: str) -> Path | None:
    return None


def fetch_all(source: Source, snapshot: Snapshot) -> list[FetchedFile]:
    return source.fetch(snapshot, snapshot.files, known=nothing_known, progress=False)


def test_what_a_server_says_of_a_file(cache: Cache) -> None:
    with serve({PATH: DATA}, digests=True) as server:
        uri = server.url(PATH)
        snapshot = open_source(server, cache).snapshot()

    etag = f'"{hashlib.md5(DATA).hexdigest()}"'
    file = RemoteFile(name="model.safetensors", size=len(DATA), sha256=SHA256, etag=etag)
    assert snapshot == Snapshot(uri=uri, revision="", files=(file,))
    assert not cache.folder.exists()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("headers", "validator"),
    [
        ({"ETag": '"a"'}, '"a"'),
        ({"ETag": 'W/"a"'}, None),
        ({"ETag": "a"}, None),
        ({"ETag": '"a\tb"'}, None),
        ({"Last-Modified": "Fri, 01 Jan 2021 00:00:00 GMT"}, "Fri, 01 Jan 2021 00:00:00 GMT"),
        ({"Last-Modified": "Fri, 31 Dec 9999 23:59:59 GMT"}, None),
        ({"Last-Modified": "yesterday"}, None),
        ({"ETag": 'W/"a"', "Last-Modified": "Fri, 01 Jan 2021 00:00:00 GMT"}, "Fri, 01 Jan 2021 00:00:00 GMT"),
    ],
)
def test_strong_validators(cache: Cache, headers: dict[str, str], validator: str | None) -> None:
    with serve({PATH: DATA}, hostile.status(200, headers)) as server:
        assert open_source(server, cache).snapshot().files[0].etag == validator


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("headers", "known"),
    [
        ({"Digest": "SHA-256=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}, True),
        ({"Digest": "md5=x,sha-256=47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}, True),
        ({"Repr-Digest": "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:"}, True),
        ({"Repr-Digest": "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU:"}, False),
        ({"Repr-Digest": "sha-256=:====:"}, False),
        ({"X-Linked-ETag": '"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"'}, False),
    ],
)
def test_published_digests(cache: Cache, headers: dict[str, str], known: bool) -> None:
    with serve({}, hostile.status(200, headers)) as server:
        found = open_source(server, cache).snapshot().files[0].sha256
    assert found == (hashlib.sha256(b"").hexdigest() if known else None)


@pytest.mark.few(5)
@pytest.mark.parametrize("validator", ["etag", "date", "digest", "none"])
@pytest.mark.parametrize("size", [0, 1, 65536, 65537, 300_000])
def test_files_of_all_sizes(cache: Cache, size: int, validator: str) -> None:
    data = DATA[:size]
    with serve(
        {PATH: data}, etags=validator == "etag", old=validator == "date", digests=validator == "digest"
    ) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        server.requests.clear()
        (file,) = fetch_all(source, snapshot)
        in_ranges = ["range" in headers for headers in server.gets()]

        assert file.path.read_bytes() == data
        assert file.stat == FileStat.from_stat(file.path.stat())
        assert (file.name, file.published) == ("model.safetensors", validator == "digest")
        assert any(in_ranges) == (size > CONCURRENCY.piece_of(size) and validator != "none")

        # What can be known to be the same is not fetched again.
        again = open_source(server, cache)
        server.requests.clear()
        assert fetch_all(again, again.snapshot()) == [file] or validator == "none"
        assert (not size) or bool(server.gets()) == (validator == "none")
    assert list(cache.tmp.iterdir()) == []


def test_a_file_without_a_declared_size(cache: Cache) -> None:
    def behave(exchange: Exchange) -> None:
        exchange.answer(200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%b\r\n0\r\n\r\n" % (len(DATA), DATA))

    with serve({}, behave) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        assert snapshot.files[0].size is None
        assert fetch_all(source, snapshot)[0].sha256 == SHA256


def test_files_beside_it(cache: Cache) -> None:
    names = [f"model-{i:05}-of-00020.safetensors" for i in range(20)]
    files = {f"/org/{name}": name.encode() for name in names}
    with serve({"/org/model.safetensors.index.json": b"{}", **files}) as server:
        source = open_source(server, cache, "/org/model.safetensors.index.json?key=1#part")
        snapshot = source.with_siblings(source.snapshot(), [*names, names[0]])
        assert [file.name for file in snapshot.files] == ["model.safetensors.index.json", *names]
        assert {path.partition("?")[2] for _, path, _ in server.requests} == {"key=1"}

        fetched = source.fetch(snapshot, snapshot.files[:0:-1], known=nothing_known, progress=False)
        assert [file.path.read_text() for file in fetched] == names[::-1]

        assert source.with_siblings(snapshot, ["missing.json"]) == snapshot
        assert source.with_siblings(snapshot, [f"missing-{i}" for i in range(20)]) == snapshot
        with pytest.raises(CheckpointNotFoundError, match=r"gone\.index\.json"):
            open_source(server, cache, "/org/gone.index.json").snapshot()


def test_offline_there_is_what_was_fetched(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADING_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve({PATH: DATA, "/org/b.json": b"{}"}) as server:
        source = open_source(server, cache)
        snapshot = source.with_siblings(source.snapshot(), ["b.json"])
        fetched = fetch_all(source, snapshot)
        server.requests.clear()

        offline = open_source(server, cache, offline=True)
        assert offline.with_siblings(offline.snapshot(), ["b.json"]) == snapshot
        assert fetch_all(offline, snapshot) == fetched
        assert offline.local(snapshot, snapshot.files) == [file.path for file in fetched]

        with pytest.raises(FetchError, match=r"'c\.json' of .* HF_HUB_OFFLINE is set"):
            offline.with_siblings(snapshot, ["c.json"])
        assert read_bytes(offline, snapshot, snapshot.files[0], 7, 100) == DATA[7:107]
        fetched[0].path.touch()  # not checked since
        with pytest.raises(FetchError, match="HF_HUB_OFFLINE is set"):
            read_bytes(offline, snapshot, snapshot.files[0], 0, 1)
        shutil.rmtree(cache.folder / "blobs")
        assert offline.local(snapshot, snapshot.files) == [None, None]
        with pytest.raises(FetchError, match=r"'model\.safetensors' of .* HF_HUB_OFFLINE is set"):
            fetch_all(offline, snapshot)
        assert server.requests == []


def test_what_has_no_validator_is_there_offline(cache: Cache) -> None:
    with serve({PATH: DATA}, etags=False) as server:
        source = open_source(server, cache)
        fetched = fetch_all(source, source.snapshot())
        offline = open_source(server, cache, offline=True)
        assert fetch_all(offline, offline.snapshot()) == fetched


def test_content_that_is_here_under_another_name_is_not_fetched(cache: Cache) -> None:
    with serve({PATH: DATA, "/other/x.bin": DATA}, digests=True) as server:
        source = open_source(server, cache)
        (file,) = fetch_all(source, source.snapshot())
        server.requests.clear()
        other = open_source(server, cache, "/other/x.bin")
        (same,) = fetch_all(other, other.snapshot())
        assert same.path == file.path
        assert server.gets() == []
    assert {entry.uri for entry in cache.entries()} == {source.uri, other.uri}


def test_what_the_catalog_knows_is_used_where_it_is(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(DATA)
    with serve({PATH: DATA}, digests=True) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        asked: list[str] = []

        def known(sha256: str) -> Path:
            asked.append(sha256)
            return tmp_path / "mine"

        (file,) = source.fetch(snapshot, snapshot.files, known=known, progress=False)
        assert (file.path, file.sha256, file.published) == (tmp_path / "mine", SHA256, True)
        assert asked == [SHA256]
        assert server.gets() == []

        for wrong in (tmp_path / "gone", tmp_path, Path("/etc/hostname")):
            (file,) = source.fetch(snapshot, snapshot.files, known=lambda _, wrong=wrong: wrong, progress=False)  # type: ignore[misc]
            assert file.path == cache.find(SHA256)


def test_a_new_content_is_fetched(cache: Cache) -> None:
    with serve({PATH: DATA}) as server:
        source = open_source(server, cache)
        fetch_all(source, source.snapshot())
        server.files[PATH] = DATA[::-1]
        (file,) = fetch_all(source, source.snapshot())
        assert file.path.read_bytes() == DATA[::-1]


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["flip", "cut", "touch"])
def test_a_file_that_changed_is_checked_again(cache: Cache, damage: str) -> None:
    with serve({PATH: DATA}) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        (file,) = fetch_all(source, snapshot)
        server.requests.clear()
        file.path.chmod(0o644)
        if damage == "flip":
            with open(file.path, "r+b") as opened:
                opened.write(bytes([DATA[0] ^ 1]))
            os.utime(file.path, ns=(file.stat.mtime_ns, file.stat.mtime_ns))
        elif damage == "cut":
            os.truncate(file.path, 1000)
        else:
            os.utime(file.path)

        (again,) = fetch_all(source, snapshot)
        assert again.path.read_bytes() == DATA
        assert bool(server.gets()) == (damage != "touch")

        server.requests.clear()
        assert fetch_all(source, snapshot) == [again]
        assert server.gets() == []


@pytest.mark.few(2)
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("harm", ["file", "file and entry"])
def test_what_another_catalog_wrote_is_checked_once(cache: Cache, harm: str, published: bool) -> None:
    mine = Cache(cache.folder, catalog="ab" * 8)
    with serve({PATH: DATA}, digests=published) as server:
        source = open_source(server, cache)
        (file,) = fetch_all(source, source.snapshot())
        file.path.chmod(0o644)
        file.path.write_bytes(DATA[:1000] + bytes([DATA[1000] ^ 1]) + DATA[1001:])
        if harm == "file and entry":
            entry = cache.entry(source.uri)
            assert entry is not None
            cache.add(
                source.uri, {file.name: replace(entry.files[file.name], stat=FileStat.from_stat(file.path.stat()))}
            )

        source = open_source(server, mine)
        assert read_bytes(source, source.snapshot(), source.snapshot().files[0], 1000, 1) == DATA[1000:1001]
        (mended,) = fetch_all(source, source.snapshot())
        assert mended.path.read_bytes() == DATA

        # From then on, its own word is enough.
        server.requests.clear()
        source = open_source(server, mine)
        (again,) = fetch_all(source, source.snapshot())
        assert again == mended
        assert not server.gets()


def test_what_another_catalog_fetched_is_used(cache: Cache) -> None:
    with serve({PATH: DATA}) as server:
        source = open_source(server, cache)
        (file,) = fetch_all(source, source.snapshot())
        mine = open_source(server, Cache(cache.folder, catalog="ab" * 8), offline=True)
        server.requests.clear()
        assert read_bytes(mine, mine.snapshot(), mine.snapshot().files[0], 7, 3) == DATA[7:10]
        assert fetch_all(mine, mine.snapshot()) == [file]
        assert server.requests == []


def test_reads_from_many_threads(cache: Cache) -> None:
    with serve({PATH: DATA}) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        spans = [(i * 1009 % 290_000, 1 + i * 37 % 9000) for i in range(60)]
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda span: read_bytes(source, snapshot, snapshot.files[0], *span), spans))
    assert parts == [DATA[offset : offset + size] for offset, size in spans]
    assert read_bytes(source, snapshot, snapshot.files[0], 5, 0) == b""


@pytest.mark.parametrize("behavior", [hostile.silent, hostile.silent_body, hostile.drips, hostile.status(503)])
def test_close_ends_what_other_threads_read_and_later_reads_succeed(cache: Cache, behavior: hostile.Behaviour) -> None:
    with serve({PATH: DATA}) as server:
        timeouts = Timeouts(backoff=1000, max_wait=1000, min_rate=0)
        with HttpSource(server.url(PATH), cache=cache, offline=False, timeouts=timeouts) as source:
            snapshot = source.snapshot()
            server.behavior, before = behavior, len(server.requests)
            with ThreadPoolExecutor(4) as pool:
                reads = [pool.submit(read_bytes, source, snapshot, snapshot.files[0], at, 9000) for at in range(4)]
                while len(server.requests) < before + 4:
                    time.sleep(0.01)
                source.close()
                for read in reads:
                    with pytest.raises(FetchError, match="its source was closed"):
                        read.result()

            server.behavior = hostile.honest
            assert read_bytes(source, snapshot, snapshot.files[0], 7, 9000) == DATA[7:9007]
            assert fetch_all(source, snapshot)[0].sha256 == SHA256


def test_close_ends_a_fetch(cache: Cache) -> None:
    with serve({PATH: DATA}) as server, open_source(server, cache) as source:
        snapshot = source.snapshot()
        server.behavior, before = hostile.silent_body, len(server.requests)
        with ThreadPoolExecutor(1) as pool:
            fetch = pool.submit(fetch_all, source, snapshot)
            while len(server.requests) == before:
                time.sleep(0.01)
            source.close()
            with pytest.raises(FetchError, match="its source was closed"):
                fetch.result()


class SignedSource(HttpSource):
    """A source whose addresses are valid for a number of requests, or for a time."""

    lifetime = 1000.0
    signed = 0

    def locate(self, name: str) -> Location:
        self.signed += 1
        url, until = super().locate(name).url, time.time() + self.lifetime
        return Location(url=f"{url}?signature={self.signed}", headers={"X-Signed": "yes"}, expires=until)


def test_an_address_that_ends_in_the_middle_is_signed_again(cache: Cache) -> None:
    def behave(exchange: Exchange) -> None:
        query = exchange.path.partition("?")[2]
        if exchange.hub.count(query) > 3 or exchange.headers["X-Signed"] != "yes":
            exchange.answer(403)
        else:
            hostile.honest(exchange)

    with serve({PATH: DATA}, behave) as server:
        with SignedSource(server.url(PATH), cache=cache, offline=False, concurrency=CONCURRENCY) as source:
            snapshot = source.snapshot()
            assert fetch_all(source, snapshot)[0].sha256 == SHA256
            assert source.signed > 1
        entry = next(cache.entries())
        assert "signature" not in repr(entry)


def test_an_address_that_is_refused_although_it_is_new_is_an_error(cache: Cache) -> None:
    with serve({PATH: DATA}) as server, SignedSource(server.url(PATH), cache=cache, offline=False) as source:
        snapshot = source.snapshot()
        server.behavior, before = hostile.status(403), source.signed
        with pytest.raises(PolicyError, match="answers 403") as raised:
            read_bytes(source, snapshot, snapshot.files[0], 0, 9)
        assert "signature" not in str(raised.value)
        assert source.signed == before + 1


def test_an_address_that_has_expired_is_not_used(cache: Cache) -> None:
    with serve({PATH: DATA}) as server:
        with SignedSource(server.url(PATH), cache=cache, offline=False) as source:
            source.lifetime = -1
            snapshot = source.snapshot()
            for at in range(3):
                assert read_bytes(source, snapshot, snapshot.files[0], at, 9) == DATA[at : at + 9]
        assert len({path for _, path, _ in server.requests}) == len(server.requests)


def test_few_connections_for_a_few_pieces_and_one_where_there_are_no_ranges(cache: Cache) -> None:
    peers: set[object] = set()

    def behave(exchange: Exchange) -> None:
        peers.add(exchange.client_address)
        hostile.without_ranges(exchange)

    with serve({PATH: DATA}, on_ranges(behave)) as server:
        source = open_source(server, cache)
        fetch_all(source, source.snapshot())
    assert len(peers) == 1


def test_redirects_are_followed_once_for_all_ranges(cache: Cache) -> None:
    with serve({"/there": DATA}, at({PATH: redirect("/there", 307)})) as server:
        source = open_source(server, cache)
        assert fetch_all(source, source.snapshot())[0].sha256 == SHA256
        assert len([path for _, path, _ in server.requests if path == PATH]) == 1


def test_a_netrc_file_that_is_not_understood_is_not_used(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login x password a secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve({PATH: DATA}) as server:
        open_source(server, cache).snapshot()
        assert not any("authorization" in headers for _, _, headers in server.requests)
    assert "is not used" in caplog.text
    assert "secret" not in caplog.text


@contextmanager
def proxy() -> Iterator[tuple[str, list[str]]]:
    """A proxy that connects to whatever it is asked for, by way of 127.0.0.1."""
    asked: list[str] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve_one(client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1000)
            where = head.split(b" ")[1].decode()
            asked.append(where)
            with socket.create_connection(("127.0.0.1", int(where.rpartition(":")[2]))) as target:
                client.sendall(b"HTTP/1.1 200 fine\r\n\r\n")
                other = threading.Thread(target=pump, args=(client, target), daemon=True)
                other.start()
                pump(target, client)
                other.join(5)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve_one, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def test_through_a_proxy(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout {key} -out {cert} -days 2 "
        "-subj /CN=a.example -addext subjectAltName=DNS:a.example,IP:127.0.0.1".split(),
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    with serve({PATH: DATA}, certificate=(cert, key)) as server, proxy() as (url, asked):
        monkeypatch.setenv("HTTPS_PROXY", url)
        with HttpSource(server.url(PATH, "a.example"), cache=cache, offline=False) as source:
            assert fetch_all(source, source.snapshot())[0].sha256 == SHA256
        assert set(asked) == {f"a.example:{server.port}"}

        # The proxy would go there; what the redirect says is refused all the same.
        asked.clear()
        server.behavior = redirect(server.url(PATH))
        with (
            HttpSource(server.url(PATH, "a.example"), cache=cache, offline=False) as source,
            pytest.raises(PolicyError, match="inside this network or machine"),
        ):
            source.snapshot()


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"])
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("socks5://user:pass-word@a.example:1080", "socksio"),
        ("socks5h://user:pass-word@a.example:1080", "socksio"),
        ("socks4://user:pass-word@a.example:1080", "'socks4'"),
        ("ftp://user:pass-word@a.example", "'ftp'"),
        ("http://user:pass:pass-word@a.example:port", "not a URL"),
        ("user:pass-word/", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://", "not a URL"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named_by_its_variable(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, variable: str, url: str, said: str
) -> None:
    monkeypatch.setenv(variable, url)
    for ask in (
        lambda: HttpSource("https://a.example/x.safetensors", cache=cache, offline=False).snapshot(),
        lambda: HubSource("hg://org/name").snapshot(),
        lambda: hf_client.download("org/name", "main", "x", force=False, advance=lambda _: None),
    ):
        with pytest.raises(SettingsError, match=variable) as caught:
            ask()
        assert said in str(caught.value)
        assert "pass-word" not in str(caught.value)

    monkeypatch.setenv("NO_PROXY", "a.example,*")
    require_proxies()


def test_proxies_that_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://a.example:3128", "https://u:p@a.example", "a.example:3128", ""):
        monkeypatch.setenv("HTTPS_PROXY", url)
        require_proxies()


def test_a_source_that_is_forgotten_closes_its_connections(cache: Cache) -> None:
    with serve({PATH: DATA}) as server:
        source = open_source(server, cache)
        source.snapshot()
        del source
        gc.collect()  # a warning of a socket that is left open would be an error


def test_progress_is_shown_where_it_takes_long(
    cache: Cache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(exchange: Exchange) -> None:
        exchange.hub.closing.wait(0.3)
        hostile.honest(exchange)

    with serve({PATH: DATA}, on_ranges(behave)) as server:
        source = open_source(server, cache)
        snapshot = source.snapshot()
        source.fetch(snapshot, snapshot.files, known=nothing_known, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetch:" in err
    assert "/300k" in err


def test_the_http_client_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, lading.sources.web.source, lading.sources.hub.source; "
        "print(sorted({'httpx', 'httpx2', 'huggingface_hub', 'tqdm', 'torch', 'urllib3'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
