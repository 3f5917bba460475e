"""Questions, files and the catalog need no torch; commands that do say so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.make_checkpoint import make, tensors
from tests.servers.hostile import serve

ABSENT = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
"""Keeps Python from finding torch, as in an environment without it."""

RUN = """
import json, sys
from click.testing import CliRunner
from lading.cli.app import app

done = []
for words in json.load(sys.stdin):
    result = CliRunner().invoke(app, words)
    done.append([result.exit_code, result.stdout, result.stderr, "torch" in sys.modules])
print(json.dumps(done))
"""

CARDS = """\
name: far
model_family: qwen
model_arch: small
checkpoint: {uri}
---
name: by_transformers
model_family: hg
model_arch: causal_lm
checkpoint: {tiny}
---
architecture: small
family: qwen
config: {{model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2, num_attn_heads: 4,
  num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true, ffn_inner_dim: 64}}
"""


class Answer:
    """What a command line printed."""

    def __init__(self, code: int, out: str, err: str, torch: bool) -> None:
        self.code, self.out, self.err, self.torch = code, out, err, torch


@pytest.fixture
def answers(cards: Path) -> Callable[..., list[Answer]]:
    """Runs command lines in a new interpreter, by default in one that has no torch."""

    def run(lines: Sequence[Sequence[str | Path]], prelude: str = ABSENT) -> list[Answer]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", prelude + RUN],
            input=json.dumps([[str(word) for word in line] for line in lines]),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [Answer(*answer) for answer in json.loads(done.stdout)]

    return run


def served(folder: Path) -> Mapping[str, bytes]:
    return {f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.mark.few(1)
@pytest.mark.parametrize("prelude", [ABSENT, ""], ids=["absent", "present"])
def test_commands_that_need_no_torch(
    answers: Callable[..., list[Answer]], cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prelude: str
) -> None:
    """They work without it, and where it is installed they do not import it."""
    monkeypatch.setenv("LADING_OFFLINE", "0")
    monkeypatch.setenv("LADING_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    tiny, more = cards.parent / "tiny", tmp_path / "more"
    make(more / "sharded", shards=2)
    torch.save(tensors(), more / "one.pt")
    with serve(served(make(tmp_path / "m")), digests=True) as server:
        other = make(tmp_path / "other")
        (tmp_path / "far.yaml").write_text(CARDS.format(tiny=other, uri=server.url("/m/model.safetensors")))
        done = answers(
            [
                ["import", tmp_path / "far.yaml"],
                ["list", "--all", "--json"],
                ["show", "tiny"],
                ["show", "qwen3_0.6b"],
                ["show", "all-minilm-l6-v2"],
                ["sql", "select count(*) from models"],
                ["path", "tiny"],
                ["families"],
                ["archs", "qwen"],
                ["env"],
                ["index", "tiny"],
                ["index", more / "one.pt"],
                ["adopt", more],
                ["add", more / "sharded"],
                ["rename", "sharded", "mine"],
                ["relocate", more, more],
                ["remove-card", "mine"],
                ["check", "tiny"],
                ["check", tiny],
                ["verify", "tiny"],
                ["digests", "tiny", "--write", more / "digests.json"],
                ["verify", more / "sharded"],
                ["diff", "tiny", more / "one.pt"],
                ["diff", "qwen/qwen3_0.6b", "qwen/qwen3_1.7b"],
                ["pull", "far", "--no-progress"],
                ["check", "far"],
                ["add", more, "--name-from", "{parent}_{folder}"],
                ["list", "--local", "-q"],
                ["verify", "far"],
                ["du"],
                ["rm", "far"],
                ["export-cards", "far"],
                ["rename", "far", "farther"],
                ["remove-card", "farther"],
                ["db", "check"],
                ["db", "backup", tmp_path / "backup.sqlite"],
            ],
            prelude,
        )
    assert [answer.err for answer in done if answer.code] == []
    assert [i for i, answer in enumerate(done) if answer.torch] == []
    by_first = {answer.out.splitlines()[0] for answer in done if answer.out}
    assert {str(tiny), "ok"} <= by_first


def test_commands_that_need_it_say_so(answers: Callable[..., list[Answer]], cards: Path, tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(
        CARDS.format(tiny=cards.parent / "tiny", uri="https://example.com/m.safetensors")
    )
    make(tmp_path / "other")
    lines = [
        ["load", "tiny"],
        ["plan", "tiny"],
        ["export", "tiny", tmp_path / "out"],
        ["convert", cards.parent / "tiny", tmp_path / "out"],
        ["diff", "tiny", tmp_path / "other", "--values"],
        ["check", "by_transformers"],
    ]
    imported, *done = answers([["import", tmp_path / "far.yaml"], *lines])
    assert imported.code == 0
    for line, answer in zip(lines, done, strict=True):
        assert (answer.code, answer.out) == (8, ""), (line, answer.err)
        assert answer.err.startswith("lading: error: "), line
        assert answer.err.endswith("needs torch, which is not installed. Run `pip install torch`.\n"), line
        assert answer.err.count("\n") == 1, line


def test_python_without_torch(cards: Path) -> None:
    script = f"""{ABSENT}
import lading
from lading.families.qwen import FAMILY, QwenConfig, get_qwen_model_hub

assert lading.check_model("tiny").fits
assert QwenConfig().num_layers == 28
for use in (lambda: lading.load_model, get_qwen_model_hub, lambda: FAMILY.model_kls, lambda: lading.create_gangs):
    try:
        use()
    except lading.errors.TorchNotFoundError as error:
        print(error)
    except ImportError as error:
        print("raw", error)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert "raw" not in done.stdout
    assert "lading.load_model needs torch, which is not installed. Run `pip install torch`.\n" in done.stdout
