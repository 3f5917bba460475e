"""The example under torchrun; and two hosts, each of which fetches once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import whole
from workers import Pool

from lading.gangs import create_gangs, world
from lading.hub import load_model
from make_checkpoint import make
from servers.hostile import serve

ROOT = Path(__file__).parents[2]


def test_the_example(tmp_path: Path) -> None:
    folder = make(tmp_path / "tiny", shards=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/many_devices.py", str(folder), "--tp", "2"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("rank 0 (sdp 0, tp 0): ")
    assert second.startswith("rank 1 (sdp 0, tp 1): ")
    assert first.partition("next token")[2] == second.partition("next token")[2] != ""


CARD = """\
name: far
model_family: qwen
checkpoint: {uri}
model_config: {{model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2,
  num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true,
  ffn_inner_dim: 64}}
"""


def move_to(host: str, home: str) -> None:
    """Have this process be on another host, with a disk of its own."""
    folder = Path(home) / host
    os.environ |= {"LADING_CACHE_DIR": str(folder / "cache"), "LADING_DATABASE_URL": f"sqlite:///{folder}/c.sqlite"}
    os.environ |= {"LADING_CARDS": str(Path(home) / "far.yaml"), "XDG_CONFIG_HOME": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"LADING_OFFLINE": "", "NO_PROXY": "127.0.0.1"}
    world._host = lambda: host


def load_on(host: str, home: str) -> tuple[str, dict[str, torch.Tensor], int]:
    move_to(host, home)
    with create_gangs("cpu", tp=2, sdp=2) as gangs:
        model = load_model("far", gangs=gangs, dtype="auto", progress=False)
        return host, {name: whole(p).detach().clone() for name, p in model.named_parameters()}, gangs.root.local_size


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(4) as pool:  # one of its own: its processes change hosts
        yield pool


def test_each_of_two_hosts_fetches_once(pool: Pool, tmp_path: Path) -> None:
    file = make(tmp_path / "origin") / "model.safetensors"
    with serve({"/model.safetensors": file.read_bytes()}, digests=True) as server:
        (tmp_path / "far.yaml").write_text(CARD.format(uri=server.url("/model.safetensors")))
        found = pool.values(load_on, str(tmp_path), each=["a", "a", "b", "b"])
        asked = [headers.get("range") for method, _, headers in server.requests if method == "GET"]

    # Rank 0 has read the header, and one rank of each host has fetched the file.
    assert len(asked) == 3
    assert asked.count(None) == 2
    assert [(host, neighbours) for host, _, neighbours in found] == [("a", 2), ("a", 2), ("b", 2), ("b", 2)]
    expected = load_file(file)
    for _, tensors, _ in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert len(tensors) == len(expected)
    for host in "ab":
        (kept,) = (tmp_path / host / "cache").rglob("*.safetensors")
        assert kept.read_bytes() == file.read_bytes()
