from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.families import gemma3, olmo
from lading.families.gemma3 import Gemma3Config
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.rope_scaling import LinearScaling, YaRNScaling
from lading.families.olmo import OLMOConfig, YaRNScaleConfig
from lading.models.family import Family, get_family

OLMO_2_7B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "eos_token_id": 100257,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pad_token_id": 100277,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
OLMO_3_7B = OLMO_2_7B | {
    "architectures": ["Olmo3ForCausalLM"],
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
    "max_position_embeddings": 65536,
    "model_type": "olmo3",
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "sliding_window": 4096,
    "vocab_size": 100278,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}

each = pytest.mark.parametrize("family", [olmo.FAMILY, gemma3.FAMILY], ids=lambda family: family.name)


def spec_of(family: Family[Any, Any], config: Any) -> DecoderSpec:
    with torch.device("meta"):
        spec: DecoderSpec = family.build(config).spec

    return spec


@each
def test_it_is_registered(family: Family[Any, Any]) -> None:
    assert get_family(family.name) is family


def test_olmo_2() -> None:
    assert olmo.FAMILY.from_hf(OLMO_2_7B) == OLMOConfig(
        model_dim=4096,
        num_layers=32,
        num_attn_heads=32,
        num_key_value_heads=32,
        ffn_inner_dim=11_008,
        eos_token_id=None,
    )


def test_olmo_3() -> None:
    found = olmo.FAMILY.from_hf(OLMO_3_7B)

    assert found.yarn_scale_config == YaRNScaleConfig(mscale=0.0, amplitude=1.2079441541679836)
    spec = spec_of(olmo.FAMILY, found)
    # The pattern, and the amplitude, follow from the fields of fairseq2's configuration, too.
    again = replace(found, layer_types=None, yarn_scale_config=YaRNScaleConfig())
    assert spec_of(olmo.FAMILY, again) == spec
    assert [spec.window_of(i) for i in range(5)] == [4096, 4096, 4096, None, 4096]
    assert isinstance(spec.rope_scaling, YaRNScaling)
    assert spec.window_rope_theta == 500_000.0


def test_frequencies_may_be_scaled_in_all_layers() -> None:
    config = OLMOConfig(sliding_window=8, yarn_scale_config=YaRNScaleConfig())

    assert spec_of(olmo.FAMILY, config).window_rope_theta == 500_000.0
    assert spec_of(olmo.FAMILY, replace(config, yarn_in_all_layers=True)).window_rope_theta is None
    assert spec_of(olmo.FAMILY, replace(config, sliding_window=None)).window_rope_theta is None


def test_the_last_layer_has_no_window() -> None:
    spec = spec_of(olmo.FAMILY, OLMOConfig(num_layers=6, sliding_window=8))

    assert [spec.window_of(i) for i in range(6)] == [8, 8, 8, None, 8, None]


def test_amplitudes() -> None:
    def amplitude(**fields: Any) -> float:
        scaling = spec_of(olmo.FAMILY, OLMOConfig(yarn_scale_config=YaRNScaleConfig(**fields))).rope_scaling
        assert isinstance(scaling, YaRNScaling)
        return scaling.amplitude

    assert amplitude() == amplitude(mscale=0.7) == pytest.approx(1.2079441541679836)
    assert amplitude(mscale=0.7, mscale_all_dim=0.7) == 1.0
    assert amplitude(amplitude=1.5, mscale=0.7, mscale_all_dim=0.4) == 1.5


