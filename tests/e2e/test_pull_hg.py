"""A card of the family hg: what it does not state comes from the config.json of its repository, offline too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from servers.hub import FakeHub

Run = Callable[..., subprocess.CompletedProcess[str]]

CARD = """\
name: far
model_family: hg
model_arch: causal_lm
model_config: {trust_remote_code: true}
checkpoint: hg://some/tiny
"""


def test_pulled_once_and_loaded_offline(process: Run, tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "repository")
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
