"""Repositories of a hub on loopback, fetched by the real huggingface_hub."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lading.errors import CheckpointNotFoundError, DigestMismatchError, FetchError, ModelGatedError
from lading.sources.source import FetchedFile, RemoteFile, Snapshot
from tests.helpers.nursery import Child, Nursery
from tests.servers.hub import TOKEN, FakeHub, Repository, git_blob
from tests.servers.hub_client import HubClient

WEIGHTS = bytes(range(256)) * 2000
CONFIG = b'{"model_type": "qwen3"}'
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "nested/notes.txt": b"two\nlines\n"}

SNAPSHOT = "result = HubSource(uri, revision=revision).snapshot()"
FETCH = """
source = HubSource(uri)
snapshot = source.snapshot()
result = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=progress)
"""
READ = """
source = HubSource(uri)
snapshot = source.snapshot()
result = read_bytes(source, snapshot, snapshot.file(name), offset, size)
"""


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_client(shared_hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(shared_hub.url, tmp_path_factory.mktemp("hub-client"))
    yield client
    client.close()


@pytest.fixture
def hub(shared_hub: FakeHub) -> FakeHub:
    shared_hub.behave()
    shared_hub.repositories.clear()
    return shared_hub


@pytest.fixture
def repo(hub: FakeHub) -> Repository:
    return hub.add("Qwen/Tiny-0.1B", FILES)


@pytest.fixture
def client(shared_client: HubClient, tmp_path: Path) -> HubClient:
    shared_client.cache = tmp_path / "hub"
    shared_client.stderr()
    return shared_client


def _fetch(client: HubClient, uri: str = "hg://qwen/tiny-0.1b", **kwargs: object) -> list[FetchedFile]:
    files: list[FetchedFile] = client(FETCH, uri=uri, **{"progress": False, **kwargs})
    return files


def _blobs(cache: Path) -> list[Path]:
    return [p for p in cache.rglob("*") if p.parent.name == "blobs" or p.name.endswith(".incomplete")]


# --- what there is ---------------------------------------------------------------------------------------------------


def test_a_snapshot_is_pinned_and_says_what_the_hub_publishes(
    hub: FakeHub, repo: Repository, client: HubClient
) -> None:
    first = repo.refs["main"]
    second = repo.commit({"config.json": b"{}"}, "next")

    snapshot: Snapshot = client(SNAPSHOT, uri="hg://qwen/tiny-0.1b", revision=None)

    weights = hashlib.sha256(WEIGHTS).hexdigest()
    assert snapshot == Snapshot(
        uri="hg://qwen/tiny-0.1b",
        revision=first,
        files=(
            RemoteFile(name="config.json", size=len(CONFIG), etag=f'"{git_blob(CONFIG)}"'),
            RemoteFile(name="model.safetensors", size=len(WEIGHTS), sha256=weights, etag=f'"{weights}"'),
            RemoteFile(name="nested/notes.txt", size=10, etag=f'"{git_blob(FILES["nested/notes.txt"])}"'),
        ),
    )
    assert client(SNAPSHOT, uri="hf://Qwen/Tiny-0.1B@next", revision=None).revision == second
    assert client(SNAPSHOT, uri="hf://Qwen/Tiny-0.1B@next", revision="main").revision == first
    assert client(SNAPSHOT, uri=f"hf://Qwen/Tiny-0.1B@{first}", revision=None).revision == first


def test_one_call_makes_a_snapshot(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision=None)

    assert [r.path for r in hub.requests if "/api/models/" in r.path] == ["/api/models/Qwen/Tiny-0.1B?blobs=true"]


def test_a_name_without_an_organisation(hub: FakeHub, client: HubClient) -> None:
    hub.add("gpt2", {"model.safetensors": WEIGHTS})

    (file,) = _fetch(client, "hg://gpt2")

    assert file.path.read_bytes() == WEIGHTS


@pytest.mark.parametrize("fault", ["html", "loop", "418", "503"])
def test_nonsense_instead_of_a_snapshot(hub: FakeHub, repo: Repository, client: HubClient, fault: str) -> None:
    hub.misbehave("info", fault)

    with pytest.raises(FetchError, match="Qwen/Tiny"):
        client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision=None)


def test_a_hub_that_is_busy_is_asked_again(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    hub.misbehave("info", "503", times=2)

    assert client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision=None).revision == repo.refs["main"]


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "size"), [(0, 8), (1000, 1), (0, len(WEIGHTS)), (len(WEIGHTS) - 3, 3), (5, 0)])
def test_ranges(repo: Repository, client: HubClient, offset: int, size: int) -> None:
    read = client(READ, uri="hg://qwen/tiny-0.1b", name="model.safetensors", offset=offset, size=size)

    assert read == WEIGHTS[offset : offset + size]


def test_ranges_from_several_threads(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    read = client(
        """
