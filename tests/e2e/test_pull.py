"""From a name to weights that are not here yet: fetched from a hub on loopback, checked, loaded, verified, repaired."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.helpers.torch_files import save_shards
from tests.servers.hub import TOKEN, FakeHub

Run = Callable[..., subprocess.CompletedProcess[str]]

SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        make(tmp_path / "repository", shards=2)
        (tmp_path / "repository" / "tokenizer.json").write_text("{}")
        torch.save({"model": tensors()}, tmp_path / "repository" / "model.pt")
        hub.add("Some/Tiny-Qwen", tmp_path / "repository")
        yield hub


@pytest.fixture
def run(process: Run, hub: FakeHub, tmp_path: Path) -> Run:
    """The command line, in a process that knows the hub; a list of words gives what it printed."""
    env = {
        "LADING_OFFLINE": "",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    path = tmp_path / "cards.yaml"
    cards = [
        qwen_card("far", "hg://some/tiny-qwen"),
        qwen_card("misfit", "hg://some/tiny-qwen").replace("num_layers: 2", "num_layers: 3"),
        qwen_card("pickled", "hg://some/tiny-qwen/model.pt"),
    ]
    path.write_text("---\n".join(cards))

    def run(*words: str | Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        done = process(*words, env=env | more)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    run("import", path)
    return run


def weights(hub: FakeHub) -> list[str]:
    """The requests for bytes of weights."""
    return [r.path for r in hub.requests if r.origin == "cdn" and r.method == "GET" and r.range is None]


def shard_of(tmp_path: Path) -> Path:
    (link,) = tmp_path.glob(f"hf/hub/models--Some--Tiny-Qwen/snapshots/*/{SHARD}")
    return link.resolve()


def damage(path: Path) -> None:
    """Flip one bit of the last byte, which is a tensor's."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_from_headers_to_weights_and_back(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    # Known before the download, from headers alone.
    indexed = json.loads(run("index", "hg://some/tiny-qwen", "--json").stdout)
    assert len(indexed["revision"]) == 40
    assert all(len(shard["sha256"]) == 64 for shard in indexed["shards"])
    rows = json.loads(run("sql", "--json", "select count(*) n from model_tensors where model = 'far'").stdout)
    assert rows == [{"n": indexed["tensors"]}]
    assert run("check", "far").stdout.startswith("ok")
    assert weights(hub) == []

    # What does not fit is refused before a byte of it is fetched.
    assert "does not fit" in run("pull", "misfit", code=4).stderr
    assert "does not fit" in run("load", "misfit", code=4).stderr
    planned = json.loads(run("pull", "far", "--dry-run", "--json").stdout)
    assert {file["fetched"] for file in planned} == {True}
    assert weights(hub) == []
    assert "`lading pull far`" in run("path", "far", code=2).stderr

    # A load fetches by itself.
    report = json.loads(run("load", "far", "--dtype", "auto", "--json", "--no-progress").stdout)
    assert report["shards"] == 2
    assert len(weights(hub)) == 2
    folder = Path(run("path", "far").stdout.strip())
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]

    # From now on no server gets a request.
    hub.requests.clear()
    run("load", "far", "--no-progress")
    run("load", "far", "--no-progress", LADING_OFFLINE="1")
    assert hub.requests == []

    # A pull looks for what is new, and brings what lies beside.
    pulled = json.loads(run("pull", "far", "--include", "tokenizer*", "--json", "--no-progress").stdout)
    assert {f["name"] for f in pulled if f["fetched"]} == {
        "config.json", "model.safetensors.index.json", "tokenizer.json",
    }  # fmt: skip
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert weights(hub) == []

    # The audit of all that.
    rows = json.loads(run("sql", "--json", "select method, result, expected = found ok from verifications").stdout)
    assert {(r["method"], r["result"], r["ok"]) for r in rows} >= {("sha256", "match", 1)}
    verified = json.loads(run("verify", "far", "--json", "--no-progress").stdout)
    assert [(v["result"], v["method"]) for v in verified] == [("match", "sha256")] * 2