def test_gemma_3() -> None:
    found = gemma3.FAMILY.from_hf(GEMMA_3_1B)

    types = [*(["sliding_attention"] * 5 + ["full_attention"]) * 4, "sliding_attention", "sliding_attention"]
    assert found == Gemma3Config(layer_types=types)
    spec = spec_of(gemma3.FAMILY, found)
    assert spec == spec_of(gemma3.FAMILY, Gemma3Config())
    assert (spec.attn_scale, spec.embed_scale, spec.window_rope_theta) == (1 / 16, 1152**0.5, 10_000.0)
    assert [spec.window_of(i) for i in (0, 4, 5, 6, 25)] == [512, 512, None, 512, 512]

    scaled = gemma3.FAMILY.from_hf(GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert spec_of(gemma3.FAMILY, scaled).rope_scaling == LinearScaling(factor=8.0)


@pytest.mark.parametrize(
    ("family", "file", "parameters"),
    [
        (olmo.FAMILY, OLMO_2_7B, 7_298_617_344),
        (olmo.FAMILY, OLMO_3_7B, 7_298_011_136),
        (gemma3.FAMILY, GEMMA_3_1B, 999_885_952),
    ],
    ids=["olmo2", "olmo3", "gemma3"],
)
def test_numbers_of_parameters(family: Family[Any, Any], file: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = family.build(family.from_hf(file))

    assert isinstance(model, family.model_kls)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        (olmo.FAMILY, OLMO_2_7B | {"attention_bias": True}, "attention_bias is True"),
        (olmo.FAMILY, OLMO_2_7B | {"head_dim": 64}, "head_dim is 64"),
        (olmo.FAMILY, OLMO_2_7B | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (olmo.FAMILY, OLMO_2_7B | {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        (olmo.FAMILY, OLMO_3_7B | {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling.rope_type is 'llama3'"),
        (olmo.FAMILY, OLMO_3_7B | {"sliding_window": None}, "sliding_window is None"),
        (olmo.FAMILY, OLMO_3_7B | {"layer_types": ["chunked_attention"] * 32}, "layer_types is"),
        (olmo.FAMILY, OLMO_3_7B | {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is"),
        (
            olmo.FAMILY,
            OLMO_3_7B | {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope_parameters.sliding_attention.rope_type is 'yarn'",
        ),
        (
            olmo.FAMILY,
            OLMO_3_7B | {"rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}},
            "rope_parameters is",
        ),
        (gemma3.FAMILY, GEMMA_3_1B | {"attention_bias": True}, "attention_bias is True"),
        (olmo.FAMILY, OLMO_3_7B | {"rope_theta": 77.0}, "rope_theta is 77.0"),
        (gemma3.FAMILY, GEMMA_3_1B | {"is_causal": False}, "is_causal is False"),
        (gemma3.FAMILY, {"text_config": GEMMA_3_1B | {"is_causal": False}}, "text_config.is_causal is False"),
        (gemma3.FAMILY, {"text_config": GEMMA_3_1B, "is_causal": False}, "is_causal is False"),
        (gemma3.FAMILY, {"text_config": GEMMA_3_1B, "tie_word_embeddings": False}, "tie_word_embeddings is False"),
        (gemma3.FAMILY, GEMMA_3_1B | {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (gemma3.FAMILY, GEMMA_3_1B | {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (gemma3.FAMILY, GEMMA_3_1B | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (gemma3.FAMILY, GEMMA_3_1B | {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (gemma3.FAMILY, GEMMA_3_1B | {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        (gemma3.FAMILY, GEMMA_3_1B | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (gemma3.FAMILY, GEMMA_3_1B | {"quantization_config": {"quant_method": "awq"}}, "quant_method is 'awq'"),
    ],
)
def test_what_would_change_the_result_is_refused(family: Family[Any, Any], file: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupportedError, match=message):
        family.from_hf(file)


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        (olmo.FAMILY, OLMO_3_7B | {"layer_types": ["full_attention"]}, "`layer_types` must have one for each"),
        (olmo.FAMILY, OLMO_2_7B | {"num_key_value_heads": 5}, "num_key_value_heads"),
        (olmo.FAMILY, OLMO_3_7B | {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "factor"),
        (gemma3.FAMILY, GEMMA_3_1B | {"layer_types": ["full_attention"]}, "`layer_types` must have one for each"),
        (gemma3.FAMILY, GEMMA_3_1B | {"sliding_window": None}, "sliding_window is expected to be a positive integer"),
        (gemma3.FAMILY, GEMMA_3_1B | {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        (gemma3.FAMILY, GEMMA_3_1B | {"rope_theta": 0}, "rope_theta"),
        (gemma3.FAMILY, GEMMA_3_1B | {"rope_local_base_freq": 0}, "window_rope_theta"),
    ],
)
def test_nonsense(family: Family[Any, Any], file: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        family.from_hf(file)


def test_every_field_of_a_configuration_reaches_the_decoder() -> None:
    """A field that changes nothing is a field that is forgotten."""
    others: dict[str, Any] = {
        "pad_idx": 5,
        "dropout_p": 0.3,
        "rms_norm_eps": 0.25,
        "norm_eps": 0.25,
        "num_key_value_heads": 2,
        "sliding_window": 77,
        "layer_types": ["full_attention"] * 4,
        "yarn_scale_config": YaRNScaleConfig(scale_factor=3.0),
        "rope_factor": 3.0,
        "num_layers": 5,
    }
    # These are read by the family's `init`, or only kept.
    elsewhere = {"init_std", "init_std_scale", "shard_embed_dim", "bos_token_id", "eos_token_id"}
    olmo_config = OLMOConfig(num_layers=4, sliding_window=9, yarn_scale_config=YaRNScaleConfig())

    for family, base in ((olmo.FAMILY, olmo_config), (gemma3.FAMILY, Gemma3Config(num_layers=4))):
        before = spec_of(family, base)
        for name in asdict(base).keys() - elsewhere:
            value = getattr(base, name)
            changed = not value if isinstance(value, bool) else others.get(name) or value * 2
            assert spec_of(family, replace(base, **{name: changed})) != before, f"{family.name}: {name}"


@each
def test_random_weights(family: Family[Any, Any]) -> None:
    config = family.config_kls(
        model_dim=64,
        vocab_size=200,
        pad_idx=0,
        num_layers=2,
        num_attn_heads=4,
        num_key_value_heads=2,
        ffn_inner_dim=96,
        init_std=0.01,
    )
    model = family.build(config)

    for name, parameter in model.named_parameters():
        family.init(model, config, name, parameter)

    divisor = 2**0.5 if family is olmo.FAMILY else 1.0
    first = model.model.layers[0].mlp.up_proj.weight
    assert float(first.detach().std()) == pytest.approx(0.987 * 0.01 / divisor, rel=0.1)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.987 * 0.01, rel=0.1)
    # Norms do nothing at first.
    x = torch.randn(3, 64)
    torch.testing.assert_close(model.model.norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