from concurrent.futures import ThreadPoolExecutor
source = HubSource(uri)
snapshot = source.snapshot()
file = snapshot.file("model.safetensors")
with ThreadPoolExecutor(8) as pool:
    result = b"".join(pool.map(lambda at: read_bytes(source, snapshot, file, at, 16000), range(0, file.size, 16000)))
""",
        uri="hg://qwen/tiny-0.1b",
    )

    assert read == WEIGHTS
    asked = hub.counted()
    assert asked["cdn", "GET"] == 32
    assert asked["hub", "GET"] < 20, "the hub is not asked again where the file lies"


def test_close_ends_a_read_in_another_thread(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    hub.misbehave("model.safetensors", "drip", 1)
    code = """
import time
from concurrent.futures import ThreadPoolExecutor
source = HubSource("hg://Qwen/Tiny-0.1B")
snapshot = source.snapshot()
file = snapshot.file("model.safetensors")
with ThreadPoolExecutor(1) as pool:
    buffer = memoryview(bytearray(file.size))
    read = pool.submit(source.read, snapshot, file, 0, buffer)
    while not any(buffer):
        time.sleep(0.01)
    source.close()
    result = str(read.exception()), read_bytes(source, snapshot, file, 0, 9)
"""
    message, later = client(code)
    assert "its source was closed" in message
    assert later == WEIGHTS[:9]


def test_the_token_goes_to_the_hub_alone(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    client(READ, uri="hg://qwen/tiny-0.1b", name="model.safetensors", offset=0, size=8, token=TOKEN)
    _fetch(client, token=TOKEN)

    seen = {(r.origin, r.authorization) for r in hub.requests if "agent" not in r.path}
    assert seen == {("hub", f"Bearer {TOKEN}"), ("cdn", None)}


@pytest.mark.parametrize(("fault", "times"), [("503", 3), ("429", 1), ("short", 2)])
def test_a_range_is_asked_for_again(hub: FakeHub, repo: Repository, client: HubClient, fault: str, times: int) -> None:
    hub.misbehave("model.safetensors", fault, times)

    assert client(READ, uri="hg://Qwen/Tiny-0.1B", name="model.safetensors", offset=9, size=90) == WEIGHTS[9:99]


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "fault", ["ignore-range", "wrong-range", "gzip", "html", "long", "loop", "downgrade", "short", "503", "404", "416"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_range_that_is_not_what_was_asked_for(
    hub: FakeHub, repo: Repository, client: HubClient, fault: str, name: str
) -> None:
    hub.misbehave(name, fault)

    with pytest.raises(CheckpointNotFoundError if fault == "404" else FetchError, match="://"):
        client(READ, uri="hg://Qwen/Tiny-0.1B", name=name, offset=9, size=9)


@pytest.mark.parametrize(("offset", "size"), [(-1, 2), (len(WEIGHTS), 1), (0, len(WEIGHTS) + 1)])
def test_a_range_outside_of_the_file_is_not_asked_for(
    hub: FakeHub, repo: Repository, client: HubClient, offset: int, size: int
) -> None:
    with pytest.raises(FetchError, match="has 512000 bytes"):
        client(READ, uri="hg://Qwen/Tiny-0.1B", name="model.safetensors", offset=offset, size=size)
    assert not [r for r in hub.requests if "resolve" in r.path]


# --- files -----------------------------------------------------------------------------------------------------------


def test_fetched_files_are_in_the_cache_and_hashed(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    files = _fetch(client)

    assert [f.name for f in files] == sorted(FILES)
    for file in files:
        folder = client.cache / "models--Qwen--Tiny-0.1B" / "snapshots" / repo.refs["main"]
        assert file.path == folder / file.name
        assert file.path.read_bytes() == FILES[file.name]
        assert file.sha256 == hashlib.sha256(FILES[file.name]).hexdigest()
        assert file.published == file.name.endswith(".safetensors")
        assert file.stat.inode == os.stat(file.path).st_ino
    assert (client.cache / "models--Qwen--Tiny-0.1B" / "refs" / "main").read_text() == repo.refs["main"]
    assert client.stderr() == ""

    hub.requests.clear()
    assert _fetch(client) == files
    assert not [r for r in hub.requests if "resolve" in r.path], "what is here is not asked for again"


def test_the_bar(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    hub.misbehave("model.safetensors", "slow", 2)

    _fetch(client, progress=True)

    shown = client.stderr()
    assert "fetch:" in shown
    assert "512k/512k" in shown
    assert "model.safetensors" not in shown, "one bar, ours"


def test_the_files_are_of_the_pinned_commit(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    first = repo.refs["main"]
    hub.after_info = lambda: repo.commit({**FILES, "config.json": b"another"})

    files = _fetch(client)

    assert repo.refs["main"] != first
    assert files[0].path.read_bytes() == CONFIG
    assert first in str(files[0].path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_came_wrong_once_are_fetched_again(
    hub: FakeHub, repo: Repository, client: HubClient, name: str
) -> None:
    hub.misbehave(name, "corrupt", times=1)

    assert {f.name: f.path.read_bytes() for f in _fetch(client)} == FILES
    assert "fetching it again" in client.stderr()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_come_wrong_are_not_kept(hub: FakeHub, repo: Repository, client: HubClient, name: str) -> None:
    good = FILES[name]
    bad = good[:-1] + bytes([good[-1] ^ 1])
    digest = git_blob if name == "config.json" else lambda data: hashlib.sha256(data).hexdigest()
    hub.misbehave(name, "corrupt")

    with pytest.raises(DigestMismatchError, match=f"{digest(good)}.*{digest(bad)}") as caught:
        _fetch(client)

    assert (caught.value.expected, caught.value.found) == (digest(good), digest(bad))
    assert not Path(caught.value.path).exists()
    assert not [p for p in _blobs(client.cache) if p.read_bytes() == bad]
    hub.behave()
    assert {f.name: f.path.read_bytes() for f in _fetch(client)} == FILES


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("change", ["bit", "size", "gone"])
def test_a_bad_copy_in_the_cache_is_replaced(repo: Repository, client: HubClient, name: str, change: str) -> None:
    path = next(f.path for f in _fetch(client) if f.name == name)
    blob, data = path.resolve(), FILES[name]
    if change == "gone":
        blob.unlink()
    else:
        blob.write_bytes(data[:-1] + (b"" if change == "size" else bytes([data[-1] ^ 1])))

    assert {f.name: f.path.read_bytes() for f in _fetch(client)} == FILES


def test_a_body_that_breaks_off_goes_on(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    hub.misbehave("model.safetensors", "short", times=1)

    assert {f.name: f.path.read_bytes() for f in _fetch(client)} == FILES


def test_a_file_that_is_known_elsewhere_is_not_downloaded(
    hub: FakeHub, repo: Repository, client: HubClient, tmp_path: Path
) -> None:
    elsewhere, bad = tmp_path / "elsewhere", tmp_path / "bad"
    elsewhere.write_bytes(WEIGHTS)
    bad.write_bytes(WEIGHTS[1:])
    code = """
