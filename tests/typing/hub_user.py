"""A program over the hubs, as fairseq2's users write them. mypy and pyright accept every line of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Module

from lading import (
    CPU,
    AssetCard,
    DataType,
    Device,
    Gangs,
    GlobalModelLoader,
    ModelHub,
    ModelHubAccessor,
    get_asset_store,
    get_current_device,
    get_model_family_name,
    load_model,
)
from lading.families.qwen import QwenConfig, get_qwen_model_hub


class MyConfig:
    """The configuration of a family of one's own."""


class MyModel(Module):
    """Its model."""


get_my_model_hub = ModelHubAccessor(family_name="my", kls=MyModel, config_kls=MyConfig)


def somewhere(card: AssetCard | str, gangs: Gangs | None, dtype: DataType | None) -> Module:
    """Load a model onto gangs, if there are some."""
    return load_model(card, gangs=gangs, dtype=dtype, mmap=True, progress=False)


def on_a_device(card: AssetCard | str, device: Device | None = None) -> tuple[Module, Module]:
    """Load a model twice."""
    here = load_model(card, device=device or get_current_device(), dtype="bfloat16", load_rank0_only=True)

    return here, load_model(card, device="cpu")


def of_any_family(card: AssetCard, gangs: Gangs) -> list[Module]:
    """Load by the global loader, whose parameters are positional."""
    loader = GlobalModelLoader(get_asset_store(), families=None)
    by_gangs = loader.load(card, gangs, None, torch.float16, None, False, True)

    return [by_gangs, loader.load(card, None, CPU, None, None, False, False), loader.load(card, gangs=gangs)]


def typed(path: Path, gangs: Gangs) -> Iterator[tuple[str, Tensor]]:
    """Use each call of a typed hub."""
    hub: ModelHub[MyModel, MyConfig] = get_my_model_hub()
    config: MyConfig = hub.get_arch_config("base")
    models: list[MyModel] = [
        hub.create_new_model(config, gangs=gangs, init_rank0_only=True),
        hub.create_new_model(config, device=CPU, meta=True),
        hub.load_model("mine", config=config, device="cpu"),
        hub.load_model(path, gangs=gangs, verify="always"),
        hub.load_custom_model(path, config, gangs=gangs, restrict=True),
        hub.load_custom_model(path, config, device=CPU, mmap=True),
    ]
    maybe: MyConfig | None = hub.maybe_get_arch_config("large")

    return hub.iter_checkpoint(path, maybe or config, gangs=gangs, mmap=len(models) > 1)


def layers(card: AssetCard) -> int:
    """Return the number of layers of a model of a known family."""
    config: QwenConfig = get_qwen_model_hub().get_model_config(card)

    return config.num_layers if get_model_family_name(card) == "qwen" else card.field("layers").as_(int)
