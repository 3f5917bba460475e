"""Each key of ``config.json``, changed: the same logits as those of transformers with that key, or a refusal."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lading.errors import LadingError
from lading.models.construct import build_on_meta
from tests.helpers.parity_tools import family_of, relative_difference

ABSENT = object()

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
DECODER = SIZES | {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
WINDOWS = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}
BASES: dict[str, dict[str, Any]] = {
    "llama": DECODER,
    "llama4_text": DECODER
    | {
        "head_dim": 16,
        "intermediate_size_mlp": 40,
        "num_local_experts": 3,
        "interleave_moe_layer_step": 2,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 16,
        "floor_scale": 16,
    },
    "qwen2": DECODER | WINDOWS,
    "qwen3": DECODER | WINDOWS | {"head_dim": 16},
    "qwen3_moe": DECODER
    | {
        "use_sliding_window": True,
        "sliding_window": 16,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "mixtral": DECODER | {"sliding_window": 16, "head_dim": 16, "num_local_experts": 4},
    "mistral": DECODER | {"sliding_window": 16, "head_dim": 16},
    "olmo2": DECODER,
    "olmo3": DECODER | {"sliding_window": 16},
    "gemma3_text": DECODER | {"sliding_window": 16, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3n_text": DECODER
    | {
        "sliding_window": 16,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 6,
        "vocab_size_per_layer_input": 50,
        "hidden_size_per_layer_input": 6,
    },
    "deepseek_v3": DECODER
    | {
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 12,
    },
    "bert": SIZES,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SCALED = {"llama": LLAMA3, "olmo3": YARN, "deepseek_v3": YARN, "gemma3_text": LINEAR}

ROPES: list[dict[str, Any]] = [
    LLAMA3,
    LLAMA3 | {"rope_theta": 77.0},
    LLAMA3 | {"attention_factor": 1.5},
    YARN,
    YARN | {"mscale": 0.5, "mscale_all_dim": 0.8},
    YARN | {"attention_factor": 1.3},
    YARN | {"beta_fast": 16, "beta_slow": 2},
    YARN | {"truncate": False},
    LINEAR,
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_theta": 77.0},
    {"rope_type": "default", "factor": 3.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "proportional", "partial_rotary_factor": 0.5},
]
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"

OLD_KEYS = """
original_max_position_embeddings partial_rotary_factor rope_theta rope_scaling rope_local_base_freq
sliding_window_pattern position_embedding_type is_causal use_bidirectional_attention per_layer_config head_dim
pruned_heads tie_encoder_decoder
torch_dtype attention_bias mlp_bias attn_logit_softcapping final_logit_softcapping unheard_of
""".split()
"""Keys that published files have, although no code of today's transformers may read them by name."""

