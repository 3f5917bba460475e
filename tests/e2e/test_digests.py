"""Digests that one machine publishes in a document, and by which another one verifies what it never had."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import lading
from lading import CorruptModelCheckpointError, DigestMismatchError
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.servers.hostile import Server, honest, serve
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _online(catalog: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def move(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Moves to a machine that has neither a catalog nor a cache yet."""
    count = 0

    def move() -> None:
        nonlocal count
        count += 1
        shutil.copy(template, tmp_path / f"{count}.sqlite")
        monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{tmp_path}/{count}.sqlite")
        monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / f"cache{count}"))

    return move


def add(cli: Cli, folder: Path, uri: object, digests: object, name: str = "team") -> None:
    (folder / f"{name}.yaml").write_text(qwen_card(name, uri, digests=digests))
    cli("import", folder / f"{name}.yaml")


def load(name: str = "team", **options: object) -> dict[str, torch.Tensor]:
    model = lading.load_model(name, dtype=torch.float32, progress=False, **options)  # type: ignore[arg-type]
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def change(folder: Path) -> None:
    """Give one tensor other values, and leave names, shapes and sizes as they are."""
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        if TENSOR in state:
            state[TENSOR][-1] += 1
            save_file(state, path, {"format": "pt"})


def published(cli: Cli, folder: Path, document: Path, move: Callable[[], None]) -> Path:
    """Write the document of the digests of ``folder``, and move to another machine."""
    cli("digests", folder, "--write", document, "--no-progress")
    move()
    return document


def origins(cli: Cli, name: str = "team") -> set[str]:
    return {row["origin"] for row in json.loads(cli("digests", name, "--json", "--no-progress").stdout)}


def refused(act: Callable[[], object], *parts: str) -> None:
    with pytest.raises(DigestMismatchError) as error:
        act()
    for part in parts:
        assert part in str(error.value)


# --- what a document proves ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_that_this_machine_has_never_seen(
    cli: Cli, tmp_path: Path, move: Callable[[], None], shards: int, mmap: bool
) -> None:
    folder = make(tmp_path / "m", shards=shards)
    document = published(cli, folder, tmp_path / "digests.json", move)
    add(cli, tmp_path, "m", "digests.json")
    before = load(mmap=mmap)
    assert origins(cli) == {str(document)}
    assert lading.verify_model("team", progress=False).good
    assert torch.equal(load(mmap=mmap, verify="always")[TENSOR], before[TENSOR])

    change(folder)
    refused(lambda: load(mmap=mmap), TENSOR, str(document))


