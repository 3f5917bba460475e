"""The README's tour, as it stands, in an empty home."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.nursery import Nursery

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def write_checkpoint(folder: Path) -> None:
    """A Qwen3-0.6B whose weights are a hole in the file: right in everything but its values, and no space on disk."""
    from lading.families.qwen import get_qwen_model_hub
    from lading.models.construct import build_on_meta
    from lading.models.family import get_family

    config = get_qwen_model_hub().get_arch_config("qwen3_0.6b")
    module = build_on_meta(get_family("qwen"), config)
    header: dict[str, object] = {}
    end = 0
    for name, parameter in module.named_parameters():
        begin, end = end, end + parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                "max_position_embeddings": 40960, "tie_word_embeddings": True, "rope_theta": 1000000,
                "rms_norm_eps": 1e-6, "hidden_act": "silu",
            }
        )
    )  # fmt: skip


@pytest.fixture
def tour(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tour"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write_checkpoint(folder / "Qwen3-0.6B")
    yaml = blocks("yaml")
    (folder / "cards.yaml").write_text(yaml[0])
    (folder / "architecture.yaml").write_text(yaml[1])
    return folder


def test_the_tour(tour: Path, nursery: Nursery) -> None:
    def run(command: str) -> str:
        words = shlex.split(command)
        assert words[0] == "lading"
        done = nursery.run(words[1:], os.environ)
        assert done.code == 0, f"{command}\n{done.err}"
        return done.out

    output = {}
    for block in blocks("console"):
        for line in block.splitlines():
            command = line.removeprefix("$ ").partition("  #")[0]
            output[command] = run(command)

    assert "qwen3_0.6b" in output["lading list 'qwen3_*' --limit 3"]
    assert output["lading path qwen3_0.6b"].strip() == str(tour / "Qwen3-0.6B")
    rows = json.loads(next(text for command, text in output.items() if command.endswith("--json")))
    assert len(rows) == 3

    run("lading import architecture.yaml")
    assert "qwen3_tiny" in run("lading archs qwen -q").split()

    for code in blocks("python"):
        done = nursery.run(["-c", code], os.environ)
        assert done.code == 0, f"{code}\n{done.err}"
