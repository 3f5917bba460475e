"""Names of the hub, and its cache read without its library."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import validate_repo_id

from lading.errors import FetchError, ModelGatedError, PolicyError
from lading.sources.hub.address import HubAddress, is_file_name, is_repo_id
from lading.sources.hub.cache import cached_commit, cached_file, hub_cache, repository_folders, snapshot_folders
from lading.sources.hub.files import git_blob_id
from lading.sources.hub.source import HubSource
from lading.sources.source import RemoteFile, Snapshot, Source, read_bytes

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40
SHA256 = "ab" * 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; huggingface_hub, which other tests of this process import, has read its variables already."""
    path = tmp_path / "home" / "hub"
    path.mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(path))
    return path


def _put(cache: Path, repo: str, commit: str, name: str, data: bytes, tag: str | None) -> Path:
    """As huggingface_hub puts it there: a blob, and a link to it under the name; without a tag, the file itself."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    path = folder / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if tag is None:
        path.write_bytes(data)
        return path
    blob = folder / "blobs" / tag
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(data)
    path.symlink_to(os.path.relpath(blob, path.parent))
    return path


def _head(cache: Path, repo: str, commit: str, ref: str = "main") -> None:
    path = cache / f"models--{repo.replace('/', '--')}" / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "repo", "revision", "inner"),
    [
        ("hg://Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None, None),
        ("hf://Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None, None),
        ("hg://gpt2", "gpt2", None, None),
        ("hg://gpt2@main", "gpt2", "main", None),
        ("hg://gpt2@main/a/b.pt", "gpt2", "main", "a/b.pt"),
        ("hg://org/name/model.pt", "org/name", None, "model.pt"),
        ("hg://org/name@v1.0/sub/model.pt", "org/name", "v1.0", "sub/model.pt"),
        (f"hg://org/name@{COMMIT}", "org/name", COMMIT, None),
        ("hg://org/name@refs/pr/12", "org/name", "refs/pr/12", None),
        ("hg://org/name@refs/pr/12/x", "org/name", "refs/pr/12", "x"),
        ("hg://org/name@feature%2Fone/x", "org/name", "feature/one", "x"),
        ("hf://models/org/name", "org/name", None, None),
        ("hg://org/_name_", "org/_name_", None, None),
    ],
)
def test_addresses(uri: str, repo: str, revision: str | None, inner: str | None) -> None:
    assert HubAddress.from_uri(uri) == HubAddress(repo=repo, revision=revision, inner=inner)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "hg://",
        "hg:///",
        "hg://org/",
        "hg:///name",
        "https://huggingface.co/org/name",
        "HG://org/name",
        "hg://org/na me",
        "hg://org/name\n",
        "hg://org/näme",
        "hg://org/name.git",
        "hg://org/na--me",
        "hg://../name",
        "hg://org/..",
        "hg://org/.hidden",
        "hg://org/-name",
        "hg://org/name-",
        "hg://org/" + "x" * 97,
        "hg://datasets/org/name",
        "hf://spaces/org/name",
        "hg://user:password@host/name",
        "hg://org/name@",
        "hg://org/name@../x",
        "hg://org/name@a..b",
        "hg://org/name@a%2F..%2Fb",
        "hg://org/name@%2Fetc",
        "hg://org/name@a%00b",
        "hg://org/name@-force",
        "hg://org/name/../x",
        "hg://org/name/a//b",
        "hg://org/name/a/",
        "hg://org/name/a\\b",
        "hg://org/name?revision=x",
        "hg://org/name#x",
    ],
)
def test_what_is_no_address(uri: str) -> None:
    with pytest.raises(FetchError, match="expected"):
        HubAddress.from_uri(uri)


def test_a_revision_given_apart_is_checked_and_wins() -> None:
    assert HubSource("hg://a/b@one", revision="two").revision == "two"
    assert HubSource("hg://a/b@one/x", revision=None).revision == "one"
    with pytest.raises(FetchError, match=r"expected the revision .* found '\.\./x'"):
        HubSource("hg://a/b", revision="../x")


@pytest.mark.parametrize("text", ["a/b", "a", "_a/b_", "A.b-c_d/E", "x" * 96, "o/" + "x" * 96, "0", "a-b", "a.b"])
def test_ids_are_ids_for_the_client_too(text: str) -> None:
    assert is_repo_id(text)
    validate_repo_id(text)


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../x", "a/../b", "a/./b", "a//b", "a/", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\ud800", ".."],
)
def test_names_that_no_file_may_have(name: str) -> None:
    assert not is_file_name(name)
    source = HubSource("hg://a/b")
    snapshot = Snapshot(uri="hg://a/b", revision=COMMIT, files=(RemoteFile(name=name, size=1),))

    with pytest.raises(FetchError, match="relative path of plain segments"):
        source.fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)
    with pytest.raises(FetchError, match="relative path of plain segments"):
        read_bytes(source, snapshot, snapshot.files[0], 0, 1)
    assert source.local(snapshot, snapshot.files) == [None]


@pytest.mark.parametrize("name", ["a", ".gitattributes", "a/b/c.bin", "Ünï/ç.txt", "two words", "a..b", "x" * 255])
def test_names_that_a_file_may_have(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize("revision", ["", "main", "../../x", COMMIT[:-1], COMMIT.upper() + "A"])
def test_only_a_commit_pins(revision: str) -> None:
    snapshot = Snapshot(uri="hg://a/b", revision=revision, files=(RemoteFile(name="x", size=1),))

    with pytest.raises(FetchError, match="at a commit"):
        read_bytes(HubSource("hg://a/b"), snapshot, snapshot.files[0], 0, 1)
    with pytest.raises(FetchError, match="at a commit"):
        HubSource("hg://a/b").fetch(snapshot, snapshot.files, known=lambda _: None, progress=False)


def test_it_is_a_source() -> None:
    source: Source = HubSource("hg://org/name@v1/inner/file.pt")

    assert source.uri == "hg://org/name@v1/inner/file.pt"
    assert (source.inner, source.kind, source.lists) == ("inner/file.pt", "hub", True)
    snapshot = Snapshot(uri=source.uri, revision=COMMIT, files=())
    assert source.with_siblings(snapshot, ["x"]) is snapshot


@pytest.mark.parametrize(
    ("uri", "inner_path", "inner"),
    [
        ("hg://a/b", None, None),
        ("hg://a/b", "c/d.pth", "c/d.pth"),
        ("hg://gpt2", "c.pth", "c.pth"),
        ("hg://a/b/c", None, "c"),
        ("hg://a/b@v1/c", "d/", "c/d"),
    ],
)
def test_the_path_of_a_card_is_inside_that_of_the_address(uri: str, inner_path: str | None, inner: str | None) -> None:
    source = HubSource(uri, inner_path=inner_path)

    assert source.inner == inner
    assert source.repo == HubSource(uri).repo


@pytest.mark.parametrize("inner_path", ["", "/", "/etc", "../x", "a/../..", "a\0b"])
def test_the_path_of_a_card_does_not_lead_out(inner_path: str) -> None:
    with pytest.raises(PolicyError, match="inside the checkpoint"):
        HubSource("hg://a/b", inner_path=inner_path)


def test_git_names_content_so(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"hello\n")

    assert git_blob_id(path) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_the_error_of_a_gated_model_travels() -> None:
    error = pickle.loads(pickle.dumps(ModelGatedError("a/b", "https://hub/a/b", message="Ask.")))

    assert (str(error), error.name, error.info_url) == ("Ask.", "a/b", "https://hub/a/b")


# --- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "~/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/h/hub"),
        ({"HF_HOME": "~/$WHERE"}, "~/there/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, "/old"),
        ({"HF_HUB_CACHE": "/new", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HOME": "/h"}, "/new"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"WHERE": "there", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants", raising=False)

    assert hub_cache() == Path(expected).expanduser()

    import importlib

    # The library itself, with the same variables.
    import huggingface_hub

    spec = importlib.util.spec_from_file_location(
        "constants_again", Path(huggingface_hub.__file__).parent / "constants.py"
    )
    assert spec is not None
    assert spec.loader is not None
    constants = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(constants)
    assert Path(constants.HF_HUB_CACHE) == hub_cache()


def test_an_id_is_found_in_any_case(cache: Path) -> None:
    path = _put(cache, "Qwen/Qwen3-0.6B", COMMIT, "sub/model.safetensors", b"12345", SHA256)
    _head(cache, "Qwen/Qwen3-0.6B", COMMIT)

    for uri in ("hg://qwen/qwen3-0.6b", "hg://Qwen/Qwen3-0.6B", f"hg://QWEN/qwen3-0.6B@{COMMIT}"):
        source = HubSource(uri, offline=True)
        file = RemoteFile(name="sub/model.safetensors", size=5, sha256=SHA256, etag=f'"{SHA256}"')
        assert source.cached_snapshot() == Snapshot(uri=uri, revision=COMMIT, files=(file,))
        assert source.local(source.snapshot(), [file]) == [path]


def test_of_two_spellings_the_one_asked_for_comes_first(cache: Path) -> None:
    for repo in ("a/b", "A/B", "a/B"):
        _put(cache, repo, COMMIT, "x", b"1", None)

    for repo in ("a/b", "A/B", "a/B"):
        assert next(found for found, _ in repository_folders(repo)) == repo
        assert len(repository_folders(repo)) == 3
    assert repository_folders("a/c") == []


def test_a_file_of_another_size_does_not_count(cache: Path) -> None:
    path = _put(cache, "a/b", COMMIT, "x", b"123", None)
    source = HubSource("hg://a/b")

    def local(name: str, size: int | None, commit: str = COMMIT) -> list[Path | None]:
        return source.local(Snapshot(uri="hg://a/b", revision=commit, files=()), [RemoteFile(name=name, size=size)])

    assert local("x", 3) == local("x", None) == [path]
    assert local("x", 4) == local("y", 3) == local("x", 3, OTHER) == local("x", 3, "../snapshots") == [None]


def test_which_commit_the_cache_means(cache: Path) -> None:
    _put(cache, "a/b", COMMIT, "x", b"1", None)

    assert HubSource("hg://a/b").cached_snapshot().revision == COMMIT, "the only one there is"
    assert HubSource("hg://a/b@v1").cached_snapshot() is None
    _put(cache, "a/b", OTHER, "x", b"1", None)
    assert HubSource("hg://a/b").cached_snapshot() is None, "which of the two is not said"
    _head(cache, "a/b", OTHER)
    _head(cache, "a/b", COMMIT, "refs/pr/1")
    assert HubSource("hg://a/b").cached_snapshot().revision == OTHER
    assert HubSource("hg://a/b@refs/pr/1").cached_snapshot().revision == COMMIT
    _head(cache, "a/b", "e" * 40)
    assert HubSource("hg://a/b").cached_snapshot() is None, "nothing of that commit is here"


@pytest.mark.parametrize("text", ["", "main", "../../../etc", COMMIT.upper(), "x" * 100_000, COMMIT + COMMIT])
def test_a_ref_that_is_nonsense(cache: Path, text: str) -> None:
    _put(cache, "a/b", COMMIT, "x", b"1", None)
    _head(cache, "a/b", text)

    assert cached_commit(cache / "models--a--b", "main") is None


def test_a_snapshot_lists_all_that_is_there(cache: Path) -> None:
    first = _put(cache, "Qwen/Tiny", COMMIT, "config.json", b"{}", "c" * 40)
    _put(cache, "Qwen/Tiny", COMMIT, "sub/model.safetensors", b"123", SHA256)
    second = _put(cache, "Qwen/Tiny", OTHER, "config.json", b"[]", None)

    assert snapshot_folders(cache / "models--Qwen--Tiny") == [first.parent, second.parent]
    assert HubSource(f"hg://Qwen/Tiny@{COMMIT}").cached_snapshot().files == (
        RemoteFile(name="config.json", size=2, etag='"' + "c" * 40 + '"'),
        RemoteFile(name="sub/model.safetensors", size=3, sha256=SHA256, etag=f'"{SHA256}"'),
    )
    assert HubSource(f"hg://Qwen/Tiny@{OTHER}").cached_snapshot().files == (RemoteFile(name="config.json", size=2),)


def test_no_cache_at_all(cache: Path) -> None:
    cache.rmdir()

    assert repository_folders("a/b") == []
    assert HubSource("hg://a/b", offline=True).cached_snapshot() is None
    with pytest.raises(FetchError, match="LADING_OFFLINE"):
        HubSource("hg://a/b", offline=True).snapshot()


def test_a_blob_of_the_store_that_repositories_share(cache: Path) -> None:
    path = _put(cache, "a/b", COMMIT, "x.safetensors", b"", SHA256)
    store = cache / "blobs" / "ab" / "shared"
    store.parent.mkdir(parents=True)
    store.write_bytes(b"1234")
    blob = path.resolve()
    blob.unlink()
    blob.symlink_to("../../blobs/ab/shared")

    file = RemoteFile(name="x.safetensors", size=4, sha256=SHA256, etag=f'"{SHA256}"')
    assert HubSource("hg://a/b").cached_snapshot().files == (file,)
    assert cached_file(cache / "models--a--b", COMMIT, "x.safetensors") == path
