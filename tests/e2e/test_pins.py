"""Files that a card pins by their SHA-256: checked when they are fetched, and when they are loaded."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import lading
from lading import DigestMismatchError
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.servers.hostile import honest, serve
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]

WRONG = "0" * 64


@pytest.fixture(autouse=True)
def _online(catalog: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add(cli: Cli, tmp_path: Path, uri: object, digests: object, name: str = "pinned") -> None:
    (tmp_path / "cards.yaml").write_text(qwen_card(name, uri, sha256=json.dumps(digests)))
    cli("import", tmp_path / "cards.yaml")


def load(name: str = "pinned", **options: object) -> float:
    model = lading.load_model(name, dtype=torch.float32, progress=False, **options)  # type: ignore[arg-type]
    return float(model.state_dict()["model.norm.weight"][0])


def change(folder: Path) -> None:
    """Give every tensor other values, and leave names, shapes and sizes as they are."""
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.few(2)
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_on_this_machine(cli: Cli, tmp_path: Path, shards: int, mmap: bool) -> None:
    folder = make(tmp_path / "m", shards=shards)
    files = sorted(folder.glob("*.safetensors"))
    good = {file.name: sha256(file) for file in files}
    add(cli, tmp_path, folder, good if shards > 1 else sha256(files[0]).upper())
    before = load(mmap=mmap)
    assert load(mmap=mmap) == before
    cli("verify", "pinned", "--no-progress")

    add(cli, tmp_path, folder, {files[-1].name: WRONG})
    for act in (load, lambda: lading.pull_model("pinned", progress=False)):
        with pytest.raises(DigestMismatchError) as error:
            act()
        assert error.value.expected == WRONG
    assert WRONG in cli("load", "pinned", "--no-progress", code=4).stderr
    cli("verify", "pinned", "--no-progress", code=4)


def test_a_digest_that_is_stated_after_the_first_load(cli: Cli, tmp_path: Path) -> None:
    """What was recorded of the tensors is of the bytes that were there, not of those that are pinned."""
    folder = make(tmp_path / "m")
    right = sha256(folder / "model.safetensors")
    add(cli, tmp_path, folder, None)
    change(folder)
    load()
    add(cli, tmp_path, folder, right)
    with pytest.raises(DigestMismatchError):
        load()
    with pytest.raises(DigestMismatchError):
        load(mmap=True)


def test_a_file_that_is_replaced_after_the_first_load(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    add(cli, tmp_path, folder, sha256(folder / "model.safetensors"))
    load()
    change(folder)
    with pytest.raises(DigestMismatchError):
        load()
    cli("index", "pinned")
    with pytest.raises(DigestMismatchError):
        load()


@pytest.mark.few(1)
@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_files_of_a_web_server(cli: Cli, tmp_path: Path, file: str) -> None:
    folder = make(tmp_path / "m")
    torch.save(tensors(), folder / "model.pt")
    with serve({f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}, honest) as server:
        add(cli, tmp_path, server.url(f"/m/{file}"), WRONG)
        cli("pull", "pinned", "--no-progress", code=4)
        cli("load", "pinned", "--no-progress", code=4)

        add(cli, tmp_path, server.url(f"/m/{file}"), sha256(folder / file))
        cli("pull", "pinned", "--no-progress")
        load()

    # Another card of the same weights, which are here by now.
    add(cli, tmp_path, server.url(f"/m/{file}"), WRONG)
    cli("load", "pinned", "--no-progress", code=4)


def test_a_digest_other_than_the_published_one(
    cli: Cli, process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    with FakeHub() as hub:
        folder = make(tmp_path / "m", shards=2)
        hub.add("some/tiny", folder)
        env = {"LADING_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        file = folder / "model-00002-of-00002.safetensors"
        add(cli, tmp_path, "hg://some/tiny", {file.name: WRONG})
        refused = process("pull", "pinned", "--no-progress", env=env)
        assert refused.returncode == 4, refused.stderr
        assert sha256(file) in refused.stderr
        assert process("path", "pinned", env=env).returncode != 0
        add(cli, tmp_path, "hg://some/tiny", {file.name: sha256(file)})
        for words in (("pull", "pinned", "--no-progress"), ("load", "pinned", "--no-progress")):
            done = process(*words, env=env)
            assert done.returncode == 0, done.stderr


def test_a_file_that_had_to_be_rewritten(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    state = tensors()
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].t().contiguous().t()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    add(cli, tmp_path, folder, sha256(folder / "pytorch_model.bin"))
    load()
    assert lading.verify_model("pinned", progress=False).good
    add(cli, tmp_path, folder, {"pytorch_model.bin": WRONG})
    cli("load", "pinned", "--no-progress", code=4)
    add(cli, tmp_path, folder, {"config.json": sha256(folder / "config.json")})
    cli("load", "pinned", "--no-progress", code=3)  # the weights are not in it


def strided(path: Path, *, plus: float = 0) -> Path:
    """Write weights that have to be rewritten before they can be read."""
    state = {name: tensor + plus for name, tensor in tensors().items()}
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"].t().contiguous().t()
    torch.save(state, path)
    return path


def hashed(method: str) -> int:
    """How many digests of whole files were taken."""
    ((count,),) = lading.query(f"SELECT count(*) FROM verifications WHERE method = '{method}'").rows
    return int(str(count))


def test_the_original_of_a_rewritten_file_is_hashed_once(cli: Cli, tmp_path: Path) -> None:
    file = strided(tmp_path / "m.pt")
    right = sha256(file)
    add(cli, tmp_path, file, right)
    for _ in range(3):
        load()
    cli("verify", "pinned", "--no-progress")
    assert hashed("original") == 1
    os.utime(file)
    load()
    load()
    assert hashed("original") == 2

    add(cli, tmp_path, file, WRONG)
    cli("load", "pinned", "--no-progress", code=4)
    add(cli, tmp_path, file, right)
    strided(file, plus=1)
    with pytest.raises(DigestMismatchError):
        load()


def test_a_good_file_beside_a_bad_one_does_not_make_it_good(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    add(cli, tmp_path, folder, sha256(strided(folder / "pytorch_model.bin")))
    load()
    (folder / "pytorch_model.bin").rename(folder / "kept.bin")
    strided(folder / "pytorch_model.bin", plus=1)
    with pytest.raises(DigestMismatchError):
        load()


@pytest.mark.parametrize("name", ["", "m.pt"])
def test_the_original_of_a_fetched_file_is_hashed_once(cli: Cli, tmp_path: Path, name: str) -> None:
    file = strided(tmp_path / "m.pt")
    right = sha256(file)
    with serve({"/m.pt": file.read_bytes()}, honest) as server:
        add(cli, tmp_path, server.url("/m.pt"), {name: right} if name else right)
        cli("pull", "pinned", "--no-progress")
        for _ in range(3):
            load()
        assert (hashed("sha256"), hashed("original")) == (1, 1)

        add(cli, tmp_path, server.url("/m.pt"), WRONG)
        cli("load", "pinned", "--no-progress", code=4)
        # The file that was right is still here when another one takes its place.
        add(cli, tmp_path, server.url("/m.pt"), right)
        server.files["/m.pt"] = strided(file, plus=1).read_bytes()
        cli("pull", "pinned", "--no-progress", code=4)
        cli("load", "pinned", "--no-progress", code=4)


@pytest.mark.parametrize(("shards", "digests"), [(2, WRONG), (1, {"model.bin": WRONG}), (2, {"config.json": WRONG})])
def test_what_is_no_file_of_the_checkpoint(cli: Cli, tmp_path: Path, shards: int, digests: object) -> None:
    add(cli, tmp_path, make(tmp_path / "m", shards=shards), digests)
    cli("load", "pinned", "--no-progress", code=3)


@pytest.mark.parametrize("digests", ["abc", 5, ["0" * 64], {"a": "0"}, {"a": None}])
def test_what_is_no_digest(cli: Cli, tmp_path: Path, digests: object) -> None:
    (tmp_path / "cards.yaml").write_text(qwen_card("pinned", "x", sha256=json.dumps(digests)))
    assert ".sha256" in cli("import", tmp_path / "cards.yaml", code=3).stderr
    (tmp_path / "slip.yaml").write_text(f"name: slip\nsha_256: {WRONG}\n")
    assert "Did you mean 'sha256'?" in cli("import", tmp_path / "slip.yaml").stderr


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("overlay", "code"),
    [
        ("sha256: null", 3),
        (f"sha256: '{WRONG}'", 3),
        ("sha256: {}", 3),
        ("base: null\nsha256: null", 3),
        ("license: mit", 0),
        ("checkpoint: changed", 4),
    ],
)
def test_an_overlay_loosens_nothing_unless_it_is_of_the_user(cli: Cli, tmp_path: Path, overlay: str, code: int) -> None:
    folder = make(tmp_path / "m")
    change(make(tmp_path / "changed"))
    add(cli, tmp_path, folder, sha256(folder / "model.safetensors"), name="root")
    text = "name: pinned\nbase: root\nmodel_family: qwen\n---\nname: pinned@{env}\n{overlay}\n"
    (tmp_path / "lab.yaml").write_text(text.format(env="lab", overlay=overlay))
    cli("import", tmp_path / "lab.yaml")
    cli("load", "pinned@lab", "--no-progress", code=code)
    cli("load", "pinned", "--no-progress")

    if "sha256: null" in overlay and "base" not in overlay:
        (tmp_path / "lab.yaml").write_text(text.format(env="user", overlay=f"{overlay}\ncheckpoint: changed"))
        cli("import", tmp_path / "lab.yaml")
        cli("load", "pinned", "--no-progress")


def test_a_hint_names_the_environment(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(
        qwen_card("far", "http://127.0.0.1:9/m.safetensors", sha256="null")
        + "---\nname: far@lab\ncheckpoint: http://127.0.0.1:9/lab/m.safetensors\n"
    )
    cli("import", tmp_path / "cards.yaml")
    assert "`lading pull far@lab`" in cli("path", "far@lab", code=2).stderr
    assert "`lading pull far`" in cli("path", "far", code=2).stderr