source = HubSource(uri)
snapshot = source.snapshot()
asked = []
result = source.fetch(
    snapshot, [snapshot.file("model.safetensors")], known=lambda sha: asked.append(sha) or path, progress=False
), asked
"""

    files, asked = client(code, uri="hg://Qwen/Tiny-0.1B", path=elsewhere)
    assert asked == [hashlib.sha256(WEIGHTS).hexdigest()]
    assert files[0].path == elsewhere
    assert files[0].published
    assert not hub.counted()["cdn", "GET"]

    for path in (bad, tmp_path / "gone"):
        files, _ = client(code, uri="hg://Qwen/Tiny-0.1B", path=path)
        assert files[0].path.is_relative_to(client.cache)


def test_another_spelling_of_the_id_finds_the_same_files(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    first = _fetch(client, "hg://Qwen/Tiny-0.1B")
    hub.requests.clear()

    again = client(
        """
snapshot = Snapshot(uri=uri, revision=commit, files=files)
source = HubSource(uri)
result = source.local(snapshot, files), source.fetch(snapshot, files, known=lambda _: None, progress=False)
""",
        uri="hg://qwen/TINY-0.1b",
        commit=repo.refs["main"],
        files=tuple(RemoteFile(name=f.name, size=f.stat.size, sha256=f.sha256) for f in first),
    )

    assert again[0] == [f.path for f in first]
    assert [f.path for f in again[1]] == again[0]
    assert not hub.requests


def test_the_first_failure_stops_the_rest(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    code = """
source = HubSource(uri)
snapshot = source.snapshot()
files = [*snapshot.files, RemoteFile(name="no.safetensors", size=1)]
source.fetch(snapshot, files, known=lambda _: None, progress=False)
"""

    with pytest.raises(CheckpointNotFoundError, match=r"no 'no.safetensors' in it"):
        client(code, uri="hg://Qwen/Tiny-0.1B")
    assert not list(client.cache.rglob("*.incomplete"))


def test_a_full_disk_is_an_error_of_the_system(repo: Repository, client: HubClient) -> None:
    code = f"""
