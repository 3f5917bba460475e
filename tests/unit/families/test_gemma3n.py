"""Gemma 3n: the keys of its config.json, and the tensors that each layout of its checkpoints has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lading import AssetCard, ModelCheckpointMismatchError, NotSupportedError, check_model
from lading.families import gemma3n
from lading.families.gemma3n import Gemma3nAudioConfig, Gemma3nConfig, get_gemma3n_model_hub
from lading.gangs import create_fake_gangs
from lading.models.construct import create_model
from lading.models.hub import load_with_report
from lading.models.parallel_plan import ParallelPlan
from lading.planning.rules import route

FULL, WINDOW = "full_attention", "sliding_attention"
E2B_TEXT: dict[str, Any] = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
    "altup_active_idx": 0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_lr_multiplier": 1.0,
    "altup_num_inputs": 4,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "hidden_size_per_layer_input": 256,
    "initializer_range": 0.02,
    "intermediate_size": [8192] * 30,
    "laurel_rank": 64,
    "layer_types": ([WINDOW] * 4 + [FULL]) * 6,
    "max_position_embeddings": 32_768,
    "model_type": "gemma3n_text",
    "num_attention_heads": 8,
    "num_hidden_layers": 30,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 10,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": None,
    "rope_theta": 1_000_000.0,
    "sliding_window": 512,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 262_400,
    "vocab_size_per_layer_input": 262_144,
}
AUDIO: dict[str, Any] = {
    "conf_attention_context_right": 0,
    "conf_num_hidden_layers": 12,
    "gradient_clipping": 10_000_000_000.0,
    "hidden_size": 1536,
    "model_type": "gemma3n_audio",
    "sscp_conv_channel_size": [128, 32],
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "vocab_offset": 262_272,
}
E2B = {
    "architectures": ["Gemma3nForConditionalGeneration"],
    "audio_config": AUDIO,
    "audio_soft_tokens_per_image": 188,
    "model_type": "gemma3n",
    "text_config": E2B_TEXT,
    "vision_config": {"model_type": "gemma3n_vision", "vocab_offset": 262_144},
}

TINY = Gemma3nConfig(
    model_dim=16, max_seq_len=32, vocab_size=20, num_layers=4, num_attn_heads=2, num_key_value_heads=1, head_dim=8,
    ffn_inner_dim=12, altup_hidden_dim=8, layer_types=[WINDOW, FULL] * 2, num_kv_shared_layers=2, laurel_rank=3,
    vocab_size_per_layer_input=18, hidden_size_per_layer_input=6, sliding_window=4,
)  # fmt: skip


def spec_of(config: Gemma3nConfig) -> Any:
    with torch.device("meta"):
        return gemma3n.FAMILY.build(config).spec


def test_the_file_of_a_whole_model_and_of_its_text_describe_the_architecture(home: Path) -> None:
    expected = get_gemma3n_model_hub().get_arch_config("e2b")
    text, whole = gemma3n.FAMILY.from_hf(E2B_TEXT), gemma3n.FAMILY.from_hf(E2B)

    assert spec_of(text) == spec_of(whole) == spec_of(expected)
    assert (text.audio_config, whole.audio_config) == (None, expected.audio_config)
    assert whole.audio_config == Gemma3nAudioConfig()
    assert whole.audio_config.sscp_conv_kernel_size == ((3, 3), (3, 3))
    stated = gemma3n.FAMILY.hf_stated(E2B)
    assert stated == gemma3n.FAMILY.hf_stated(E2B_TEXT) | {"audio_config", "num_audio_tokens"}


def test_another_audio_encoder_is_kept() -> None:
    changed = E2B | {"audio_config": AUDIO | {"hidden_size": 64, "sscp_conv_stride_size": [[1, 2], [2, 2]]}}
    config = gemma3n.FAMILY.from_hf(changed | {"audio_soft_tokens_per_image": 7})

    assert config.audio_config == Gemma3nAudioConfig(hidden_size=64, sscp_conv_stride_size=((1, 2), (2, 2)))
    assert config.num_audio_tokens == 7


def test_layers() -> None:
    """As fairseq2 has them: four of five layers have a window, but the last has none."""
    spec = spec_of(Gemma3nConfig(num_layers=12, num_kv_shared_layers=3, ffn_inner_dim=64, altup_hidden_dim=32))

    assert [i for i in range(12) if spec.window_of(i) is None] == [4, 9, 11]
    assert [spec.ffn_inner_dim_of(i) for i in (3, 4)] == [32, 64]
    assert [spec.ffn_sparsity_of(i) for i in (9, 10)] == [0.95, 0.0]
    assert [spec.key_value_source_of(i) for i in range(8, 12)] == [None, 4, 8, 4]
    assert spec.key_value_sources() == {4, 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"layer_types": ["chunked_attention"] * 30}, "layer_types is"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_what_the_family_does_not_support(changes: dict[str, Any], message: str) -> None:
    for file in (E2B_TEXT | changes, E2B | {"text_config": E2B_TEXT | changes}):
        with pytest.raises(NotSupportedError, match=message):
            gemma3n.FAMILY.from_hf(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": [8192, 16_384]}, "`ffn_inner_dims` must have one for each of the 30 layers, but has 2"),
        ({"intermediate_size": []}, "`ffn_inner_dims` must have one for each of the 30 layers, but has 0"),
        ({"intermediate_size": "8192"}, "intermediate_size"),
        ({"activation_sparsity_pattern": [0.5]}, "`ffn_sparsity` must have one for each of the 30 layers, but has 1"),
        ({"activation_sparsity_pattern": [1.0] * 30}, r"`ffn_sparsity` must be in \[0, 1\), but one is 1.0"),
        ({"activation_sparsity_pattern": [-0.5] * 30}, "activation_sparsity_pattern is expected to be a list"),
        ({"num_kv_shared_layers": 30}, "`num_kv_shared_layers` must be from 0 to 29"),
        ({"num_kv_shared_layers": -1}, "num_kv_shared_layers is expected to be a positive integer"),
        ({"num_kv_shared_layers": 27}, "values of a layer before these with the same window, but layer 4 has none"),
        ({"altup_active_idx": 4}, "`altup_active_idx` must be an index of the 4 states, but is 4"),
        ({"altup_num_inputs": 101}, "`altup_num_inputs` must be at most 100"),
        ({"final_logit_softcapping": 0.0}, "`final_logit_soft_cap` must be positive"),
    ],
)
def test_a_file_that_describes_no_model(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        gemma3n.FAMILY.from_hf(E2B_TEXT | changes)


@pytest.mark.parametrize("value", ["x", [[3, 3]], [[3, 3], [3, 0]], [3, 3], [[3, 3], [3, 3.0]]])
def test_sizes_of_another_form(value: Any) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=r"audio_config\.sscp_conv_kernel_size is expected"):
        gemma3n.FAMILY.from_hf(E2B | {"audio_config": AUDIO | {"sscp_conv_kernel_size": value}})


def test_a_tp_that_divides_no_width_of_a_layer() -> None:
    plan: ParallelPlan = gemma3n.FAMILY.parallel_plan(TINY)
    plan.check(2)
    with pytest.raises(NotSupportedError, match="`ffn_inner_dim` is 4"):
        plan.check(8)


# --- layouts of checkpoints

OTHERS = ["vision_tower.timm_model.conv_stem.conv.weight", "embed_vision.embedding.weight", "audio_tower.conformer.0.x",
          "embed_audio.embedding.weight"]  # fmt: skip
UNUSED = [f"layers.{i}.self_attn.{name}.weight" for i in (2, 3) for name in ("k_proj", "v_proj", "k_norm")]


def fairseq2_name(name: str) -> str:
    """The name in a checkpoint of fairseq2's trainer."""
    for ours, theirs in (
        ("model.embed_tokens.", "decoder_frontend.embed."),
        ("model.embed_tokens_per_layer.", "decoder_frontend.embed_tokens_per_layer."),
        ("model.per_layer_", "decoder_frontend.per_layer_"),
        ("model.norm.", "decoder.layer_norm."),
        ("lm_head.", "final_proj.proj."),
        ("model.", "decoder."),
        (".o_proj.", ".output_proj."),
        (".mlp.up_proj.", ".ffn.inner_proj."),
        (".mlp.down_proj.", ".ffn.output_proj."),
        (".mlp.", ".ffn."),
    ):
        name = name.replace(ours, theirs)
    return name