def test_a_bit_that_flips_is_found_and_repaired(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    run("pull", "far", "--no-progress")
    damage(shard_of(tmp_path))

    assert [v["result"] for v in json.loads(run("verify", "far", "--json", code=4).stdout)] == ["mismatch", "match"]
    assert "Unset LADING_OFFLINE" in run("load", "far", "--no-progress", code=4, LADING_OFFLINE="1").stderr
    repaired = json.loads(run("verify", "far", "--repair", "--json", "--no-progress").stdout)
    assert [v["result"] for v in repaired] == ["repaired", "match"]

    # A load fetches a file again that differs from the published one, and says so.
    damage(shard_of(tmp_path))
    assert "is not what the hub publishes" in run("load", "far", "--no-progress").stderr


def test_a_hub_cache_without_links(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    plain = {"HF_HUB_DISABLE_SYMLINKS": "1"}
    run("pull", "far", "--no-progress", **plain)
    path = shard_of(tmp_path)
    assert not path.is_symlink()
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))

    run("verify", "far", "--no-progress", code=4, **plain)
    (row,) = {v["result"] for v in json.loads(run("verify", "far", "--repair", "--json", **plain).stdout)} - {"match"}
    assert row == "repaired"
    assert path.read_bytes() == good
    run("rm", "far", "--yes", **plain)
    assert [p for p in (tmp_path / "hf" / "hub").rglob("*") if p.is_file() and p.stat().st_size > 1000] == []


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [3000, 0])
def test_a_part_of_a_file_in_a_snapshot_is_fetched_again(run: Run, tmp_path: Path, size: int) -> None:
    run("pull", "far", "--no-progress")
    (link,) = tmp_path.glob(f"hf/hub/models--Some--Tiny-Qwen/snapshots/*/{SHARD}")
    good = link.read_bytes()
    part = link.resolve().with_name("0" * 64)
    part.write_bytes(good[:size])
    link.unlink()
    link.symlink_to(part)

    run("load", "far", "--no-progress", code=5, LADING_OFFLINE="1")
    run("load", "far", "--no-progress")
    assert link.read_bytes() == good


def test_a_bit_that_flips_behind_an_unchanged_state(run: Run, hub: FakeHub, tmp_path: Path, catalog: Path) -> None:
    run("pull", "far", "--no-progress")
    run("load", "far", "--no-progress", "--verify", "always")  # records the digests of tensors
    path = shard_of(tmp_path)
    damage(path)
    stat = path.stat()
    with closing(sqlite3.connect(catalog)) as connection, connection:
        connection.execute(
            "UPDATE copies SET mtime_ns = ?, ctime_ns = ?, inode = ? WHERE file = ?",
            (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, SHARD),
        )

    run("load", "far", "--no-progress")  # the state is the one that was seen verified
    assert "not those that were verified" in run("load", "far", "--no-progress", "--verify", "always", code=4).stderr
    assert "`lading verify far --repair`" in run("load", "far", "--no-progress", code=4).stderr  # it counts no more
    run("verify", "far", "--repair", "--no-progress")
    run("load", "far", "--no-progress")


