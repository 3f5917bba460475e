"""The command line, in this process or in one of its own, over a home with a fresh catalog."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.helpers.cached_repository import use_cache
from tests.helpers.fault_world import Place, World, open_world
from tests.helpers.nursery import Nursery

CARDS = """\
name: tiny
model_family: qwen
license: apache-2.0
checkpoint: tiny
model_config:
  model_dim: 32
  max_seq_len: 128
  vocab_size: 100
  tied_embeddings: true
  num_layers: 2
  num_attn_heads: 4
  num_key_value_heads: 2
  head_dim: 8
  qkv_proj_bias: false
  q_norm: true
  k_norm: true
  ffn_inner_dim: 64
---
name: tiny_child
base: tiny
license: mit
model_config: {dropout_p: 0.5, _del_: [ffn_inner_dim]}
---
name: tiny_arch
model_family: qwen
model_arch: qwen3_0.6b
checkpoint: hg://somebody/tiny
---
name: tiny_gated
model_family: qwen
url: https://example.com/ask
---
name: tiny_unknown
model_family: nobody
checkpoint: hg://somebody/other
---
name: tiny_gone
model_family: qwen
checkpoint: gone
---
name: tiny_dangling
base: tiny_missing
---
name: tiny_tokenizer
tokenizer: ./tokenizer.json
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face's libraries, in the place of the user's."""
    return use_cache(tmp_path / "hub", monkeypatch)


@pytest.fixture
def catalog(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a catalog that holds the package's cards."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    return home / "data" / "lading" / "catalog.sqlite"


@pytest.fixture
def cli(catalog: Path) -> Callable[..., Result]:
    """Runs a command line in this process."""
    from lading.cli.app import app

    def run(*words: str | Path, stdin: str | bytes | None = None, code: int | None = 0) -> Result:
        result = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
        assert code is None or result.exit_code == code, f"{words}: {result.exit_code}\n{result.output}"
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def cards(cli: Callable[..., Result], tmp_path: Path) -> Path:
    """A file of cards, imported, beside a checkpoint."""
    from tests.helpers.make_checkpoint import make

    make(tmp_path / "cards" / "tiny")
    path = tmp_path / "cards" / "cards.yaml"
    path.write_text(CARDS)
    cli("import", path)
    return path


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Where command lines in processes of their own come from."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def process(catalog: Path, nursery: Nursery) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line in a process of its own, from the nursery."""

    def run(*words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        ended = nursery.run(words, {**os.environ, **(env or {})})
        return subprocess.CompletedProcess(words, ended.code, ended.out, ended.err)

    return run


@pytest.fixture
def program(catalog: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command line in a new interpreter, with pipes or with what the test gives it."""

    def run(*words: str | Path, **kwargs: object) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **kwargs.pop("env", {})}
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.run(
            [sys.executable, "-m", "lading", *map(str, words)],
            **{"text": True, "check": False, "env": env, "timeout": 60, **defaults, **kwargs},
        )

    return run


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[World]:
    with open_world(tmp_path_factory.mktemp("world"), nursery) as world:
        yield world


@pytest.fixture
def place(world: World, tmp_path: Path) -> Iterator[Place]:
    """A folder with a catalog of the world's cards, and with empty caches."""
    shutil.copy(world.template, tmp_path / "catalog.sqlite")
    yield Place(tmp_path, world)
    world.behave()