import resource
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
try:
    {FETCH.strip().replace(chr(10), chr(10) + "    ")}
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
"""

    with pytest.raises(OSError, match="File too large") as caught:
        client(code, uri="hg://Qwen/Tiny-0.1B", progress=False)
    assert type(caught.value) is OSError
    assert not list(client.cache.rglob("*.incomplete"))


PROCESS = """
import sys
from lading.sources.hub.source import HubSource
source = HubSource("hg://Qwen/Large")
snapshot = source.snapshot()
for file in source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False):
    print(file.name, file.sha256)
"""


@pytest.fixture
def start(nursery: Nursery, hub: FakeHub, tmp_path: Path) -> Callable[[], Child]:
    """Return a function that starts a process, which fetches a repository."""
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}

    return lambda: nursery.start(["-c", PROCESS], {**os.environ, **env})


def wait_for_a_part(process: Child, folder: Path) -> None:
    while not any(map(has_bytes, folder.rglob("*.incomplete"))):
        assert process.runs(), process.complained()
        time.sleep(0.02)


def has_bytes(path: Path) -> bool:
    """Return True if the file has bytes; a part that is complete is renamed at any time."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_fetch_leaves_no_half_file(
    start: Callable[[], Child], hub: FakeHub, client: HubClient, tmp_path: Path, number: signal.Signals
) -> None:
    large = WEIGHTS * 82  # huggingface_hub hands on 10 MiB at once
    hub.add("Qwen/Large", {"a.safetensors": large, "config.json": CONFIG})
    hub.misbehave("a.safetensors", "drip", 1)

    process = start()
    wait_for_a_part(process, tmp_path)
    process.signal(number)
    ended = process.wait()

    assert ended.code == -number
    if number == signal.SIGINT:
        assert ended.err.rstrip().endswith("KeyboardInterrupt")
        assert not list(tmp_path.rglob("*.incomplete"))
    assert not list(tmp_path.rglob("snapshots/*/a.safetensors"))
    assert {f.name: f.path.read_bytes() for f in _fetch(client, "hg://Qwen/Large")} == {
        "a.safetensors": large,
        "config.json": CONFIG,
    }


def test_several_processes_fetch_the_same(start: Callable[[], Child], hub: FakeHub) -> None:
    hub.add("Qwen/Large", {"a.safetensors": WEIGHTS, "b.safetensors": WEIGHTS[1:], "config.json": CONFIG})
    hub.misbehave("a.safetensors", "slow", 4)

    processes = [start() for _ in range(4)]
    ended = [process.wait() for process in processes]

    assert [each.code for each in ended] == [0] * 4, ended
    assert len({each.out for each in ended}) == 1
    assert ended[0].out.splitlines()[0] == f"a.safetensors {hashlib.sha256(WEIGHTS).hexdigest()}"