LAYOUTS = {
    "text": lambda name: name,
    "text-without-head": lambda name: name.removeprefix("model."),
    "whole": lambda name: name.replace("model.", "model.language_model."),
    "whole-before-5": lambda name: f"language_model.{name}",
    "whole-without-head": lambda name: name.replace("model.", "language_model."),
    "fairseq2": fairseq2_name,
}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)

    return create_model(
        gemma3n.FAMILY, TINY, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False
    ).eval()  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_of_each_layout(model: torch.nn.Module, layout: str, tmp_path: Path, home: Path) -> None:
    rename = LAYOUTS[layout]
    state = {rename(name): value for name, value in model.state_dict().items()}
    state.pop(rename("lm_head.weight"))
    further = [rename(f"model.{name}") for name in UNUSED]
    if layout.startswith("whole"):
        further += [f"model.{name}" if "model.l" in rename("model.layers") else name for name in OTHERS]
    elif layout == "fairseq2":
        further.append("audio_tower.encoder.layers.0.ffn1.inner_proj.weight")
    save_file(state | {name: torch.ones(3) for name in further}, tmp_path / "model.safetensors")

    loaded = get_gemma3n_model_hub().load_custom_model(tmp_path / "model.safetensors", TINY, progress=False)

    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    routed = route([*state, *further], [*loaded.state_dict()], gemma3n.FAMILY.rules(TINY))
    assert sorted(routed.unneeded) == sorted(further)


