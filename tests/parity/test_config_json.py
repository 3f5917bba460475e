"""``config.json`` against transformers: absent keys mean here what they mean there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.helpers.parity_tools import family_of

DECODERS = ["llama", "llama4_text", "qwen2", "qwen3", "mistral", "olmo2"]
BY_LAYER = ["olmo3", "gemma3_text", "gemma3n_text"]

SPARSE: list[dict[str, Any]] = [
    {},
    {"num_attention_heads": 64, "hidden_size": 512},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "max_window_layers": 3, "num_hidden_layers": 7},
    {"use_sliding_window": True, "sliding_window": None},
    {"sliding_window": None},
    {"rope_theta": 12_345.0},
    {"rope_theta": 12_345.0, "rope_scaling": None},
    {"rope_theta": 12_345.0, "rope_scaling": {"type": "default"}},
    {"rope_theta": 12_345.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 12_345.0, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {}},
]


def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.few(20)
@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("values", SPARSE, ids=json.dumps)
def test_a_sparse_file_means_what_the_full_one_does(model_type: str, values: dict[str, Any]) -> None:
    from transformers import AutoConfig

    family = family_of(model_type)
    full = AutoConfig.for_model(model_type, **json.loads(json.dumps(values)))
    with torch.device("meta"):
        found = family.build(family.from_hf({"model_type": model_type, **values}))
        expected = family.build(family.from_hf(json.loads(full.to_json_string(use_diff=False))))

    assert str(found) == str(expected)
    assert found.model.windows == expected.model.windows
    assert found.model.rotary_emb.theta == expected.model.rotary_emb.theta == full.rope_parameters["rope_theta"]


SPARSE_BY_LAYER: dict[str, list[dict[str, Any]]] = {
    "olmo3": [
        {},
        {"num_hidden_layers": 5, "sliding_window": 17},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500_000.0}}},
        {"layer_types": ["full_attention", "sliding_attention"], "num_hidden_layers": 2},
    ],
    "gemma3_text": [
        {},
        {"sliding_window_pattern": 3, "num_hidden_layers": 7},
        {"rope_theta": 77.0},
        {"rope_local_base_freq": 77.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
            }
        },
    ],
    "gemma3n_text": [
        {},
        {"num_hidden_layers": 10, "num_kv_shared_layers": 4},
        {"rope_theta": 77.0, "rope_local_base_freq": 7.0},
        {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "intermediate_size": [8, 16]},
        {"activation_sparsity_pattern": [0.5] * 35, "final_logit_softcapping": 5.0},
        {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 9.0}}},
    ],
}
THETAS = {
    "gemma3_text": ("rope_theta", "local_rope_theta"),
    "gemma3n_text": ("rope_theta_global", "rope_theta"),
}
"""The fields of the bases of rotary frequencies, without and with a window, if they are two."""


@pytest.mark.parametrize(
    ("model_type", "values"),
    [(model_type, values) for model_type, files in SPARSE_BY_LAYER.items() for values in files],
    ids=json.dumps,
)
def test_a_sparse_file_with_kinds_of_layers_means_what_the_full_one_does(
    model_type: str, values: dict[str, Any]
) -> None:
    from transformers import AutoConfig

    family = family_of(model_type)
    full = AutoConfig.for_model(model_type, **json.loads(json.dumps(values)))
    found = family.from_hf({"model_type": model_type, **values})

    assert found == family.from_hf(json.loads(full.to_json_string(use_diff=False)))
    of_full, of_windows = THETAS.get(model_type, ("rope_theta", "rope_theta"))
    assert getattr(found, of_full) == full.rope_parameters["full_attention"]["rope_theta"]
    assert getattr(found, of_windows) == full.rope_parameters["sliding_attention"]["rope_theta"]
    assert found.layer_types == full.layer_types
    assert found.sliding_window == full.sliding_window


def test_a_sparse_file_of_bert_means_what_the_full_one_does() -> None:
    from transformers import BertConfig

    family = family_of("bert")
    full = json.loads(BertConfig().to_json_string(use_diff=False))

    assert family.from_hf({"model_type": "bert"}) == family.from_hf(full) == family.config_kls()


@pytest.mark.parametrize("model_type", [*DECODERS, *BY_LAYER, "bert"])
def test_an_empty_file_has_the_shapes_of_the_default_model(model_type: str) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    family = family_of(model_type)
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        ours = family.build(family.from_hf({"model_type": model_type}))
        theirs = (AutoModel if model_type == "bert" else AutoModelForCausalLM).from_config(config)

    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_no_number_of_key_value_heads_means_that_of_the_attention_heads(model_type: str) -> None:
    from transformers import AutoConfig

    values = {"num_attention_heads": 16, "num_key_value_heads": None}

    config = family_of(model_type).from_hf({"model_type": model_type, **values})

    assert config.num_key_value_heads == AutoConfig.for_model(model_type, **values).num_key_value_heads == 16
