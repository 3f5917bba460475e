"""A hub that lies, and a cache that others have written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lading.errors import FetchError, LadingError
from lading.sources.hub.cache import cached_file, repository_folders, repository_id, snapshot_files, snapshot_folders
from lading.sources.hub.source import HubSource
from lading.sources.source import RemoteFile, Snapshot
from tests.servers.hub import TOKEN, FakeHub
from tests.servers.hub_client import HubClient

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 100}
COMMIT = "0123456789abcdef" * 2 + "01234567"

FETCH = """
source = HubSource(uri)
snapshot = source.snapshot()
result = snapshot, source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
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
    shared_hub.add("a/b", FILES)
    return shared_hub


@pytest.fixture
def client(shared_client: HubClient, tmp_path: Path) -> HubClient:
    shared_client.cache = tmp_path / "deep" / "er" / "hub"
    shared_client.stderr()
    return shared_client


def _files_below(path: Path) -> set[str]:
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", ["../../../../evil", "/etc/evil", "..\\evil", "a/../../evil", "evil\x1b[2J", "evil\n", ""]
)
def test_names_that_lead_elsewhere_are_left_out(hub: FakeHub, client: HubClient, tmp_path: Path, name: str) -> None:
    repo = hub.add("a/b", {**FILES, name: b"evil"})

    snapshot, files = client(FETCH, uri="hg://a/b")

    assert [f.name for f in snapshot.files] == [f.name for f in files] == sorted(FILES)
    assert "left out" in client.stderr()
    assert not [p for p in _files_below(tmp_path) if "evil" in p]

    hub.requests.clear()
    code = """
file = RemoteFile(name=name, size=4)
HubSource("hg://a/b").fetch(
    Snapshot(uri="hg://a/b", revision=commit, files=(file,)), [file], known=lambda _: None, progress=False
)
"""
    with pytest.raises(FetchError, match="plain segments"):
        client(code, name=name, commit=repo.refs["main"])
    assert not hub.requests


@pytest.mark.few(4)
@pytest.mark.parametrize("tag", ["../../../../evil", "ROOT/evil", "..", "W/ROOT/evil", "..\\evil", "a/b"])
@pytest.mark.parametrize("name", sorted(FILES))
def test_an_entity_tag_is_no_path(hub: FakeHub, client: HubClient, tmp_path: Path, tag: str, name: str) -> None:
    hub.misbehave(name, f"tag:{tag.replace('ROOT', str(tmp_path))}")

    with pytest.raises(FetchError, match="entity tag"):
        client(FETCH, uri="hg://a/b")

    assert not [p for p in _files_below(tmp_path) if "evil" in p]


def test_a_new_client_checks_entity_tags_too(hub: FakeHub, client: HubClient, tmp_path: Path) -> None:
    hub.misbehave("config.json", f"tag:{tmp_path}/evil")
    code = """
from huggingface_hub import close_session, hf_hub_download
guard_client()
close_session()
hf_hub_download("a/b", "config.json")
"""

    with pytest.raises(FetchError, match="entity tag"):
        client(code)

    assert not (tmp_path / "evil").exists()


def test_a_client_that_the_user_makes_stays_and_looks_at_entity_tags_too(hub: FakeHub, tmp_path: Path) -> None:
    own = HubClient(hub.url, tmp_path)
    code = f"""
from huggingface_hub import get_session, set_client_factory
kind = type("Mine", (type(get_session()),), {{}})
set_client_factory(lambda: kind(follow_redirects=True))
{FETCH}
result = result[1], type(get_session()).__name__
"""
    try:
        files, kind = own(code, uri="hg://a/b")
        assert ([file.name for file in files], kind) == (sorted(FILES), "Mine")

        hub.add("a/c", FILES)
        hub.misbehave("config.json", f"tag:{tmp_path}/evil")
        with pytest.raises(FetchError, match="entity tag"):
            own(FETCH, uri="hg://a/c")
    finally:
        own.close()

    assert not (tmp_path / "evil").exists()


def test_another_commit_than_the_one_asked_for(hub: FakeHub, client: HubClient) -> None:
    hub.misbehave("config.json", "other-commit")

    with pytest.raises(FetchError, match="another commit"):
        client(FETCH, uri="hg://a/b")


