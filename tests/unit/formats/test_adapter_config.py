"""The fields of `adapter_config.json` that decide about a merge, and those that are refused."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest

from lading.errors import CorruptModelCheckpointError, NotSupportedError
from lading.formats.adapter_config import LoraConfig, parse_adapter_config

PLAIN: dict[str, object] = {"peft_type": "LORA", "lora_alpha": 16, "r": 8}


def parse(**fields: object) -> LoraConfig:
    return parse_adapter_config(PLAIN | fields, label="/a")


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        return peft


def test_a_config_that_peft_writes_by_default(peft: Any) -> None:
    """Also shows that every field of the installed version is known: an unknown one that is set is refused."""
    from lading.formats import adapter_config

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    parse_adapter_config(config.to_dict() | {"peft_type": "LORA"}, label="/a")

    trained_otherwise = {
        "use_dora", "use_qalora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
        "alora_invocation_tokens", "megatron_config", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
        "monteclora_config", "ensure_weight_tying",
    }  # fmt: skip
    known = adapter_config._MERGED | adapter_config._IRRELEVANT
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} - known == trained_otherwise


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 16 / 8**0.5),
        ({"alpha_pattern": {"q_proj": 4}}, 0.5),
        ({"alpha_pattern": {"proj": 4, "self_attn.q_proj": 8}}, 1.0),
        ({"alpha_pattern": {"attn.q_proj": 4}}, 2.0),
        ({"alpha_pattern": {r"layers\.[0-3]\..*_proj": 4}}, 0.5),
        ({"alpha_pattern": {r"^q_proj": 4, "^model.layers": 4}}, 2.0),
        ({"alpha_pattern": {"model.layers.1.self_attn.(q|k)_proj": 4}}, 0.5),
        ({"alpha_pattern": {"q_proj": 4, ".*": 8}}, 0.5),
    ],
)
def test_the_factor_of_a_module(peft: Any, fields: dict[str, Any], scale: float) -> None:
    from peft.utils.other import get_pattern_key

    name = "model.layers.1.self_attn.q_proj"
    assert parse(**fields).scale(name, 8) == pytest.approx(scale)

    patterns = fields.get("alpha_pattern", {})
    alpha = patterns.get(get_pattern_key(list(patterns), name), 16)
    assert alpha / (8**0.5 if "use_rslora" in fields else 8) == pytest.approx(scale)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)(a|a)(a|a)c", "a*a*a*b", "(", "x{1000000000000}", "(?:a*)*b" * 50])
def test_expressions_that_could_take_forever_are_refused(pattern: str) -> None:
    with pytest.raises(NotSupportedError, match="alpha_pattern"):
        parse(alpha_pattern={pattern: 1}).scale("a" * 100, 8)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"of_a_later_version": {"x": 1}}, "of_a_later_version"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_its_name(fields: dict[str, object], names: str) -> None:
    with pytest.raises(NotSupportedError, match=names):
        parse(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"of_a_later_version": None},
        {"of_a_later_version": []},
        {"bias": "all", "fan_in_fan_out": True, "target_modules": "all-linear", "layers_to_transform": [1]},
    ],
)
def test_what_does_not_change_a_merge_is_ignored(fields: dict[str, object]) -> None:
    assert parse(**fields) == parse()


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_alpha": float("nan")},
        {"lora_alpha": 10**400},
        {"use_rslora": "yes"},
        {"alpha_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": None}},
        {"modules_to_save": "lm_head"},
        {"modules_to_save": [1]},
    ],
)
def test_values_of_a_wrong_type(fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(CorruptModelCheckpointError, match=name):
        parse(**fields)
