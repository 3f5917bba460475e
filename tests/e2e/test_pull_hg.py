"""A card of the family hg: what it does not state comes from the config.json of its repository, offline too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lading
from tests.servers.hostile import serve
from tests.servers.hub import FakeHub

Run = Callable[..., subprocess.CompletedProcess[str]]

CARD = """\
name: far
model_family: hg
model_arch: causal_lm
model_config: {trust_remote_code: true}
checkpoint: hg://some/tiny
"""


def save_repository(folder: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def test_pulled_once_and_loaded_offline(process: Run, tmp_path: Path) -> None:
    save_repository(tmp_path / "repository")
    path = tmp_path / "cards.yaml"
    path.write_text(CARD)

    with FakeHub() as hub:
        hub.add("Some/Tiny", tmp_path / "repository")
        env = {
            "LADING_OFFLINE": "",
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

        def run(*words: str | Path, **more: str) -> str:
            done = process(*words, env=env | more)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        run("import", path)
        pulled = {Path(file["name"]).name: file for file in json.loads(run("pull", "far", "--json"))}
        assert pulled["config.json"]["path"] is not None

        asked = len(hub.requests)
        report = json.loads(run("load", "far", "--json", "--no-progress", LADING_OFFLINE="1"))
        assert len(hub.requests) == asked

    assert report["model_class"] == "GPT2LMHeadModel"
    assert report["tensors"] == 16  # the head is the embedding table


@pytest.mark.slow
def test_from_a_web_server(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_repository(tmp_path / "repository")
    files = {f"/tiny/{path.name}": path.read_bytes() for path in (tmp_path / "repository").iterdir()}
    with serve(files) as server:
        card = CARD.replace("hg://some/tiny", server.url("/tiny/model.safetensors"))
        (tmp_path / "cards.yaml").write_text(card)
        lading.import_cards(tmp_path / "cards.yaml")
        monkeypatch.setenv("LADING_OFFLINE", "")
        assert lading.check_model("far").fits
        lading.pull_model("far", progress=False)
    monkeypatch.setenv("LADING_OFFLINE", "1")
    model = lading.load_model("far", progress=False)

    assert type(model).__name__ == "GPT2LMHeadModel"