IMPATIENT = f"""
from lading.sources import partial
partial.SILENCE, before = 0.5, partial.SILENCE
try:
{textwrap.indent(FETCH, "    ")}
finally:
    partial.SILENCE = before
"""


@pytest.mark.slow
def test_a_fetch_that_is_stopped_is_not_waited_for(
    start: Callable[[], Child], hub: FakeHub, client: HubClient, tmp_path: Path
) -> None:
    large = WEIGHTS * 82
    hub.add("Qwen/Large", {"a.safetensors": large})
    hub.misbehave("a.safetensors", "drip", 1)

    process = start()
    wait_for_a_part(process, tmp_path)
    process.signal(signal.SIGSTOP)
    (file,) = client(IMPATIENT, uri="hg://Qwen/Large", progress=False)
    assert file.path.read_bytes() == large
    process.kill()
    assert "no sign of life" in client.stderr()


NO_LOCKS = """
import errno, fcntl
flock = fcntl.flock
def without(fd, how):
    raise OSError(getattr(errno, name), "no locks here")
fcntl.flock = without
try:
    {fetch}
finally:
    fcntl.flock = flock
"""


@pytest.mark.parametrize("name", ["ENOLCK", "EIO", "ENOTSUP"])
def test_a_file_system_without_locks(hub: FakeHub, repo: Repository, client: HubClient, name: str) -> None:
    code = NO_LOCKS.format(fetch=FETCH.strip().replace("\n", "\n    "))
    files = client(code, uri="hg://Qwen/Tiny-0.1B", progress=False, name=name)
    assert {file.name: file.path.read_bytes() for file in files} == FILES


# --- who may ---------------------------------------------------------------------------------------------------------


def test_a_gated_model_says_where_to_ask(hub: FakeHub, client: HubClient) -> None:
    hub.add("meta-llama/Big", FILES, gated=True)
    hub.tokens = {TOKEN, "hf_stranger"}

    for token in (None, "hf_stranger"):
        for call in (FETCH, READ):
            with pytest.raises(ModelGatedError, match="Request access at http") as caught:
                client(
                    call, uri="hg://Meta-Llama/big", progress=False, name="config.json", offset=0, size=1, token=token
                )
            assert caught.value.name == "meta-llama/Big"
            assert caught.value.info_url == f"{hub.url}/meta-llama/Big"
    assert len(_fetch(client, "hg://meta-llama/Big", token=TOKEN)) == 3


def test_a_private_model_is_not_found(hub: FakeHub, client: HubClient) -> None:
    hub.add("me/secret", FILES, private=True)
    hub.tokens = {TOKEN, "hf_stranger"}

    for token in (None, "hf_stranger"):
        with pytest.raises(CheckpointNotFoundError, match="HF_TOKEN"):
            client(SNAPSHOT, uri="hg://me/secret", revision=None, token=token)
    assert len(_fetch(client, "hg://me/secret", token=TOKEN)) == 3


def test_a_token_that_the_hub_does_not_accept(repo: Repository, client: HubClient) -> None:
    with pytest.raises(FetchError, match="does not accept your token"):
        client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision=None, token="hf_wrong")


@pytest.mark.parametrize("token", [None, TOKEN])
def test_what_is_not_there(repo: Repository, client: HubClient, token: str | None) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"hg://Qwen/None: .* no such repository") as caught:
        client(SNAPSHOT, uri="hg://Qwen/None", revision=None, token=token)
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(CheckpointNotFoundError, match="not the revision"):
        client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision="never", token=token)


@pytest.mark.parametrize("fault", ["gzip", "ignore-range", "wrong-range", "long"])
def test_a_signed_address_is_not_shown(hub: FakeHub, repo: Repository, client: HubClient, fault: str) -> None:
    hub.misbehave("model.safetensors", fault)
    with pytest.raises(FetchError, match=f"{hub.cdn_url}.*: expected") as caught:
        client(READ, uri="hg://Qwen/Tiny-0.1B", name="model.safetensors", offset=8, size=100)
    assert "signed" not in str(caught.value)