def test_keys_and_values_of_other_layers_are_needed(model: torch.nn.Module, tmp_path: Path, home: Path) -> None:
    state = dict(model.state_dict())
    del state["lm_head.weight"], state["model.layers.1.self_attn.k_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")

    with pytest.raises(ModelCheckpointMismatchError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.weight"):
        get_gemma3n_model_hub().load_custom_model(tmp_path / "model.safetensors", TINY, progress=False)


def test_the_folder_of_a_whole_model(model: torch.nn.Module, tmp_path: Path, home: Path) -> None:
    rename = LAYOUTS["whole"]
    state = {rename(name): value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    further = [*(rename(f"model.{name}") for name in UNUSED), *(f"model.{name}" for name in OTHERS)]
    save_file(state | {name: torch.ones(3) for name in further}, tmp_path / "model.safetensors")
    whole = E2B | {"text_config": dict(gemma3n.FAMILY.to_hf(TINY))}
    (tmp_path / "config.json").write_text(json.dumps(whole))

    checked = check_model(AssetCard("tiny", {"checkpoint": str(tmp_path), "model_family": "gemma3n"}))
    assert checked.fits
    assert sorted(checked.dropped) == sorted(further)
    loaded, report = load_with_report(AssetCard("tiny", {"checkpoint": str(tmp_path), "model_family": "gemma3n"}))
    assert sorted(report.dropped) == sorted(further)
    again = get_gemma3n_model_hub().load_model(tmp_path, progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name


# --- the module


def test_the_cache_of_a_layer_serves_those_that_share_it(model: Any) -> None:
    ids = torch.arange(1, 19)[None] % 17 + 1
    generated = model.generate(ids, max_new_tokens=9)
    for step in range(9):
        with torch.no_grad():
            logits = model(generated[:, : ids.size(1) + step])
        assert torch.equal(logits[:, -1].argmax(-1), generated[:, ids.size(1) + step])


def test_weights_of_coefficients_are_clipped_in_training_only(model: Any) -> None:
    import copy

    clipped = copy.deepcopy(model)
    for name, parameter in clipped.named_parameters():
        if "_coefs" in name:
            parameter.data.fill_(500.0)
    within = copy.deepcopy(clipped)
    for name, parameter in within.named_parameters():
        if "_coefs" in name:
            parameter.data.fill_(120.0)
    ids = torch.arange(1, 9)[None]

    with torch.no_grad():
        assert torch.equal(clipped.train()(ids), within.train()(ids))
        assert torch.equal(clipped.train()(ids), within.eval()(ids))
        assert not torch.equal(clipped.eval()(ids), within(ids))
    assert clipped.get_parameter("model.layers.0.altup.correction_coefs.weight").max() == 500.0


def test_it_compiles_without_breaks(model: Any) -> None:
    ids = torch.arange(1, 9)[None]
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    with torch.no_grad():
        assert torch.equal(compiled(ids), model(ids))
