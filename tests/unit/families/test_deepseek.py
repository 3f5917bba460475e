"""DeepSeek: the keys of its config.json, the layouts of its checkpoints, and what a load makes of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lading.errors import ModelCheckpointMismatchError, ModelConfigError, NotSupportedError, PolicyError
from lading.families.deepseek import FAMILY, DeepSeekConfig, get_deepseek_model_hub
from lading.gangs import simulate_gangs
from lading.models.construct import build_on_meta
from lading.models.hub import load_model, load_with_report
from lading.models.shapes import count_parameters
from lading.operations.check import check_model
from lading.operations.export import convert_checkpoint
from lading.operations.plan import plan_load
from tests.helpers.block_scaled import QUANTIZATION, quantize_folder

PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": QUANTIZATION,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_published_model() -> None:
    assert FAMILY.from_hf(PUBLISHED) == DeepSeekConfig()
    assert get_deepseek_model_hub().get_arch_config("v3") == DeepSeekConfig()
    assert FAMILY.to_hf is not None
    assert FAMILY.from_hf(FAMILY.to_hf(DeepSeekConfig())) == DeepSeekConfig()
    assert count_parameters(FAMILY, DeepSeekConfig()) == 671_026_419_200


@pytest.mark.parametrize(
    "changes",
    [{"scoring_func": "softmax"}, {"topk_method": "greedy"}, {"moe_layer_freq": 2}, {"hidden_act": "gelu"}],
    ids=str,
)
def test_values_that_are_not_supported(changes: dict[str, Any]) -> None:
    with pytest.raises(NotSupportedError, match=next(iter(changes))):
        FAMILY.from_hf(PUBLISHED | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"rotary_dim": 3}, "even width"),
        ({"num_dense_layers": -1}, "num_dense_layers"),
        ({"num_shared_experts": 0}, "shared"),
        ({"key_value_rank": 0}, "key_value_rank"),
        ({"query_rank": 1 << 60}, "query_rank"),
    ],
    ids=str,
)
def test_configurations_of_no_model(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelConfigError, match=named):
        build_on_meta(FAMILY, replace(DeepSeekConfig(num_layers=4), **changes))


# --- layouts of checkpoints -------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 144,
    "intermediate_size": 264,
    "moe_intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 38,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
}
"""Sizes whose halves end inside a block of 128."""

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A model of transformers, as it is in memory: with stacked experts."""
    import transformers

    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**TINY))
    found = {name: tensor.detach().bfloat16() for name, tensor in model.state_dict().items()}
    found[BIAS] = torch.rand(8)

    return found


def separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are published, with a name for each expert, and those of a layer that is not needed."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, experts, leaf = name.partition(".experts.")
        if not experts:
            found[name] = tensor
            continue
        for e, weight in enumerate(tensor):
            if leaf == "down_proj":
                found[f"{prefix}.experts.{e}.down_proj.weight"] = weight.clone()
            else:
                gate, up = weight.chunk(2)
                found[f"{prefix}.experts.{e}.gate_proj.weight"] = gate.clone()
                found[f"{prefix}.experts.{e}.up_proj.weight"] = up.clone()
    for name in [name for name in found if name.startswith("model.layers.1.")]:
        found[name.replace("layers.1.", "layers.2.")] = found[name].clone()

    return found | {"model.layers.2.eh_proj.weight": torch.zeros(144, 288, dtype=torch.bfloat16)}


def write(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", **TINY, **changes}
    (folder / "config.json").write_text(json.dumps(values))

    return folder


def test_experts_in_one_tensor_or_apart(state: dict[str, Tensor], tmp_path: Path) -> None:
    stacked, apart = write(tmp_path / "stacked", state), write(tmp_path / "apart", separate(state))
    bare = write(tmp_path / "bare", {n.removeprefix("model."): t for n, t in separate(state).items()})

    assert check_model(stacked).dropped == ()
    assert all(name.startswith("model.layers.2.") for name in check_model(apart).dropped)
    assert "model.layers.2.eh_proj.weight" in check_model(apart).dropped
    for folder in (stacked, apart, bare):
        model = load_model(folder, progress=False)
        assert check_model(folder).fits
        found = model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[name], state[name]) for name in state)
        assert found[BIAS].dtype == torch.float32


def test_a_conversion_keeps_what_drafts_tokens_unless_it_is_dropped(state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "apart", separate(state))
    with pytest.raises(PolicyError, match=r"model\.layers\.2"):
        convert_checkpoint(folder, tmp_path / "written", progress=False)

    convert_checkpoint(folder, tmp_path / "written", drop=True, progress=False)
    again = load_model(tmp_path / "written", progress=False).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("axes", [{}, {"tp": 2}, {"sdp": 2}], ids=str)
def test_scaled_weights_apart_are_stacked(state: dict[str, Tensor], tmp_path: Path, axes: dict[str, int]) -> None:
    folder = write(tmp_path / "scaled", separate(state))
    plain = quantize_folder(folder)
    exact = write(tmp_path / "plain", plain)

    assert check_model(folder).fits
    planned = plan_load(folder, **axes)
    for rank in range(2 if axes else 1):
        with simulate_gangs(rank, **axes) as gangs:
            found, report = load_with_report(folder, gangs=gangs, dtype="bf16", progress=False)
            expected = load_model(exact, gangs=gangs, dtype="bf16", progress=False)
        assert report.bytes_read == planned.ranks[rank].bytes_read
        for (name, tensor), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
            local, own = (t.to_local() if hasattr(t, "to_local") else t for t in (tensor, other))
            assert torch.equal(local, own), name


def test_scaled_weights_in_one_tensor(state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "scaled", state)
    plain = quantize_folder(folder, lambda name: "_proj" in name)
    assert "model.layers.1.mlp.experts.down_proj_scale_inv" in load_file(folder / "model.safetensors")

    found = load_model(folder, dtype=torch.float32, progress=False).state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_nextn_predict_layers", 2**30), ("num_nextn_predict_layers", False), ("first_k_dense_replace", False)],
)
def test_numbers_of_layers_that_are_not_valid(key: str, value: object) -> None:
    assert FAMILY.from_hf is not None
    with pytest.raises(ModelCheckpointMismatchError):
        FAMILY.from_hf({**PUBLISHED, key: value})
