"""What a program adds for its process: families, and the families and stores of its own loaders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

import lading
from lading import (
    AssetCard,
    AssetCardError,
    Family,
    GlobalModelLoader,
    ModelFamilyNotKnownError,
    ModelHubAccessor,
    get_asset_store,
    load_model,
)
from lading.families.qwen import FAMILY
from lading.system import entry_points

Cli = Callable[..., Result]


@dataclass(kw_only=True)
class BigramConfig:
    vocab_size: int = 7


class Bigram(nn.Module):
    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.next = nn.Embedding(config.vocab_size, config.vocab_size)


BIGRAM = Family(
    name="bigram",
    kls=Bigram,
    config_kls=BigramConfig,
    build=Bigram,
    init=lambda model, config, name, parameter: nn.init.ones_(parameter),
)

get_bigram_model_hub = ModelHubAccessor("bigram", Bigram, BigramConfig)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(entry_points, "_HERE", {})


@pytest.fixture
def bigram(cli: Cli, tmp_path: Path) -> Path:
    """A checkpoint with a card, and another card without; the family is not registered."""
    save_file({"next.weight": torch.arange(49.0).view(7, 7)}, tmp_path / "bigram.safetensors")
    path = tmp_path / "bigram.yaml"
    path.write_text(
        "architecture: small\nfamily: bigram\nconfig: {vocab_size: 7}\n---\n"
        "name: counted\nmodel_family: bigram\nmodel_arch: small\ncheckpoint: bigram.safetensors\n---\n"
        "name: asked_for\nmodel_family: bigram\nurl: https://example.com/bigram\n"
    )
    assert "no installed package registers the model family 'bigram'" in cli("import", path).stderr
    return path


# --- families --------------------------------------------------------------------------------------------------------


def test_a_family_of_this_process(bigram: Path, cli: Cli) -> None:
    with pytest.raises(AssetCardError, match="'bigram'"):
        load_model("counted")
    with pytest.raises(ModelFamilyNotKnownError):
        lading.get_model_family_name("counted")

    lading.register_family(BIGRAM)
    lading.register_family(replace(BIGRAM))  # as when a cell of a notebook runs twice
    hub = get_bigram_model_hub()

    assert {card.name for card in hub.iter_cards()} == {"counted", "asked_for"}
    assert hub.get_archs() == {"small"}
    for model in (load_model("counted"), hub.load_model("counted", load_rank0_only=True)):
        assert isinstance(model, Bigram)
        assert model.next.weight.flatten().equal(torch.arange(49.0))
    assert hub.create_new_model(BigramConfig(), init_rank0_only=True).next.weight.eq(1).all()
    assert lading.get_model_family_name("counted") == "bigram"
    assert lading.get_model_family_name(AssetCard("mine", {"model_family": "bigram"})) == "bigram"


def test_the_commands_of_this_process_see_its_families(bigram: Path, cli: Cli, tmp_path: Path) -> None:
    def statuses(*words: str) -> list[str]:
        return cli("list", "--family", "bigram", "--columns", "name,status", *words).stdout.split()[2:]

    assert statuses() == ["asked_for", "unknown-family", "counted", "unknown-family"]
    lading.register_family(BIGRAM)

    assert statuses() == ["asked_for", "gated", "counted", "ready"]
    assert statuses("--status", "ready") == ["counted", "ready"]
    assert statuses("--status", "unknown-family") == []
    assert '"name": "bigram", "registered": true' in cli("families", "--nl").stdout
    bigram.write_text(bigram.read_text() + "license: mit\n")
    assert cli("import", bigram).stderr.startswith("lading: 0 added, 1 changed")
    cli("check", "counted")
    cli("load", "counted")
    (tmp_path / "bigram.safetensors").unlink()
    assert statuses("--status", "broken") == ["counted", "broken"]


def test_a_family_of_a_package_is_not_replaced(catalog: Path) -> None:
    with pytest.raises(ValueError, match=r"'qwen'.*lading\.families\.qwen:FAMILY"):
        lading.register_family(replace(FAMILY))


def test_a_loader_with_families_of_its_own(bigram: Path, tmp_path: Path) -> None:
    loader = GlobalModelLoader(get_asset_store(), {"bigram": BIGRAM})

    assert isinstance(loader.load("counted", None, torch.device("cpu"), torch.bfloat16, None, True, False), Bigram)
    assert isinstance(loader.load("counted", lading.create_fake_gangs("cpu")), Bigram)
    with pytest.raises(AssetCardError, match=r"'qwen'.*The families of this loader: bigram"):
        loader.load("qwen3_0.6b")
    with pytest.raises(AssetCardError, match="'bigram'"):
        GlobalModelLoader(get_asset_store(), {}).load("counted")
    with pytest.raises(ValueError, match="together"):
        loader.load("counted", lading.create_fake_gangs("cpu"), "cpu")  # type: ignore[call-overload]


# --- the current device -----------------------------------------------------------------------------------------------


def test_the_current_device_is_the_one_of_new_tensors() -> None:
    assert lading.get_current_device() == lading.CPU == lading.Device("cpu")
    with torch.device("meta"):
        assert lading.get_current_device() == torch.empty(()).device == torch.device("meta")
    assert lading.DataType is torch.dtype


def test_a_new_model_is_on_the_current_device(bigram: Path) -> None:
    lading.register_family(BIGRAM)
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        load_model("counted")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_without_a_family_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="`family`"):
        error = lading.ModelArchitectureNotKnownError("7b")
    assert (error.arch, error.family) == ("7b", None)
    assert "qwen" in str(lading.ModelArchitectureNotKnownError("7b", "qwen"))
