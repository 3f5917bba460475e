"""LoRA adapters in gangs: each rank merges its part, and all parts together are what PEFT makes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from lading import load_model
from lading.errors import LadingError
from lading.gangs import create_gangs
from tests.distributed.tiny_models import whole
from tests.distributed.workers import Pool
from tests.helpers.make_adapter import factors, train, within_one_ulp, write_adapter

EVERYTHING = {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]}


CONFIG = """\
model_config: {model_dim: 32, max_seq_len: 64, vocab_size: 64, tied_embeddings: false, num_layers: 2,
  num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true,
  ffn_inner_dim: 48}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of all kinds of weights, and cards."""
    folder = tmp_path_factory.mktemp("adapters")
    train(folder, "Qwen3", rank_pattern={"q_proj": 3}, **EVERYTHING)
    write_adapter(folder / "bad", factors("model.layers.0.self_attn.q_proj", 32, 5))
    (folder / "cards.yaml").write_text(
        f"name: hg\nmodel_family: hg\ncheckpoint: {folder}/base\nmodel_config: {{model_type: causal_lm}}\n"
        f"adapter: {folder}/adapter\n---\nname: bad\nbase: hg\nadapter: {folder}/bad\n---\n"
        f"name: qwen\nmodel_family: qwen\ncheckpoint: {folder}/base\nadapter: {folder}/adapter\n{CONFIG}"
    )

    return folder


def use(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ |= {
        "LADING_DATABASE_URL": f"sqlite:///{folder}/c.sqlite",
        "XDG_CONFIG_HOME": str(folder),
        "LADING_OFFLINE": "1",
        "LADING_CARDS": str(folder / "cards.yaml"),
    }


def load_and_compare(folder: Path, name: str, axes: dict[str, int], cooperative: bool) -> list[str]:
    """Return the parameters that differ from those of PEFT."""
    use(folder)
    expected = torch.load(folder / "merged.pt")
    with create_gangs("cpu", **axes) as gangs:
        model = load_model(name, gangs=gangs, dtype=torch.float32, progress=False, cooperative=cooperative)
        found = {key: whole(parameter.detach()) for key, parameter in model.named_parameters()}

    return [key for key, tensor in found.items() if not within_one_ulp(tensor, expected[key])]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "axes", "cooperative"),
    [("hg", {"tp": 2}, False), ("hg", {"sdp": 2}, True), ("qwen", {"tp": 2}, True), ("qwen", {"pp": 2}, False)],
)
def test_two_ranks(pool2: Pool, folder: Path, name: str, axes: dict[str, int], cooperative: bool) -> None:
    assert pool2.values(load_and_compare, folder, name, axes, cooperative) == [[]] * 2


@pytest.mark.parametrize(
    ("name", "axes"),
    [("qwen", {"sdp": 4}), pytest.param("hg", {"tp": 2, "sdp": 2}, marks=pytest.mark.slow)],
)
def test_four_ranks(pool4: Pool, folder: Path, name: str, axes: dict[str, int]) -> None:
    assert pool4.values(load_and_compare, folder, name, axes, False) == [[]] * 4


def load_bad(folder: Path) -> None:
    use(folder)
    with create_gangs("cpu", tp=2) as gangs:
        load_model("bad", gangs=gangs, progress=False)


def test_an_adapter_that_does_not_fit_raises_on_all_ranks(pool2: Pool, folder: Path) -> None:
    for outcome in pool2.run(load_bad, folder):
        assert isinstance(outcome.error, LadingError)
        assert "mis-shaped: model.layers.0.self_attn.q_proj.weight" in str(outcome.error)
