"""All types and classes of transformers that can be made small, against ``from_pretrained``, in three precisions."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Module

from lading.errors import LadingError, NotSupportedError
from lading.families.hg import get_hg_model_hub

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SMALL: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "model_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("depth", "num_decoder_layers", "num_encoder_layers", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), 64),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), 64),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    **dict.fromkeys(("image_size", "input_size"), 16),
    "patch_size": 4,
    "num_mel_bins": 8,
}  # fmt: skip
"""Values of keys of ``config.json`` that make a model small, whichever it is."""

MOST = 10_000_000
"""Parameters of a model that is small."""

ZERO_PADDING = ("youtu",)
"""Types with which transformers zeroes the embedding of padding after it read another one from the checkpoint."""

COUNTER = "num_batches_tracked"
"""A counter that transformers casts with a normalization that stays in float32; here it stays an integer."""

SAMPLE = (
    ("t5", "T5ForConditionalGeneration"),
    ("umt5", "UMT5ForSequenceClassification"),
    ("deepseek_v3", "DeepseekV3ForCausalLM"),
    ("glm4_moe", "Glm4MoeForCausalLM"),
    ("gpt_oss", "GptOssForCausalLM"),
    ("rwkv", "RwkvForCausalLM"),
    ("blip_2_qformer", "Blip2QFormerModel"),
    ("mixtral", "MixtralForCausalLM"),
    ("whisper", "WhisperForAudioClassification"),
    ("roberta", "RobertaForMultipleChoice"),
)
"""Types that keep something in float32, some that do not, and other heads."""


def small_config(kls: type[Any], *, keeps_form: bool = False) -> Any:
    """Return a configuration of few small layers, parts included.

    :param keeps_form: make only large numbers smaller, and lists only of the length that they have.
    """
    default = kls()
    if keeps_form:
        values = {
            key: shrunk(key, value)
            for key, value in default.to_dict().items()
            if key not in default.sub_configs and not key.endswith("_id")
        }
        values = {key: value for key, value in values.items() if value is not None}
    else:
        values = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    parts = {
        name: small_config(type(part), keeps_form=keeps_form).to_dict()
        for name in kls.sub_configs
        if (part := getattr(default, name))
    }

    return kls(**values, **parts)


def shrunk(key: str, value: object) -> object:
    """Return a small value in the form of a default one, or ``None`` if that is small."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return SMALL.get(key, 32 if value >= 96 else None)
    if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
        if max(value) >= 64:
            return type(value)(min(each, 16 * (i + 1)) if each >= 64 else each for i, each in enumerate(value))
        if "depth" in key:
            return type(value)(min(each, 1) for each in value)

    return None


def classes_of(model_type: str) -> list[str]:
    """Return the names of the classes that transformers has for a type, the most general one last."""
    from transformers.models.auto import modeling_auto

    tables = sorted(
        name for name in vars(modeling_auto) if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING_NAMES")
    )
    found: dict[str, None] = {}
    for table in (*tables, "MODEL_FOR_PRETRAINING_MAPPING_NAMES", "MODEL_MAPPING_NAMES"):
        named = vars(modeling_auto)[table].get(model_type) or ()
        found |= dict.fromkeys([named] if isinstance(named, str) else named)

    return list(found)


def small_model(model_type: str, kls: str) -> Module | None:
    """Return a model of a type with random numbers, buffers included; ``None`` where it cannot be made small."""
    import transformers

    make = getattr(transformers, kls, None)
    config = None
    for keeps_form in (False, True):
        # Some sizes do not fit together, and some models need packages that are not here.
        with suppress(Exception), torch.device("meta"):
            found = small_config(transformers.CONFIG_MAPPING[model_type], keeps_form=keeps_form)
            if make(found).num_parameters() <= MOST:
                config = found
                break
    if config is None:
        return None
    try:
        torch.manual_seed(0)
        model: Module = make(config)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    # Numbers that half precision does not have.
                    tensor.copy_(torch.randn(tensor.shape).mul_(0.1).add_(1e-3))
            if model_type in ZERO_PADDING:
                model.get_input_embeddings().weight[config.pad_token_id] = 0
    except Exception:  # some are made on the meta device only
        return None

    return model


def differences(ours: Module, expected: Module) -> list[str]:
    found = []
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, expected))
        found += [f"{name}: only one has it" for name in sorted(a.keys() ^ b.keys())]
        for name in a.keys() & b.keys():
            if name.endswith(COUNTER) and torch.equal(a[name], b[name].to(a[name].dtype)):
                continue
            if a[name].dtype != b[name].dtype:
                found.append(f"{name}: {a[name].dtype}, but {b[name].dtype} in transformers")
            elif not torch.equal(a[name].nan_to_num(), b[name].nan_to_num()):
                found.append(f"{name}: other numbers")

    return found


def compare(model_type: str, kls: str, folder: Path) -> list[str] | None:
    """Return what differs from ``from_pretrained``, or ``None`` if nothing can be compared."""
    model = small_model(model_type, kls)
    if model is None:
        return None
    make: Any = type(model)
    try:
        model.save_pretrained(folder)  # type: ignore[operator]
        loaded = {dtype: make.from_pretrained(folder, dtype=dtype, output_loading_info=True) for dtype in DTYPES}
    except Exception:  # not even transformers loads what it saves
        return None
    expected = {dtype: found for dtype, (found, _) in loaded.items()}
    if any("meta" in str(t.device) for t in expected[torch.float32].state_dict().values()):
        return None
    if loaded[torch.float32][1]["missing_keys"] and loaded[torch.float32][1]["unexpected_keys"]:
        return None  # it saves other names than it reads

    found = []
    for dtype in DTYPES:
        try:
            ours = get_hg_model_hub().load_model(folder, dtype=dtype, progress=False)
        except NotSupportedError:
            return None  # said, and not silently another model
        except LadingError as error:
            return [f"{dtype}: {type(error).__name__}: {error}"]
        found += [f"{dtype}: {line}" for line in differences(ours, expected[dtype])[:3]]

    return found


@pytest.mark.few(3)
@pytest.mark.parametrize(("model_type", "kls"), SAMPLE)
def test_a_model_is_the_same_in_every_precision(model_type: str, kls: str, tmp_path: Path) -> None:
    assert compare(model_type, kls, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_class_of_every_type_is_the_same_in_every_precision(
    part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import CONFIG_MAPPING

    different, compared = {}, 0
    for model_type in sorted(CONFIG_MAPPING.keys())[part::8]:
        for kls in classes_of(model_type):
            folder = tmp_path_factory.mktemp("model")
            found = compare(model_type, kls, folder)
            shutil.rmtree(folder)
            compared += found is not None
            if found:
                different[model_type, kls] = found

    assert different == {}
    assert compared > 120