def test_a_password_in_the_address_of_the_hub_is_not_shown(repo: Repository, hub: FakeHub, tmp_path: Path) -> None:
    client = HubClient(hub.url.replace("http://", "http://me:secret@"), tmp_path)
    try:
        for uri in ("hg://Qwen/None", "hg://Qwen/Tiny-0.1B"):
            with pytest.raises((CheckpointNotFoundError, FetchError)) as caught:
                client(SNAPSHOT, uri=uri, revision="never")
            assert "secret" not in str(caught.value)
    finally:
        client.close()


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    with FakeHub() as gone:
        url = gone.url
    client = HubClient(url, tmp_path)
    try:
        with pytest.raises(FetchError, match="Check the network"):
            client(SNAPSHOT, uri="hg://Qwen/Tiny-0.1B", revision=None)
    finally:
        client.close()


# --- offline ---------------------------------------------------------------------------------------------------------

OFFLINE = """
import sys
opened = []
if not globals().get("silent"):
    sys.addaudithook(lambda event, args: opened.append(event) if event.startswith("socket.") else None)
source = HubSource(uri, offline=True)
snapshot = source.snapshot()
file = snapshot.file("model.safetensors")
files = source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
result = snapshot, read_bytes(source, snapshot, file, 10, 5), files, list(opened)
"""


def test_offline_the_cache_answers_and_no_socket_is_opened(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    online = client(SNAPSHOT, uri="hg://qwen/tiny-0.1b", revision=None)
    files = _fetch(client)
    hub.requests.clear()

    snapshot, read, again, sockets = client(OFFLINE, uri="hg://qwen/tiny-0.1b")

    # The names of blobs are the digests that the hub published; what else it has, a cache does not know.
    assert snapshot == replace(online, partial=True)
    assert read == WEIGHTS[10:15]
    assert again == files
    assert not sockets
    assert not hub.requests


def test_offline_what_is_not_here_says_so(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    with pytest.raises(FetchError, match=r"revision main is not in the cache at .* LADING_OFFLINE"):
        client(OFFLINE, uri="hg://qwen/tiny-0.1b", silent=True)

    code = """
source = HubSource(uri)
snapshot = source.snapshot()
source.fetch(snapshot, [snapshot.file("config.json")], known=lambda _: None, progress=False)
source = HubSource(uri, offline=True)
call(source, snapshot)
"""
    for call in (_read_offline, _fetch_offline):
        with pytest.raises(FetchError, match=r"model.safetensors is not in the cache"):
            client(code.replace("call(source, snapshot)", call), uri="hg://qwen/tiny-0.1b")


_read_offline = "read_bytes(source, snapshot, snapshot.file('model.safetensors'), 0, 1)"
_fetch_offline = "source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)"


def test_offline_a_bad_copy_is_not_used(repo: Repository, client: HubClient) -> None:
    (path,) = (f.path for f in _fetch(client) if f.name == "model.safetensors")
    path.resolve().write_bytes(WEIGHTS[:-1] + b"x")

    with pytest.raises(DigestMismatchError, match="Unset LADING_OFFLINE"):
        client(OFFLINE, uri="hg://qwen/tiny-0.1b", silent=True)


def test_the_variable_of_huggingface_hub_holds_too(hub: FakeHub, repo: Repository, client: HubClient) -> None:
    code = f"constants.HF_HUB_OFFLINE = True\ntry:\n    {SNAPSHOT}\nfinally:\n    constants.HF_HUB_OFFLINE = False"

    with pytest.raises(FetchError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"):
        client(code, uri="hg://Qwen/Tiny-0.1B", revision=None)
    assert not hub.requests


def test_the_source_is_light_until_it_is_used() -> None:
    code = (
        "import sys, lading.sources.hub.source as hf; hf.HubSource('hg://a/b').cached_snapshot(); print(*sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert not {"huggingface_hub", "torch", "httpx", "httpx2", "pydantic"} & set(out.stdout.split())
