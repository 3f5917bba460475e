"""Whatever ends a fetch, the cache is as before or as after, and the next fetch succeeds; so do many at once."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from lading.errors import FetchError
from lading.sources import partial
from lading.sources.cache import Cache
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import Concurrency
from lading.sources.web.source import HttpSource
from tests.helpers.cache_tools import files_in, require_consistent
from tests.helpers.nursery import Child, Ended, Nursery
from tests.servers import hostile
from tests.servers.hostile import Exchange, Server, serve

PATH = "/org/model.safetensors"
PIECE = 64 << 10
DATA = os.urandom(24 * PIECE + 1000)
SHA256 = hashlib.sha256(DATA).hexdigest()
PIECES = 25

CHILD = """\
import sys
from pathlib import Path

from lading.sources.cache import Cache
from lading.sources.web.download import Concurrency
from lading.sources.web.source import HttpSource

uri, folder, *offline = sys.argv[1:]

concurrency = Concurrency(connections=4, piece=64 << 10, notes_every=0.001)
with HttpSource(uri, cache=Cache(Path(folder)), offline=bool(offline), concurrency=concurrency) as source:
    snapshot = source.snapshot()
    (file,) = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
print(file.path, file.sha256)
"""

Start = Callable[..., Child]


@pytest.fixture(autouse=True)
def _environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def start(nursery: Nursery) -> Start:
    """Begins to fetch one file in a process of its own."""

    def start(server: Server, folder: Path, **ways: object) -> Child:
        return nursery.start(["-c", CHILD, server.url(PATH), folder], os.environ, **ways)

    return start


def fetch_here(server: Server, folder: Path, **options: object) -> None:
    """In this process, patient and without a wait between attempts."""
    concurrency = Concurrency(connections=4, piece=PIECE, notes_every=0.001)
    timeouts = Timeouts(attempts=2, backoff=0.001)
    with HttpSource(
        server.url(PATH), cache=Cache(folder), offline=False, concurrency=concurrency, timeouts=timeouts
    ) as source:
        snapshot = source.snapshot()
        (file,) = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
    assert file.sha256 == SHA256
    assert file.path.read_bytes() == DATA


def slow(exchange: Exchange) -> None:
    time.sleep(0.005)
    hostile.honest(exchange)


def _kill_points(start: Start, folder: Path, count: int, seed: int) -> Iterator[str]:
    """Kill that many fetches at random points; say how far each of them came."""
    rng = random.Random(seed)
    with serve({PATH: DATA}, slow) as server:
        began = time.monotonic()
        assert start(server, folder / "measure").wait().code == 0
        whole = time.monotonic() - began

        for i in range(count):
            cache = folder / f"cache{i}"
            child = start(server, cache)
            time.sleep(rng.uniform(0, 1.1 * whole))
            child.kill()

            require_consistent(cache)
            yield "entry" if files_in(cache, "entries") else "parts" if files_in(cache, "tmp") else "none"

            fetch_here(server, cache)
            require_consistent(cache)
            assert len(files_in(cache, "blobs")) == 1
            # What a process left that was killed while it took up or finished something is removed later.
            assert len(files_in(cache, "tmp")) <= 3


def test_a_killed_fetch_leaves_a_good_cache(start: Start, tmp_path: Path) -> None:
    assert len(list(_kill_points(start, tmp_path, 5, seed=1))) == 5


@pytest.mark.slow
def test_many_killed_fetches_leave_a_good_cache(start: Start, tmp_path: Path) -> None:
    states = list(_kill_points(start, tmp_path, 120, seed=2))
    assert "parts" in states


def stops_after(ranges: int) -> hostile.Behaviour:
    """So many ranges, then no answer any more, until the state says `go on`."""

    def behave(exchange: Exchange) -> None:
        asked = exchange.command == "GET"
        if asked and exchange.hub.count("ranges") > ranges and "go on" not in exchange.hub.state:
            hostile.silent(exchange)
        else:
            hostile.honest(exchange)

    return behave


def _wait_for(condition: object, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.01)


def _noted(folder: Path) -> int:
    """Bytes that notes say are here."""
    count = 0
    for path in files_in(folder, "tmp"):
        with suppress(FileNotFoundError):
            ranges = re.findall(r"\[(\d+), (\d+), ", path.read_text()) if path.suffix == ".json" else []
            count += sum(int(end) - int(start) for start, end in ranges)
    return count


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_a_stopped_fetch_had_is_not_fetched_again(start: Start, tmp_path: Path, how: signal.Signals) -> None:
    with serve({PATH: DATA}, stops_after(10)) as server:
        child = start(server, tmp_path)
        _wait_for(lambda: _noted(tmp_path) == 10 * PIECE)
        child.signal(how)
        began = time.monotonic()
        ended = child.wait()
        assert ended.code == -how, ended
        assert time.monotonic() - began < 10  # while the server is silent
        assert {path.suffix for path in files_in(tmp_path, "tmp")} == {".part", ".json"}
        assert len(files_in(tmp_path, "tmp")) == 2
        assert ("Traceback" in ended.err) == (how == signal.SIGINT)

        server.state["go on"] = True
        server.requests.clear()
        fetch_here(server, tmp_path)

        assert len(server.gets()) == PIECES - 10
        assert files_in(tmp_path, "tmp") == []


def test_an_interrupted_fetch_without_ranges_leaves_nothing(start: Start, tmp_path: Path) -> None:
    with serve({PATH: DATA}, hostile.on_get(hostile.silent_body), etags=False) as server:
        child = start(server, tmp_path)
        _wait_for(lambda: [p for p in files_in(tmp_path, "tmp") if p.stat().st_size])
        child.signal(signal.SIGINT)
        assert child.wait().code == -signal.SIGINT
    assert files_in(tmp_path, "tmp") == []


def test_a_failed_fetch_is_taken_up_by_the_same_process(tmp_path: Path) -> None:
    def behave(exchange: Exchange) -> None:
        if exchange.command == "GET" and exchange.hub.count("ranges") > 7 and "go on" not in exchange.hub.state:
            exchange.answer(500)
        else:
            hostile.honest(exchange)

    with serve({PATH: DATA}, behave) as server:
        with pytest.raises(FetchError, match="answers 500"):
            fetch_here(server, tmp_path)
        assert len(files_in(tmp_path, "tmp")) == 2
        server.state["go on"] = True
        server.requests.clear()
        fetch_here(server, tmp_path)
        # Of the seven, those of the other three connections may have been cut off when the first one gave up.
        assert PIECES - 7 <= len(server.gets()) <= PIECES - 7 + 3
        assert files_in(tmp_path, "tmp") == []


def test_what_was_kept_of_another_content_is_not_used(start: Start, tmp_path: Path) -> None:
    with serve({PATH: DATA[::-1]}, stops_after(5)) as server:
        child = start(server, tmp_path)
        _wait_for(lambda: _noted(tmp_path) == 5 * PIECE)
        child.kill()

        server.files = {PATH: DATA}
        server.state["go on"] = True
        fetch_here(server, tmp_path)


@pytest.mark.few(1)
@pytest.mark.parametrize("digests", [False, True])
def test_what_is_flipped_in_a_part_meanwhile_is_fetched_again(start: Start, tmp_path: Path, digests: bool) -> None:
    with serve({PATH: DATA}, stops_after(10), digests=digests) as server:
        child = start(server, tmp_path)
        _wait_for(lambda: _noted(tmp_path) == 10 * PIECE)
        child.kill()
        (part,) = [path for path in files_in(tmp_path, "tmp") if path.suffix == ".part"]
        with open(part, "r+b") as file:
            file.seek(3 * PIECE + 17)
            file.write(bytes([DATA[3 * PIECE + 17] ^ 1]))

        server.state["go on"] = True
        server.requests.clear()
        fetch_here(server, tmp_path)
        assert len(server.gets()) == PIECES - 9


def test_a_fetch_that_is_stopped_is_not_waited_for(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SILENCE", 0.5)
    with serve({PATH: DATA}, stops_after(10)) as server:
        child = start(server, tmp_path)
        _wait_for(lambda: _noted(tmp_path) == 10 * PIECE)
        child.signal(signal.SIGSTOP)
        server.state["go on"] = True
        server.requests.clear()
        fetch_here(server, tmp_path)
        assert len(server.gets()) == PIECES  # a copy of its own

        child.kill()
    require_consistent(tmp_path)


@pytest.mark.few(1)
@pytest.mark.parametrize("ways", [{}, {"no_locks": True}], ids=["locks", "no locks"])
def test_eight_processes_fetch_one_file(start: Start, tmp_path: Path, ways: dict[str, object]) -> None:
    with serve({PATH: DATA}, slow) as server:
        at = time.monotonic() + 0.2
        children = [start(server, tmp_path, at=at, **ways) for _ in range(8)]
        ends = [child.wait() for child in children]

    assert [end for end in ends if end.code] == []
    assert {end.out for end in ends} == {f"{Cache(tmp_path).find(SHA256)} {SHA256}\n"}
    assert files_in(tmp_path, "tmp") == []
    require_consistent(tmp_path)
    if not ways:
        assert len(server.gets()) == PIECES
        assert any("waiting for it" in end.err for end in ends)


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(start: Start, tmp_path: Path) -> None:
    with serve({PATH: DATA}) as server:
        ended = start(server, tmp_path, small_files=1_000_000).wait()
        assert ended.code == 1
        assert (
            "OSError: [Errno 27]" in ended.err
        )  # EFBIG, which a process with that limit gets where a full disk is ENOSPC
        assert files_in(tmp_path, "tmp") + files_in(tmp_path, "blobs") + files_in(tmp_path, "entries") == []
        fetch_here(server, tmp_path)


@pytest.mark.few(2)
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "ftruncate", "open", "fchmod"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """At each call that can need a block, not only at the first one."""
    real, calls = getattr(os, call), []

    def full(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if call == "open" and not (int(args[1]) & os.O_CREAT and str(tmp_path) in str(args[0])):  # type: ignore[call-overload]
            return real(*args, **kwargs)
        if call == "pwrite" and len(calls) < 4:
            return real(*args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with serve({PATH: DATA}, etags=call != "ftruncate") as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(OSError, match="No space left"):
                fetch_here(server, tmp_path)
        assert files_in(tmp_path, "tmp") + files_in(tmp_path, "blobs") + files_in(tmp_path, "entries") == []

        fetch_here(server, tmp_path)
        require_consistent(tmp_path)


GUARD = """\
import sys

def guard(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"a socket was used: {event}")

sys.addaudithook(guard)
"""


def test_offline_opens_no_socket(nursery: Nursery, tmp_path: Path) -> None:
    with serve({PATH: DATA}) as server:
        fetch_here(server, tmp_path)
        uri = server.url(PATH)

    def run(uri: str) -> Ended:
        return nursery.run(["-c", GUARD + CHILD, uri, tmp_path, "offline"], os.environ)

    there, missing = run(uri), run(uri.replace("model", "other"))
    assert there.code == 0, there.err
    assert there.out.endswith(f"{SHA256}\n")
    assert missing.code == 1
    assert re.search(r"FetchError: 'other\.safetensors' .* LADING_OFFLINE or HF_HUB_OFFLINE is set", missing.err)
