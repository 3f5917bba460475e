"""Sizes of no model: an error of lading's own, before torch is asked for memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from lading.cards.overrides import merge
from lading.errors import AssetCardError, ModelCheckpointMismatchError, ModelConfigError, NotSupportedError
from lading.families.nn.checks import MAX_SIZE, require_size
from lading.models.construct import build_on_meta
from lading.models.family import get_family
from tests.helpers.configs import structured
from tests.helpers.native_families import NATIVE
from tests.helpers.parity_tools import family_of

MODEL_TYPES = [
    "llama",
    "llama4_text",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "gemma3_text",
    "deepseek_v3",
    "gemma3n_text",
    "bert",
    "m2m_100",
    "speech_to_text",
]
HUGE = [MAX_SIZE, 2**62, 10**400, 1e308]
SCALINGS = {
    "llama": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "olmo3": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32},
    "gemma3_text": {"rope_type": "linear", "factor": 2.0},
}


def numbers(config: Any) -> Iterator[tuple[str, ...]]:
    """Where the numbers of a configuration are."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from ((field.name, *rest) for rest in numbers(value))
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield (field.name,)


@pytest.mark.parametrize("huge", HUGE, ids=lambda value: f"{len(str(value))} digits")
@pytest.mark.parametrize("name", NATIVE)
def test_a_huge_number_in_a_configuration(name: str, huge: Any) -> None:
    family = get_family(name)
    nested = hasattr(family.config_kls(), "encoder_config")
    small: Any = {"encoder_config": {"num_encoder_layers": 1}} if nested else {"num_layers": 1}
    if name == "w2vbert":
        small = {"w2v2_config": {"encoder_config": {"num_encoder_layers": 2}}, "num_bert_encoder_layers": 1}
    for place in numbers(family.config_kls()):
        overrides: Any = huge
        for step in reversed(place):
            overrides = {step: overrides}
        if place[-1] not in ("num_layers", "num_encoder_layers"):
            overrides = merge(small, overrides, path="")
        try:
            build_on_meta(family, structured(family.config_kls, overrides))
        except (AssetCardError, NotSupportedError):
            continue


@pytest.mark.few(10)
@pytest.mark.parametrize("huge", HUGE, ids=lambda value: f"{len(str(value))} digits")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_huge_number_in_a_config_json(model_type: str, huge: Any) -> None:
    from transformers import AutoConfig

    family = family_of(model_type)
    full = AutoConfig.for_model(model_type, num_hidden_layers=1).to_dict()
    scaling = SCALINGS.get(model_type, {})
    files: list[dict[str, Any]] = [{key: huge} for key in full if key not in ("model_type", "rope_parameters")]
    files += [{"rope_scaling": scaling | {key: huge}} for key in scaling]
    for changes in files:
        try:
            build_on_meta(family, family.from_hf({**full, **changes}))
        except (ModelCheckpointMismatchError, NotSupportedError):
            continue


@pytest.mark.parametrize("value", [10**12, 2**62])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"])
def test_the_error_says_which_size(key: str, value: int) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=f"{key}.*at most {MAX_SIZE}.*{value}"):
        family_of("llama").from_hf({"model_type": "llama", key: value})
    with pytest.raises(ModelConfigError, match=f"`vocab_size` must be at most {MAX_SIZE}, but is {value}"):
        build_on_meta(get_family("qwen"), get_family("qwen").config_kls(vocab_size=value))


def test_sizes_whose_product_is_too_large() -> None:
    with pytest.raises(ModelConfigError, match="all attention heads together"):
        build_on_meta(get_family("qwen"), get_family("qwen").config_kls(num_attn_heads=2**20, head_dim=2**20))
    with pytest.raises(ModelConfigError, match="entries in all codebooks"):
        build_on_meta(get_family("wav2vec2"), get_family("wav2vec2").config_kls(num_codebook_entries=2**30))


def test_a_number_that_python_refuses_to_print() -> None:
    with pytest.raises(ValueError, match="`n` must be at most"):
        require_size("`n`", 10**5000)
