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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter of all kinds of weights, and cards."""
    folder = tmp_path_factory.mktemp("adapters")
    train(folder, "Qwen3", rank_pattern={"q_proj": 3}, **EVERYTHING)
    write_adapter(folder / "bad", factors("model.layers.0.self_attn.q_proj", 32, 5))
    (folder / "cards.yaml").write_text(
        f"name: base\nmodel_family: hg\ncheckpoint: {folder}/base\nmodel_config: {{model_type: causal_lm}}\n---\n"
        f"name: tuned\nbase: base\nadapter: {folder}/adapter\n---\nname: bad\nbase: base\nadapter: {folder}/bad\n"
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


def load_and_compare(folder: Path, tp: int, sdp: int, cooperative: bool) -> list[str]:
    """Return the parameters that differ from those of PEFT."""
    use(folder)
    expected = torch.load(folder / "merged.pt")
    with create_gangs("cpu", tp=tp, sdp=sdp) as gangs:
        model = load_model("tuned", gangs=gangs, dtype=torch.float32, progress=False, cooperative=cooperative)
        found = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()}

    return [name for name, tensor in found.items() if not within_one_ulp(tensor, expected[name])]


@pytest.mark.parametrize(("tp", "sdp", "cooperative"), [(2, 1, False), (1, 2, True)])
def test_two_ranks(pool2: Pool, folder: Path, tp: int, sdp: int, cooperative: bool) -> None:
    assert pool2.values(load_and_compare, folder, tp, sdp, cooperative) == [[]] * 2


@pytest.mark.parametrize(("tp", "sdp"), [(1, 4), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_four_ranks(pool4: Pool, folder: Path, tp: int, sdp: int) -> None:
    assert pool4.values(load_and_compare, folder, tp, sdp, False) == [[]] * 4


def load_bad(folder: Path) -> None:
    use(folder)
    with create_gangs("cpu", tp=2) as gangs:
        load_model("bad", gangs=gangs, progress=False)


def test_an_adapter_that_does_not_fit_raises_on_all_ranks(pool2: Pool, folder: Path) -> None:
    for outcome in pool2.run(load_bad, folder):
        assert isinstance(outcome.error, LadingError)
        assert "mis-shaped: model.layers.0.self_attn.q_proj.weight" in str(outcome.error)