def test_wrong_files_are_not_taken_for_the_first_ones(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    folder = make(tmp_path / "m", shards=2)
    document = published(cli, folder, tmp_path / "digests.json", move)
    change(folder)
    add(cli, tmp_path, "m", "digests.json")
    refused(load, TENSOR, str(document))
    refused(lambda: lading.pull_model("team", progress=False), TENSOR, str(document))
    found = cli("verify", "team", "--no-progress", "--json", code=4)
    assert [row["result"] for row in json.loads(found.stdout)] == ["mismatch", "match"]
    assert f"the digests of {TENSOR} that {document} publishes" in found.stderr
    assert load(verify="never")

    cli("index", "team")  # accepts files, but not against the card
    refused(load, TENSOR, str(document))


def test_a_document_that_comes_after_the_first_load(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    good, bad = make(tmp_path / "good"), make(tmp_path / "bad")
    change(bad)
    document = published(cli, good, tmp_path / "digests.json", move)
    for folder, act in (("good", lambda: load()), ("bad", lambda: refused(load, TENSOR, str(document)))):
        add(cli, tmp_path, folder, "null", name=folder)
        load(folder)
        add(cli, tmp_path, folder, "digests.json")
        act()
    cli("index", "team")  # forgets what was read here, and takes the document
    refused(load, TENSOR, f"{document} publishes")


def test_a_document_that_changes(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    folder, new = make(tmp_path / "m"), make(tmp_path / "new")
    change(new)
    later = published(cli, new, tmp_path / "later.json", move)
    published(cli, folder, tmp_path / "digests.json", move)
    add(cli, tmp_path, "m", "digests.json")
    load()
    shutil.copy(later, tmp_path / "digests.json")
    refused(load, TENSOR)
    change(folder)
    load()
    (tmp_path / "digests.json").write_text("{}")
    with pytest.raises(CorruptModelCheckpointError, match="the keys format, shards and tensors"):
        load()
    (tmp_path / "digests.json").unlink()  # as a share that is not mounted
    load()
    change(folder)
    refused(load, TENSOR)


def test_two_cards_of_the_same_files(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    folder = make(tmp_path / "m")
    other = make(tmp_path / "other")
    change(other)
    document = published(cli, other, tmp_path / "other.json", move)
    published(cli, folder, tmp_path / "digests.json", move)
    add(cli, tmp_path, "m", "null", name="plain")
    add(cli, tmp_path, "m", "other.json", name="wrong")
    refused(lambda: load("wrong"), TENSOR, str(document))
    refused(lambda: load("plain"), TENSOR, str(document))
    cli("index", "plain")
    load("plain")
    refused(lambda: load("wrong"), TENSOR, str(document), "`lading index wrong`")
    load("plain")


def test_a_file_that_had_to_be_rewritten(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    state = tensors()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].t().contiguous().t()
    torch.save(state, tmp_path / "m.pt")
    document = published(cli, tmp_path / "m.pt", tmp_path / "digests.json", move)
    assert json.loads(document.read_text())["shards"] == {}
    add(cli, tmp_path, "m.pt", "digests.json")
    load()
    assert lading.verify_model("team", progress=False).good
    state[TENSOR][0] += 1
    torch.save(state, tmp_path / "m.pt")
    refused(load, TENSOR)


# --- documents and files elsewhere -----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    files = {"/m.safetensors": (make(tmp_path / "m") / "model.safetensors").read_bytes()}
    with serve(files, honest) as server:
        yield server


@pytest.mark.parametrize("act", ["load", "pull"])
def test_a_web_server_without_digests(
    cli: Cli, tmp_path: Path, move: Callable[[], None], server: Server, act: str
) -> None:
    document = published(cli, tmp_path / "m", tmp_path / "digests.json", move)
    server.files["/digests.json"] = document.read_bytes()
    where = server.url("/digests.json")
    add(cli, tmp_path, server.url("/m.safetensors"), f"{where}?token=secret")
    cli(act, "team", "--no-progress")
    cli("verify", "team", "--no-progress")
    assert origins(cli) == {where}
    assert len(server.gets("/digests.json?token=secret")) == 1
    assert "secret" not in cli("show", "team", "--json").stdout

    move()
    change(tmp_path / "m")
    server.files["/m.safetensors"] = (tmp_path / "m" / "model.safetensors").read_bytes()
    add(cli, tmp_path, server.url("/m.safetensors"), f"{where}?token=secret")
    wrong = cli(act, "team", "--no-progress", code=4).stderr
    assert TENSOR in wrong
    assert where in wrong
    assert "secret" not in wrong
    refused(load, TENSOR)
    found = cli("verify", "team", "--no-progress", code=4).stderr
    assert f"the digests of {TENSOR} that {where} publishes. `lading verify team --repair`" in found
    assert TENSOR in cli("verify", "team", "--repair", "--no-progress", code=4).stderr


def test_files_of_the_hub(
    cli: Cli, process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, move: Callable[[], None]
) -> None:
    folder = make(tmp_path / "m", shards=2)
    document = published(cli, folder, tmp_path / "digests.json", move)
    shutil.copy(document, folder / "blocks.json")
    lie = json.loads(document.read_text())
    lie["tensors"][TENSOR]["blocks"] = "0" * len(lie["tensors"][TENSOR]["blocks"])
    (folder / "lie.json").write_text(json.dumps(lie))
    with FakeHub() as hub:
        hub.add("some/tiny", folder)
        env = {"LADING_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}

        def run(*words: str, code: int = 0) -> str:
            done = process(*words, env=env)
            assert done.returncode == code, (words, done.stderr)
            return done.stderr

        add(cli, tmp_path, "hg://some/tiny", "hg://some/tiny/blocks.json")
        run("pull", "team", "--no-progress")
        run("load", "team", "--no-progress")
        add(cli, tmp_path, "hg://some/tiny", "hg://some/tiny/lie.json", name="liar")
        run("index", "liar")
        # The hub's own SHA-256 is right; what the card states holds, too.
        assert TENSOR in run("load", "liar", "--no-progress", code=4)
        run("pull", "liar", "--no-progress", code=4)
        run("verify", "liar", "--no-progress", code=4)
        add(cli, tmp_path, "hg://some/tiny", "hg://some/tiny", name="folder")
        assert "expected the address of a file" in run("index", "folder", code=3)
        add(cli, tmp_path, "hg://some/tiny", "hg://some/tiny/none.json", name="gone")
        assert "found nothing there" in run("index", "gone", code=2)


def test_offline(cli: Cli, tmp_path: Path, move: Callable[[], None], server: Server) -> None:
    document = published(cli, tmp_path / "m", tmp_path / "digests.json", move)
    server.files["/digests.json"] = document.read_bytes()
    add(cli, tmp_path, tmp_path / "m", server.url("/digests.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADING_OFFLINE", "1")
        cli("load", "team", "--no-progress", code=5)
    load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADING_OFFLINE", "1")
        load()


# --- the commands ----------------------------------------------------------------------------------------------------


def test_equal_digests_make_equal_documents(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    folder = make(tmp_path / "m", shards=2)
    one = published(cli, folder, tmp_path / "one.json", move).read_bytes()
    two = published(cli, make(tmp_path / "copy", shards=2), tmp_path / "two.json", move).read_bytes()
    assert one == two
    report = lading.write_digests(folder, tmp_path / "three.json", progress=False)
    assert (tmp_path / "three.json").read_bytes() == one
    assert sorted(report.tensors) == sorted(tensors())
    assert lading.read_digests(folder).files == report.files

    add(cli, tmp_path, "m", "one.json")
    load()
    assert cli("digests", "team", "--write", tmp_path / "four.json", "--no-progress").stdout == ""
    assert (tmp_path / "four.json").read_bytes() == one


def test_known_digests_are_not_those_of_changed_files(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    document = tmp_path / "digests.json"
    cli("digests", folder, "--write", document, "--no-progress")
    before = document.read_bytes()
    change(folder)
    assert "does not match its digests" in cli("digests", folder, "--write", document, code=4).stderr
    assert document.read_bytes() == before
    cli("index", folder)
    cli("digests", folder, "--write", document, "--no-progress")
    assert document.read_bytes() != before


def test_documents_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    add(cli, tmp_path, "m", "null")
    add(cli, tmp_path, make(tmp_path / "m"), "null", name="other")
    assert "one NAME" in cli("digests", "team", "other", "--write", tmp_path / "d", code=2).stderr
    assert "No such file" in cli("digests", "team", "--write", tmp_path / "no" / "d", code=2).stderr
    add(cli, tmp_path, "https://example.com/m.safetensors", "null", name="far")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LADING_OFFLINE", "1")
        cli("digests", "far", code=5)


def test_a_document_of_files_that_are_gone(cli: Cli, tmp_path: Path, server: Server) -> None:
    add(cli, tmp_path, server.url("/m.safetensors"), "null")
    load()
    one = lading.read_digests("team")
    cli("rm", "team", "--yes")
    assert lading.read_digests("team").files == one.files


# --- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlay", "code"),
    [
        ("digests: null", 3),
        ("digests: other.json", 3),
        ("base: null\ndigests: null", 3),
        ("license: mit", 0),
        ("checkpoint: changed", 4),
        ("adapter: somewhere", 3),
    ],
)
def test_an_overlay_loosens_nothing_unless_it_is_of_the_user(
    cli: Cli, tmp_path: Path, move: Callable[[], None], overlay: str, code: int
) -> None:
    change(make(tmp_path / "changed"))
    published(cli, make(tmp_path / "m"), tmp_path / "digests.json", move)
    shutil.copy(tmp_path / "digests.json", tmp_path / "other.json")
    add(cli, tmp_path, "m", "digests.json", name="root")
    text = "name: team\nbase: root\nmodel_family: qwen\n---\nname: team@{env}\n{overlay}\n"
    (tmp_path / "lab.yaml").write_text(text.format(env="lab", overlay=overlay))
    cli("import", tmp_path / "lab.yaml")
    cli("load", "team@lab", "--no-progress", code=code)
    cli("load", "team", "--no-progress")

    if overlay == "digests: null":
        (tmp_path / "lab.yaml").write_text(text.format(env="user", overlay=f"{overlay}\ncheckpoint: changed"))
        cli("import", tmp_path / "lab.yaml")
        cli("load", "team", "--no-progress")


def test_an_overlay_in_another_folder(cli: Cli, tmp_path: Path, move: Callable[[], None]) -> None:
    published(cli, make(tmp_path / "m"), tmp_path / "digests.json", move)
    add(cli, tmp_path, "m", "digests.json")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "lab.yaml").write_text("name: team@lab\ndigests: digests.json\n")
    cli("import", tmp_path / "elsewhere" / "lab.yaml")
    cli("load", "team@lab", "--no-progress", code=3)


@pytest.mark.parametrize(
    ("digests", "code", "message"),
    [
        ("hg://a b", 3, "not a valid address"),
        ("ftp://host/digests.json", 2, "ftp://"),
        ("gone.json", 2, "`lading digests NAME --write FILE`"),
        (".", 4, "a regular file"),
        ("huge.json", 4, "at most"),
        ("pointer.json", 4, "git lfs pull"),
    ],
)
def test_what_is_no_document(cli: Cli, tmp_path: Path, digests: str, code: int, message: str) -> None:
    (tmp_path / "huge.json").write_bytes(bytes(1 << 20))
    (tmp_path / "pointer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    add(cli, tmp_path, make(tmp_path / "m"), digests)
    for command in ("load", "index"):
        words = (command, "team", "--no-progress")[: 3 if command == "load" else 2]
        assert message in cli(*words, code=code).stderr


def test_what_is_no_address(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(qwen_card("team", "m", digests="[1]"))
    assert ".digests" in cli("import", tmp_path / "cards.yaml", code=3).stderr