def test_what_is_published_moves_on(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    run("pull", "far", "--no-progress")
    folder = tmp_path / "repository"
    state = {k: v + 1 for k, v in load_file(folder / "model-00001-of-00002.safetensors").items()}
    save_file(state, folder / "model-00001-of-00002.safetensors")
    old = hub.repositories["some/tiny-qwen"].refs["main"]
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    new = hub.repositories["some/tiny-qwen"].commit(files)

    def revision() -> str:
        return json.loads(run("show", "far", "--json").stdout)["checkpoint"]["indexed"]["revision"]

    run("load", "far", "--no-progress")  # stays with what was pulled
    assert revision() == old
    hub.requests.clear()
    pulled = json.loads(run("pull", "far", "--json", "--no-progress").stdout)
    assert revision() == new
    assert len(weights(hub)) == 1  # the other shard is here already, by its content
    assert len(pulled) == 5  # with the index, the configuration and the tokenizer
    run("load", "far", "--no-progress", "--verify", "always")
    run("pull", "far", "--revision", old, "--no-progress")
    assert revision() == old


def test_nothing_is_asked_offline(run: Run, hub: FakeHub) -> None:
    error = run("load", "far", code=5, LADING_OFFLINE="1").stderr
    assert "LADING_OFFLINE" in error
    assert hub.requests == []


@pytest.mark.slow
def test_another_revision_cannot_be_asked_for_offline(run: Run, hub: FakeHub) -> None:
    run("pull", "far", "--no-progress")
    known = hub.repositories["some/tiny-qwen"].refs["main"]
    hub.requests.clear()

    run("pull", "far", "--revision", known, "--no-progress", LADING_OFFLINE="1")
    error = run("pull", "far", "--revision", "v2", "--no-progress", code=5, LADING_OFFLINE="1").stderr
    assert "'v2'" in error
    assert known in error
    assert hub.requests == []


def test_a_card_that_is_gated_is_open_to_who_has_a_token(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.repositories["some/tiny-qwen"].gated = True
    path = tmp_path / "gated.yaml"
    path.write_text(qwen_card("closed", "hg://some/tiny-qwen;gated=true"))
    run("import", path)

    assert "Request access at" in run("load", "closed", code=7).stderr
    assert hub.requests == []
    run("pull", "closed", "--no-progress", HF_TOKEN=TOKEN)
    run("load", "closed", "--no-progress")  # it is here now


def test_a_gated_repository_says_where_to_ask(run: Run, hub: FakeHub) -> None:
    hub.repositories["some/tiny-qwen"].gated = True
    assert "Some/Tiny-Qwen" in run("load", "far", code=7).stderr.replace("some/tiny-qwen", "Some/Tiny-Qwen")


@pytest.mark.slow
def test_what_torch_saved_is_fetched_first(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    report = json.loads(run("load", "pickled", "--dtype", "auto", "--json", "--no-progress").stdout)
    assert report["tensors"] == len(tensors())
    assert Path(run("path", "pickled").stdout.strip()).name == "model.pt"
    hub.requests.clear()
    run("load", "pickled", "--no-progress", "--mmap")
    assert [v["result"] for v in json.loads(run("verify", "pickled", "--json").stdout)] == ["match"]
    assert hub.requests == []


def test_a_repository_of_before_safetensors(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "before")
    (folder / "model.safetensors").unlink()
    save_shards(folder, {name: _turned(value) for name, value in tensors().items()})
    hub.add("Some/Before", folder)
    (tmp_path / "before.yaml").write_text(qwen_card("before", "hg://some/before"))
    run("import", tmp_path / "before.yaml")

    run("index", "before")
    assert json.loads(run("load", "before", "--dtype", "auto", "--json", "--no-progress").stdout)["shards"] == 2
    assert sorted(weights(hub)) == sorted(set(weights(hub)))  # each file once
    hub.requests.clear()
    run("load", "before", "--no-progress", "--mmap", "--verify", "always")
    assert [v["result"] for v in json.loads(run("verify", "before", "--json").stdout)] == ["match"] * 2
    assert hub.requests == []
    run("export", "before", tmp_path / "out")
    assert weights(hub) == []
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in tensors().items())


@pytest.mark.slow
def test_a_repository_of_one_file_of_before_safetensors(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "before")
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").write_text("{}")
    torch.save(tensors(), folder / "pytorch_model.bin")
    hub.add("Some/Before", folder)
    (tmp_path / "before.yaml").write_text(qwen_card("before", "hg://some/before"))
    run("import", tmp_path / "before.yaml")

    assert json.loads(run("pull", "before", "--dry-run", "--json").stdout)[0]["fetched"]
    assert weights(hub) == []

    def pulled() -> dict[str, bool]:
        return {file["name"]: file["fetched"] for file in json.loads(run("pull", "before", "--json").stdout)}

    assert pulled() == {"pytorch_model.bin": True, "config.json": True, "tokenizer.json": True}
    assert not pulled()["pytorch_model.bin"]
    run("load", "before", LADING_OFFLINE="1")
    assert len(weights(hub)) == 1

    # What is published moves on; a load does not, but a pull.
    torch.save({name: tensor * 2 for name, tensor in tensors().items()}, folder / "pytorch_model.bin")
    hub.repositories["some/before"].commit({path.name: path.read_bytes() for path in folder.iterdir()})
    run("load", "before")
    assert len(weights(hub)) == 1
    assert pulled()["pytorch_model.bin"]
    assert len(weights(hub)) == 2


def test_a_quantized_repository_of_before_safetensors_is_refused(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "before", quantization_config={"quant_method": "gptq"})
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors())
    hub.add("Some/Before", folder)
    (tmp_path / "before.yaml").write_text(qwen_card("before", "hg://some/before"))
    run("import", tmp_path / "before.yaml")

    assert "gptq" in run("load", "before", code=2).stderr
    assert weights(hub) == []


@pytest.mark.slow
def test_a_shard_that_the_repository_lacks(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    folder = make(tmp_path / "before")
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors())
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    hub.add("Some/Before", folder)
    (tmp_path / "before.yaml").write_text(qwen_card("before", "hg://some/before"))
    run("import", tmp_path / "before.yaml")

    assert "'pytorch_model-00002-of-00002.bin'" in run("load", "before", code=4).stderr
    assert weights(hub) == []


def _turned(value: torch.Tensor) -> torch.Tensor:
    """The same numbers, column after column."""
    return value.t().contiguous().t() if value.ndim == 2 else value


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A folder on a web server that knows no ranges."""
    folder = tmp_path / "web"
    make(folder, shards=2)
    torch.save({"model": tensors()}, folder / "model.pt")
    save_shards(folder, tensors())
    for path in folder.iterdir():  # a validator of HTTP has to be older than a minute
        os.utime(path, (1_700_000_000, 1_700_000_000))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.few(1)
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model.pt", "pytorch_model.bin.index.json"])
def test_from_a_web_server(process: Run, web: str, tmp_path: Path, file: str) -> None:
    (tmp_path / "cards.yaml").write_text(qwen_card("web", f"{web}/{file}"))
    cache = {"LADING_OFFLINE": "", "LADING_CACHE_DIR": str(tmp_path / "cache")}

    def run(*words: str, **env: str) -> str:
        done = process(*words, env=cache | env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("import", str(tmp_path / "cards.yaml"))
    assert json.loads(run("load", "web", "--dtype", "auto", "--json", "--no-progress"))["parameters"] > 0
    run("load", "web", "--no-progress", "--verify", "always", LADING_OFFLINE="1")
    assert [v["result"] for v in json.loads(run("verify", "web", "--json"))] == ["match"] * (
        1 if file == "model.pt" else 2
    )
    paths = run("path", "web").splitlines()
    assert all(Path(path).is_relative_to(tmp_path / "cache" / "blobs") for path in paths)


def test_a_repair_that_fails_leaves_the_files_as_they_were(process: Run, web: str, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(qwen_card("web", f"{web}/model.safetensors.index.json"))
    cache = {"LADING_OFFLINE": "", "LADING_CACHE_DIR": str(tmp_path / "cache")}
    for words in (("import", str(tmp_path / "cards.yaml")), ("pull", "web", "--no-progress")):
        assert process(*words, env=cache).returncode == 0
    path = Path(process("path", "web", env=cache).stdout.splitlines()[0])
    good = path.read_bytes()
    damage(path)
    damaged = path.read_bytes()

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in (tmp_path / "cache" / "blobs").rglob("*") if p.is_file()}

    before = files()
    assert process("verify", "web", "--repair", "--no-progress", env=cache | {"LADING_OFFLINE": "1"}).returncode == 5
    assert files() == before
    assert path.read_bytes() == damaged
    assert process("verify", "web", "--repair", "--no-progress", env=cache).returncode == 0
    assert path.read_bytes() == good
    assert files().keys() == before.keys()


@pytest.mark.few(1)
@pytest.mark.parametrize("file", ["model.safetensors.index.json", "model.pt"])
def test_what_a_web_server_has_not(
    cli: Callable[..., Result], web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "web" / "words.txt").write_text("a b")
    (tmp_path / "cards.yaml").write_text(qwen_card("web", f"{web}/{file}"))
    cli("import", tmp_path / "cards.yaml")

    assert "has no revisions, but 'main' was requested" in cli("pull", "web", "--revision", "main", code=2).stderr
    for pattern in ("*.txt", "a/b", ".."):
        assert f"names of files to include, such as tokenizer.json, found {pattern!r}" in (
            cli("pull", "web", "--include", pattern, code=2).stderr
        )
    assert not (tmp_path / "cache").exists()

    words = ("pull", "web", "--include", "words.txt", "--include", "none.txt", "--no-progress", "--json")
    done = cli(*words)
    assert "no file 'none.txt' is beside" in done.stderr
    (path,) = (row["path"] for row in json.loads(done.stdout) if row["name"] == "words.txt")
    assert Path(path).read_text() == "a b"
    cli("rm", "web")
    assert not Path(path).exists()


TOKENIZERS = """\
name: with_another
base: far
tokenizer: hg://some/words
---
name: with_a_reference
base: far
tokenizer_ref: with_another
---
name: with_its_own
base: far
tokenizer: hf://Some/Tiny-Qwen
"""

WORDS = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}}'

ASK = (
    "import sys; from lading import load_tokenizer; print(load_tokenizer(sys.argv[1], progress=False).vocab_info.size)"
)


def test_the_tokenizer_comes_along(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    hub.add("Some/Words", {"tokenizer.json": WORDS.encode(), "tokenizer_config.json": b"{}", "notes.md": b""})
    (tmp_path / "tokenizers.yaml").write_text(TOKENIZERS)
    run("import", tmp_path / "tokenizers.yaml")

    def fetched(*words: str) -> set[str]:
        files = json.loads(run("pull", *words, "--json", "--no-progress").stdout)
        return {f["name"] for f in files if not f["name"].startswith(("model", "config"))}

    assert fetched("far") == fetched("with_its_own") == {"tokenizer.json"}
    elsewhere = {"hg://some/words: tokenizer.json", "hg://some/words: tokenizer_config.json"}
    assert fetched("with_another", "--dry-run") == elsewhere
    assert not list(tmp_path.glob("hf/hub/models--Some--Words/snapshots/*/tokenizer.json"))
    assert fetched("with_another") == fetched("with_a_reference") == elsewhere
    assert list(tmp_path.glob("hf/hub/models--Some--Words/snapshots/*/tokenizer.json"))

    # An exported repository has the card's tokenizer; by now no server gets a request.
    hub.requests.clear()
    for name, expected in (("with_a_reference", WORDS), ("far", "{}")):
        run("export", name, tmp_path / name, "--no-progress", LADING_OFFLINE="1")
        assert (tmp_path / name / "tokenizer.json").read_text() == expected
        assert (tmp_path / name / "tokenizer_config.json").exists() == (expected == WORDS)
    assert hub.requests == []

    assert run("-c", ASK, "with_a_reference", LADING_OFFLINE="1").stdout == "2\n"


@pytest.mark.slow
def test_a_tokenizer_that_is_gone_is_said_before_weights_are_fetched(run: Run, hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "tokenizers.yaml").write_text(TOKENIZERS)
    run("import", tmp_path / "tokenizers.yaml")
    assert "some/words" in run("pull", "with_another", code=2).stderr
    assert weights(hub) == []