VALUES: dict[str, list[Any]] = {
    "no_rope_layers": [[1, 1, 0, 1], [0] * 4, [1] * 4, [1, 1, 1, 0, 1], []],
    "moe_layers": [[], [3], [0, 2], [2, 3, 0, 1, 7], [1, 3, 3]],
    "layer_types": [
        [CHUNKED] * 4,
        [CHUNKED, FULL] * 2,
        [FULL] * 4,
        [SLIDING] * 4,
        [FULL, FULL, SLIDING, SLIDING],
        [SLIDING, FULL] * 2,
        [FULL] * 3,
    ],
    "hidden_act": ["gelu", "relu", "swish", "silu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python"],
    "per_layer_config": [{"0": {"intermediate_size": 24}}, {"1": {"rms_norm_eps": 0.5}}, {"1": {"sliding_window": 4}}],
    "position_embedding_type": ["absolute", "relative_key"],
    "original_max_position_embeddings": [64, 128],
    "rope_theta": [77.0, 500_000.0],
    "rope_local_base_freq": [77.0],
    "sliding_window_pattern": [3],
    "partial_rotary_factor": [1.0],
    "torch_dtype": ["float32", "bfloat16"],
    "intermediate_size": [[48] * 4, [48, 24, 48, 24], [48] * 3],
    "activation_sparsity_pattern": [[0.5] * 4, [0.0, 0.9, 0.0, 0.9], [0.5] * 3, [1.0] * 4],
    "rope_scaling": [
        *ROPES,
        *({FULL: rope} for rope in ROPES),
        *({SLIDING: rope} for rope in ROPES),
        *({FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": 99.0}} for rope in ROPES),
    ],
}
VALUES |= {"hidden_activation": VALUES["hidden_act"], "rope_parameters": VALUES["rope_scaling"]}

TOKENS = torch.arange(90)[None] % 59 + 1


@cache
def keys_that_transformers_reads(model_type: str) -> frozenset[str]:
    """Names of attributes of configurations in the code that makes and runs a model of the type."""
    import transformers
    from transformers import AutoConfig, cache_utils, masking_utils, modeling_layers, modeling_rope_utils

    module = inspect.getmodule(_class_of(model_type, AutoConfig.for_model(model_type)))
    modules = [module, cache_utils, masking_utils, modeling_layers, modeling_rope_utils]
    source = "\n".join(Path(str(m.__file__)).read_text(encoding="utf-8") for m in modules if m is not None)
    found = set(re.findall(r"config\.([a-z_]+)\b(?!\()", source))
    found |= set(re.findall(r"(?:get|has)attr\([a-z_.]*config, \"([a-z_]+)\"", source))

    return frozenset(name for name in found if not hasattr(transformers.PreTrainedConfig, name)) | {"is_causal"}


def _class_of(model_type: str, config: Any) -> type[nn.Module]:
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModel if model_type == "bert" else AutoModelForCausalLM
    kls: type[nn.Module] = auto._model_mapping[type(config)]

    return kls


def alternatives(key: str, found: Any) -> Iterator[Any]:
    """What to put in the place of a value."""
    if found is not ABSENT:
        yield ABSENT
    yield from (None, True, False, 4, 8, 0.5)
    if isinstance(found, int) and not isinstance(found, bool):
        yield from (2 * found, found + 1)
    elif isinstance(found, float):
        yield 3 * found + 0.1
    yield from VALUES.get(key, ())


def theirs_of(file: dict[str, Any]) -> tuple[nn.Module, Tensor] | None:
    """The model of transformers and its output; ``None`` where it makes no model of the file."""
    from transformers import AutoConfig

    values = copy.deepcopy(file)
    try:
        config = AutoConfig.for_model(**values)
        kls: Any = _class_of(file["model_type"], config)
        model = kls._from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            wide = parameter.dim() > 1
            parameter.copy_(2 * parameter.shape[-1] ** -0.5 * drawn if wide else 1 + 0.2 * drawn)
        output = model(TOKENS)
    except Exception:  # whatever a wrong value leads to there
        return None
    found = getattr(output, "logits", None)

    return model, output[0] if found is None else found


def ours_of(file: dict[str, Any]) -> nn.Module | None:
    """This project's model, without weights; ``None`` where it is refused."""
    family = family_of(file["model_type"])
    try:
        return build_on_meta(family, family.from_hf(file))
    except LadingError:
        return None


def filled(model: nn.Module, theirs: nn.Module) -> nn.Module | None:
    """The model with the weights of ``theirs``; ``None`` where they do not fit."""
    model.to_empty(device="cpu")
    state = theirs.state_dict()
    tied = set(model.state_dict()) ^ set(state) <= {"lm_head.weight"}
    try:
        model.load_state_dict(state, strict=not tied)
    except RuntimeError:  # other names or shapes, which a load refuses
        return None
    for module in model.modules():
        if hasattr(module, "reset_non_persistent_buffers"):
            module.reset_non_persistent_buffers("cpu")

    return model.eval()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("model_type", "scaled"), [*((name, False) for name in BASES), *((name, True) for name in SCALED)]
)
@torch.no_grad()
def test_each_key(model_type: str, scaled: bool) -> None:
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **BASES[model_type])
    file = json.loads(config.to_json_string(use_diff=False))
    keys = {*file, *OLD_KEYS, *keys_that_transformers_reads(model_type)} - {"model_type"}
    if scaled:
        ropes = file["rope_parameters"]
        ropes = ropes.get(FULL, ropes)
        ropes |= SCALED[model_type]
        keys = {"rope_theta", "max_position_embeddings", "original_max_position_embeddings", "head_dim", "layer_types"}

    wrong, compared = [], 0
    for key in sorted(keys):
        for value in alternatives(key, file.get(key, ABSENT)):
            changed = {k: v for k, v in file.items() if k != key}
            if value is not ABSENT:
                changed[key] = value
            ours = ours_of(copy.deepcopy(changed))
            made = None if ours is None else theirs_of(changed)
            if ours is None or made is None or filled(ours, made[0]) is None:
                continue
            if (changed.get("max_position_embeddings") or 2048) < TOKENS.numel():
                continue  # which is refused with each call
            if model_type == "deepseek_v3" and changed.get("num_hidden_layers") is None:
                continue  # the routers of 61 layers amplify another order of a sum
            logits = ours(TOKENS)
            compared += 1
            if logits.shape != made[1].shape or not relative_difference(logits, made[1]) <= 1e-4:
                wrong.append(f"{key}: {'absent' if value is ABSENT else json.dumps(value)}")

    assert not wrong
    assert compared > (5 if scaled else 200)


@pytest.mark.parametrize("model_type", BASES)
def test_a_file_of_transformers_has_no_unknown_key(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig

    file = json.loads(AutoConfig.for_model(model_type, **BASES[model_type]).to_json_string(use_diff=False))

    family_of(model_type).from_hf(file)
    assert not caplog.records

    family_of(model_type).from_hf(file | {"unheard_of": 3, "unheard_of_too": None})
    assert [record.getMessage().count("unheard_of") for record in caplog.records] == [1]
