"""Checkpoints under names that say nothing, or something else: adopted, of cards, and over http."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save as save_safetensors

import lading
from tests.helpers.cached_repository import add_cards
from tests.helpers.make_checkpoint import tensors
from tests.helpers.torch_files import save
from tests.servers.hostile import serve
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]

CONTENTS = {
    "model.pth.tar": save(tensors()),
    "model.th": save(tensors(), legacy=True),
    "MODEL.PTH": save({"model": tensors()}),
    "12345": save(tensors()),
    "old": save(tensors(), legacy=True),
    "plain": save_safetensors(tensors()),
    "model.bin": save_safetensors(tensors()),
    "strided.t7": save({n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors().items()}),
    "strided": save({n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors().items()}),
}


@pytest.fixture(autouse=True)
def _settings(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "lading-cache"))


def loads(name: str) -> None:
    model = lading.load_model(name, device="cpu", dtype="auto", progress=False)
    assert all(torch.equal(p.detach(), tensors()[n]) for n, p in model.named_parameters())


def test_adopt(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    for name, data in CONTENTS.items():
        (models / name).write_bytes(data)
    for name in ("README", "LICENSE", "refs", "notes.txt", "empty"):
        (models / name).write_text("no weights" if name != "empty" else "")
    (models / "link").symlink_to("12345")

    found = {each.path.name: each for each in lading.adopt_checkpoints(models, progress=False)}

    assert found.keys() == CONTENTS.keys()
    status = {name: each.status for name, each in found.items() if "strided" not in name}
    assert set(status.values()) == {"adopted"}, found
    for name in ("strided", "strided.t7"):
        assert "not contiguous" in str(found[name].problem)


@pytest.mark.few(3)
@pytest.mark.parametrize("name", CONTENTS)
def test_a_card_on_this_machine(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    add_cards(tmp_path, mine=str(tmp_path / name))
    loads("mine")
    loads("mine")


@pytest.mark.few(3)
@pytest.mark.parametrize("digests", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_card_over_http(cli: Cli, tmp_path: Path, name: str, digests: bool) -> None:
    path = f"/m/{name}"
    with serve({path: CONTENTS[name]}, digests=digests) as server:
        add_cards(tmp_path, web=server.url(path))
        if digests:
            cli("index", "web")
        cli("pull", "web", "--no-progress")
        loads("web")
        assert {row["result"] for row in json.loads(cli("verify", "web", "--no-progress", "--json").stdout)} <= {
            "match", "recorded",
        }  # fmt: skip
        # What is gone from this machine is fetched and found the same.
        cli("rm", "web")
        loads("web")


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "inner",
    ["12345", "strided", *(pytest.param(n, marks=pytest.mark.slow) for n in ("model.pth.tar", "runs/old", "plain"))],
)
def test_a_file_in_a_repository_of_the_hub(
    process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, inner: str
) -> None:
    folder = tmp_path / "repository" / inner
    folder.parent.mkdir(parents=True)
    folder.write_bytes(CONTENTS[folder.name])
    (tmp_path / "repository" / "README.md").write_text("weights")
    with FakeHub() as hub:
        hub.add("somebody/tiny", tmp_path / "repository")
        env = {"LADING_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        add_cards(tmp_path, hub=f"hg://somebody/tiny\ncheckpoint_path: '{inner}'")
        for words in (("index", "hub"), ("pull", "hub"), ("load", "hub", "--dtype", "auto"), ("verify", "hub")):
            done = process(*words, env=env)
            assert done.returncode == 0, done.stderr
        assert "match" in done.stdout
