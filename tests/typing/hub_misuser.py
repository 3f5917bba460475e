"""Mistakes in a program over the hubs, which fairseq2's types find: mypy and pyright must refuse these lines.

With ``warn_unused_ignores`` and ``reportUnnecessaryTypeIgnoreComment``, a mistake that they do not find is an error.
"""

from __future__ import annotations

from pathlib import Path

from lading import CPU, AssetCard, Gangs, GlobalModelLoader, ModelHub, ModelHubAccessor, get_asset_store, load_model
from lading.families.llama import LLaMAConfig
from lading.families.qwen import QwenConfig, get_qwen_model_hub


class MyHub(ModelHub):  # type: ignore[misc, type-arg]
    """A subclass of a final class."""


class MyAccessor(ModelHubAccessor):  # type: ignore[misc, type-arg]
    """Another one."""


def two_places(path: Path, config: QwenConfig, gangs: Gangs) -> None:
    """Give both gangs and a device."""
    hub = get_qwen_model_hub()
    load_model("qwen3_0.6b", gangs=gangs, device=CPU)  # type: ignore[call-overload]
    hub.load_model("qwen3_0.6b", gangs=gangs, device=CPU)  # type: ignore[call-overload]
    hub.create_new_model(config, gangs=gangs, device=CPU)  # type: ignore[call-overload]
    hub.load_custom_model(path, config, gangs=gangs, device=CPU)  # type: ignore[call-overload]
    GlobalModelLoader(get_asset_store()).load("qwen3_0.6b", gangs, CPU)  # type: ignore[call-overload]


def other_types(path: Path, card: AssetCard, other: LLaMAConfig) -> None:
    """Give values of other types."""
    hub = get_qwen_model_hub()
    hub.create_new_model(other)  # type: ignore[call-overload]
    hub.load_model(card, config=other)  # type: ignore[call-overload]
    hub.iter_checkpoint(path, other)  # type: ignore[arg-type]
    load_model(card, gangs="tp")  # type: ignore[call-overload]


def other_results(card: AssetCard) -> LLaMAConfig:
    """Take results for what they are not."""
    layers: str = card.field("num_layers").as_(int)  # type: ignore[assignment]
    return get_qwen_model_hub().get_model_config(layers)  # type: ignore[return-value]