def _set(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer.update(values)


def _set_file(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["siblings"][1].update(values)


def _set_lfs(**values: object) -> Callable[[dict[str, Any]], None]:
    return lambda answer: answer["siblings"][1]["lfs"].update(values)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    "lie",
    [
        _set(sha="../../../evil"),
        _set(sha="main"),
        _set(sha=None),
        _set(sha=7),
        _set(id="../../evil"),
        _set(id="a/b/c"),
        _set(id="a--b"),
        _set(id=None),
        _set(siblings="evil"),
        _set(siblings=[7]),
        _set_file(rfilename="config.json"),
        _set_lfs(sha256="../../evil"),
        _set_lfs(sha256=None),
        _set_lfs(size=-1),
        _set_lfs(size="12"),
        _set_lfs(size=True),
        lambda answer: answer.pop("id"),
        lambda answer: answer.clear(),
    ],
)
def test_lies_about_a_repository(
    hub: FakeHub, client: HubClient, tmp_path: Path, lie: Callable[[dict[str, Any]], object]
) -> None:
    hub.rewrite = lie

    with pytest.raises(FetchError, match="a/b"):
        client(FETCH, uri="hg://a/b")

    assert not [p for p in _files_below(tmp_path) if "evil" in p]


def test_a_pinned_commit_cannot_become_another(hub: FakeHub, client: HubClient) -> None:
    commit = hub.repositories["a/b"].refs["main"]
    hub.rewrite = _set(sha="f" * 40)

    with pytest.raises(FetchError, match=f"the commit {commit}, found {'f' * 40}"):
        client(FETCH, uri=f"hg://a/b@{commit}")


@pytest.mark.parametrize("size", [0, 1, 25599, 25601, 1 << 60])
def test_a_size_that_is_a_lie(hub: FakeHub, client: HubClient, size: int) -> None:
    hub.rewrite = _set_lfs(size=size)
    code = """
source = HubSource("hg://a/b")
snapshot = source.snapshot()
result = read_bytes(source, snapshot, snapshot.file("model.safetensors"), 0, 1)
"""

    with pytest.raises(FetchError, match=r"expected a file of|it has no bytes"):
        client(code)


def test_what_a_server_writes_does_not_reach_the_terminal(hub: FakeHub, client: HubClient) -> None:
    hub.rewrite = lambda answer: answer.update(siblings=[], sha="\x1b]0;owned\x07" * 100)

    with pytest.raises(LadingError) as caught:
        client(FETCH, uri="hg://a/b")

    assert str(caught.value).isprintable()


def test_a_redirect_does_not_take_the_token_along(hub: FakeHub, client: HubClient) -> None:
    with FakeHub() as thief:
        thief.tokens.clear()
        repo = thief.add("a/b", FILES)
        hub.repositories["a/b"].commits = dict(repo.commits)
        # The hub's redirects lead to the other hub, as if it were its CDN.
        port, hub._cdn.server_port = hub._cdn.server_port, thief._cdn.server_port
        try:
            code = FETCH + "result = read_bytes(source, snapshot, snapshot.file('model.safetensors'), 0, 9)"
            assert client(code, uri="hg://a/b", token=TOKEN) == FILES["model.safetensors"][:9]
        finally:
            hub._cdn.server_port = port

        assert {r.authorization for r in thief.requests} == {None}
        assert len(thief.requests) == 2


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    path = tmp_path / "hub"
    (path / "models--a--b" / "snapshots" / COMMIT).mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(path))
    return path


def test_what_is_no_file_of_the_cache_is_left_out(cache: Path, tmp_path: Path) -> None:
    secret = tmp_path / "hub-of-another"
    secret.write_text("secret")
    snapshot = cache / "models--a--b" / "snapshots" / COMMIT
    (snapshot / "good").write_text("good")
    (snapshot / "absolute").symlink_to(secret)
    (snapshot / "relative").symlink_to("../../../../hub-of-another")
    (snapshot / "twice").symlink_to("absolute")
    (snapshot / "dangling").symlink_to("nothing")
    (snapshot / "itself").symlink_to("itself")
    (snapshot / "folder").symlink_to(tmp_path, target_is_directory=True)
    (snapshot / "up").symlink_to("..", target_is_directory=True)
    (snapshot / "device").symlink_to("/dev/zero")
    os.mkfifo(snapshot / "pipe")
    (snapshot / "line\nbreak").write_text("x")
    (snapshot / "escape\x1b[2J").write_text("x")
    (snapshot / os.fsdecode(b"\xff\xfe")).write_text("x")

    assert [f.name for f in snapshot_files(snapshot)] == ["good"]
    names = sorted(p.name for p in snapshot.iterdir())
    assert [n for n in names if cached_file(cache / "models--a--b", COMMIT, n) is not None] == ["good"]
    source = HubSource("hg://a/b", offline=True)
    assert [f.name for f in source.snapshot().files] == ["good"]
    for name in names:
        file = RemoteFile(name=name, size=None)
        here = source.local(Snapshot(uri="hg://a/b", revision=COMMIT, files=()), [file])
        assert here == [snapshot / "good" if name == "good" else None]


def test_folders_with_names_that_are_no_ids(cache: Path, tmp_path: Path) -> None:
    names = [
        "models--",
        "models--..",
        "models--a--b--c",
        "models--a--",
        "models--x y",
        "datasets--a--b",
        "models--.a",
    ]
    for name in names:
        (cache / name / "snapshots" / COMMIT).mkdir(parents=True)
    (cache / "models--file").write_text("x")
    (cache / "models--link").symlink_to(cache / "models--a--b", target_is_directory=True)
    for name in ("main", "..x", COMMIT.upper(), COMMIT + "0"):
        (cache / "models--a--b" / "snapshots" / name).mkdir()
    (cache / "models--a--b" / "snapshots" / ("e" * 40)).symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(cache / "models--a--b" / "snapshots" / ("d" * 40))

    assert [repository_id(cache / name) for name in names] == [None] * len(names)
    assert repository_folders("a/b", "file", "link") == [("a/b", cache / "models--a--b")]
    assert snapshot_folders(cache / "models--a--b") == [cache / "models--a--b" / "snapshots" / COMMIT]


def test_a_ref_that_never_ends(cache: Path) -> None:
    refs = cache / "models--a--b" / "refs"
    refs.mkdir()
    os.mkfifo(refs / "main")
    (refs / "zero").symlink_to("/dev/zero")

    assert HubSource("hg://a/b@main").cached_snapshot() is None
    assert HubSource("hg://a/b@zero").cached_snapshot() is None


def test_a_deep_folder_ends(cache: Path) -> None:
    deep = cache / "models--a--b" / "snapshots" / COMMIT
    for _ in range(60):
        deep = deep / "x"
    deep.mkdir(parents=True)
    (deep / "file").write_text("x")

    assert snapshot_files(cache / "models--a--b" / "snapshots" / COMMIT) == ()
