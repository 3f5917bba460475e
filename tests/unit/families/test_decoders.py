from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from lading.errors import InternalError, ModelCheckpointMismatchError, NotSupportedError
from lading.families import llama, mistral, qwen
from lading.families.config_json import ConfigReader
from lading.families.llama import LLaMAConfig, LLaMARoPEScaleConfig
from lading.families.mistral import MistralConfig
from lading.families.name_rules import DECODER_RULES
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.qwen import QwenConfig
from lading.models.family import Family, get_family
from lading.planning.rules import route

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}

QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

MISTRAL_7B_V0_1 = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}

PUBLISHED: dict[str, tuple[Family[Any, Any], dict[str, Any]]] = {
    "llama": (llama.FAMILY, LLAMA_3_2_1B),
    "qwen2": (qwen.FAMILY, QWEN_2_5_7B),
    "qwen3": (qwen.FAMILY, QWEN_3_0_6B),
    "mistral": (mistral.FAMILY, MISTRAL_7B_V0_1),
}

each = pytest.mark.parametrize(("family", "file"), PUBLISHED.values(), ids=PUBLISHED.keys())


def spec_of(family: Family[Any, Any], config: Any) -> DecoderSpec:
    with torch.device("meta"):
        spec: DecoderSpec = family.build(config).spec

    return spec


@pytest.mark.parametrize("family", [llama.FAMILY, qwen.FAMILY, mistral.FAMILY], ids=lambda family: family.name)
def test_it_is_registered(family: Family[Any, Any]) -> None:
    assert get_family(family.name) is family


# --- what published files mean


def test_llama_3_2() -> None:
    assert llama.FAMILY.from_hf(LLAMA_3_2_1B) == LLaMAConfig(
        model_dim=2048,
        max_seq_len=131_072,
        vocab_size=128_256,
        tied_embeddings=True,
        num_layers=16,
        num_attn_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        ffn_inner_dim=8192,
        ffn_inner_dim_scale=1.0,
        ffn_inner_dim_multiple_of=1,
        rope_theta=500_000.0,
        use_scaled_rope=True,
        rope_scale=LLaMARoPEScaleConfig(factor=32.0),
    )


def test_qwen_2_5() -> None:
    assert qwen.FAMILY.from_hf(QWEN_2_5_7B) == QwenConfig(max_seq_len=131_072)


def test_qwen_3() -> None:
    assert qwen.FAMILY.from_hf(QWEN_3_0_6B) == QwenConfig(
        model_dim=1024,
        max_seq_len=40_960,
        vocab_size=151_936,
        tied_embeddings=True,
        num_attn_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        qkv_proj_bias=False,
        q_norm=True,
        k_norm=True,
        ffn_inner_dim=3072,
    )


def test_mistral() -> None:
    assert mistral.FAMILY.from_hf(MISTRAL_7B_V0_1) == MistralConfig(max_seq_len=32_768)
    # The second version gave up the window.
    second = MISTRAL_7B_V0_1 | {"sliding_window": None, "rope_theta": 1e6}
    assert mistral.FAMILY.from_hf(second) == MistralConfig(max_seq_len=32_768, attn_window_len=None, rope_theta=1e6)


@each
def test_the_new_spelling_of_rotary_parameters(family: Family[Any, Any], file: dict[str, Any]) -> None:
    parameters = (file.get("rope_scaling") or {"rope_type": "default"}) | {"rope_theta": file["rope_theta"]}
    new = {k: v for k, v in file.items() if k not in {"rope_theta", "rope_scaling"}} | {"rope_parameters": parameters}

    assert family.from_hf(new) == family.from_hf(file)


def test_the_oldest_spelling_of_the_scaling_type() -> None:
    scaling = dict(LLAMA_3_2_1B["rope_scaling"])
    scaling["type"] = scaling.pop("rope_type")

    assert llama.FAMILY.from_hf(LLAMA_3_2_1B | {"rope_scaling": scaling}) == llama.FAMILY.from_hf(LLAMA_3_2_1B)


def test_the_context_of_the_first_training_is_the_longest_sequence_unless_said() -> None:
    scaling = {k: v for k, v in LLAMA_3_2_1B["rope_scaling"].items() if k != "original_max_position_embeddings"}

    config = llama.FAMILY.from_hf(LLAMA_3_2_1B | {"rope_scaling": scaling})

    assert config.rope_scale.original_context_length == 131_072


def test_biases_of_llama() -> None:
    config = llama.FAMILY.from_hf(LLAMA_3_2_1B | {"attention_bias": True, "mlp_bias": True})

    assert (config.qkv_proj_bias, config.output_proj_bias, config.ffn_bias) == (True, True, True)


@pytest.mark.parametrize(("pad", "expected"), [(None, None), (-1, None), (0, 0), (128_004, 128_004)])
def test_the_padding_symbol(pad: int | None, expected: int | None) -> None:
    assert llama.FAMILY.from_hf(LLAMA_3_2_1B | {"pad_token_id": pad}).pad_idx == expected


@pytest.mark.parametrize("file", [QWEN_2_5_7B, QWEN_3_0_6B], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, (None, 0)),
        ({"sliding_window": 16, "max_window_layers": 21}, (16, 21)),
        ({"sliding_window": 16, "max_window_layers": 0}, (16, 0)),
        ({"sliding_window": 16, "max_window_layers": 28}, (None, 0)),
        ({"sliding_window": None, "max_window_layers": 0}, (None, 0)),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 28}, (None, 0)),
        ({"sliding_window": 16, "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 25}, (16, 3)),
    ],
)
def test_windows_of_qwen(file: dict[str, Any], changes: dict[str, Any], expected: tuple[int | None, int]) -> None:
    config = qwen.FAMILY.from_hf(file | {"use_sliding_window": True} | changes)

    assert (config.attn_window_len, config.num_full_attn_layers) == expected


# --- what is refused


@each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method is 'fp8'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type is 'linear'"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "longrope"}},
            "rope_parameters.rope_type is 'longrope'",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters.full_attention is",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "rope_parameters.partial_rotary_factor is 0.25",
        ),
        ({"is_causal": False}, "is_causal is False"),
    ],
)
def test_what_would_change_the_result_is_refused(
    family: Family[Any, Any], file: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotSupportedError, match=message):
        family.from_hf(file | changes)


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        (
            qwen.FAMILY,
            QWEN_2_5_7B | {"rope_scaling": LLAMA_3_2_1B["rope_scaling"]},
            r"rope_type is 'llama3'.*qwen.*supports 'default'\)",
        ),
        (
            mistral.FAMILY,
            MISTRAL_7B_V0_1 | {"rope_scaling": LLAMA_3_2_1B["rope_scaling"]},
            r"rope_type is 'llama3'.*mistral",
        ),
        (qwen.FAMILY, QWEN_3_0_6B | {"attention_bias": True}, "attention_bias is True"),
        (
            qwen.FAMILY,
            QWEN_3_0_6B
            | {"use_sliding_window": True, "sliding_window": 8}
            | {"layer_types": ["sliding_attention", "full_attention"] * 14},
            "layer_types is",
        ),
        (qwen.FAMILY, QWEN_3_0_6B | {"layer_types": ["sliding_attention"] * 28}, "layer_types is"),
        (qwen.FAMILY, QWEN_3_0_6B | {"layer_types": ["full_attention"] * 27}, "layer_types is"),
        (mistral.FAMILY, MISTRAL_7B_V0_1 | {"layer_types": ["full_attention"] * 32}, "layer_types is"),
    ],
)
def test_what_one_family_does_not_do(family: Family[Any, Any], file: dict[str, Any], message: str) -> None:
    with pytest.raises(NotSupportedError, match=message):
        family.from_hf(file)


@each
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is expected to be a positive integer, but is 0"),
        ({"hidden_size": 1024.0}, "hidden_size is expected to be a positive integer, but is 1024.0"),
        ({"hidden_size": None}, "hidden_size is expected to be a positive integer, but is None"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is expected to be a number of layers, at most 10000"),
        ({"num_hidden_layers": True}, "num_hidden_layers is expected to be a positive integer, but is True"),
        ({"num_attention_heads": 7}, "multiple of `num_key_value_heads`"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is expected to be a finite number"),
        ({"rms_norm_eps": 0}, "`norm_eps`"),
        ({"rope_theta": float("inf")}, "rope_theta is expected to be a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is expected to be true or false, but is 'yes'"),
        ({"rope_scaling": "llama3"}, "rope_scaling is expected to be an object, but is 'llama3'"),
        ({"hidden_act": 3}, "hidden_act is expected to be a string, but is 3"),
        ({"head_dim": 63}, "even"),
        ({"head_dim": -8}, "head_dim is expected to be a positive integer, but is -8"),
    ],
)
def test_nonsense(family: Family[Any, Any], file: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        family.from_hf(file | changes)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": None}, "rope_scaling.factor is expected to be a finite number that is not negative, but is None"),
        ({"high_freq_factor": 0.5}, "0 < low <= high"),
        ({"original_max_position_embeddings": "8k"}, "rope_scaling.original_max_position_embeddings is expected"),
    ],
)
def test_nonsense_in_the_scaling(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=message):
        llama.FAMILY.from_hf(LLAMA_3_2_1B | {"rope_scaling": LLAMA_3_2_1B["rope_scaling"] | scaling})


def test_a_scaling_without_its_factor() -> None:
    with pytest.raises(ModelCheckpointMismatchError, match=r"rope_scaling\.factor .* but is missing"):
        llama.FAMILY.from_hf(LLAMA_3_2_1B | {"rope_scaling": {"rope_type": "llama3"}})


# --- what configurations build


@pytest.mark.parametrize(
    ("model_dim", "inner_dim", "multiplier", "multiple_of", "published"),
    [
        (4096, 4096 * 4, 1.0, 256, 11_008),  # LLaMA 7B, LLaMA 2 7B
        (5120, 5120 * 4, 1.0, 256, 13_824),  # LLaMA 13B, LLaMA 2 13B
        (6656, 6656 * 4, 1.0, 256, 17_920),  # LLaMA 33B
        (8192, 8192 * 4, 1.0, 256, 22_016),  # LLaMA 65B
        (8192, 8192 * 4, 1.3, 4096, 28_672),  # LLaMA 2 70B, LLaMA 3 70B
        (4096, 4096 * 4, 1.3, 1024, 14_336),  # LLaMA 3 8B
        (3072, 3072 * 4, 1.0, 256, 8192),  # LLaMA 3.2 3B
        (2048, 2048 * 4, 1.5, 256, 8192),  # LLaMA 3.2 1B
    ],
)
def test_inner_widths_are_the_published_ones(
    model_dim: int, inner_dim: int, multiplier: float, multiple_of: int, published: int
) -> None:
    config = LLaMAConfig(
        model_dim=model_dim,
        ffn_inner_dim=inner_dim,
        ffn_inner_dim_multiplier=multiplier,
        ffn_inner_dim_multiple_of=multiple_of,
    )

    assert config.gated_inner_dim() == published


def test_an_inner_width_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="ffn_inner_dim_multiple_of"):
        llama.FAMILY.build(LLaMAConfig(ffn_inner_dim_multiple_of=0))


@pytest.mark.parametrize(
    ("family", "file", "parameters"),
    [
        (llama.FAMILY, LLAMA_3_2_1B, 1_235_814_400),
        (qwen.FAMILY, QWEN_2_5_7B, 7_615_616_512),
        (qwen.FAMILY, QWEN_3_0_6B, 596_049_920),
        (mistral.FAMILY, MISTRAL_7B_V0_1, 7_241_732_096),
    ],
    ids=PUBLISHED.keys(),
)
def test_numbers_of_parameters_are_the_published_ones(
    family: Family[Any, Any], file: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        model = family.build(family.from_hf(file))

    assert isinstance(model, family.model_kls)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_every_field_of_a_configuration_reaches_the_decoder() -> None:
    """A field that changes nothing is a field that is forgotten."""
    others: dict[str, Any] = {
        "pad_idx": 5,
        "attn_window_len": 77,
        "head_dim": 96,
        "dropout_p": 0.3,
        "norm_eps": 0.25,
        "rope_theta": 33.0,
        "ffn_inner_dim_scale": 0.5,
        "ffn_inner_dim_multiplier": 3.0,
        "num_key_value_heads": 1,
        "rope_scale": LLaMARoPEScaleConfig(factor=3.0),
        "num_full_attn_layers": 3,
    }
    # The first are read by the family's `init`; the last is kept for the cards that state it.
    elsewhere = {"init_std", "init_std_scale", "shard_embed_dim"}

    for family in (llama.FAMILY, qwen.FAMILY, mistral.FAMILY):
        base = family.config_kls(**({"use_scaled_rope": True} if family is llama.FAMILY else {}))
        before = spec_of(family, base)
        for name, value in asdict(base).items():
            if name in elsewhere:
                continue
            changed = not value if isinstance(value, bool) else others.get(name) or value * 2
            config = family.config_kls(**{"use_scaled_rope": True} if family is llama.FAMILY else {})
            setattr(config, name, changed)
            assert spec_of(family, config) != before, f"{family.name}: {name}"


@pytest.mark.parametrize("family", [llama.FAMILY, qwen.FAMILY, mistral.FAMILY], ids=lambda family: family.name)
def test_random_weights(family: Family[Any, Any]) -> None:
    config = family.config_kls(
        model_dim=64, vocab_size=200, num_layers=2, num_attn_heads=4, num_key_value_heads=2, ffn_inner_dim=96
    )
    config.init_std = 0.01
    model = family.build(config)

    for name, parameter in model.named_parameters():
        family.init(model, config, name, parameter)

    # LLaMA narrows by the depth of the layer, the others by that of the stack.
    divisor = {"llama": (2 * 1) ** 0.5}.get(family.name, (2 * 3) ** 0.5)
    first = model.model.layers[0].mlp.up_proj.weight
    assert float(first.detach().std()) == pytest.approx(0.987 * 0.01 / divisor, rel=0.1)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.987 * 0.01, rel=0.1)


# --- names of checkpoints


def small(tied: bool) -> tuple[QwenConfig, list[str], dict[str, str]]:
    config = QwenConfig(
        model_dim=16,
        vocab_size=20,
        num_layers=12,
        num_attn_heads=2,
        num_key_value_heads=1,
        ffn_inner_dim=24,
        tied_embeddings=tied,
    )
    names = list(qwen.FAMILY.build(config).state_dict())

    return (
        config,
        [n for n in names if not (tied and n == "lm_head.weight")],
        ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {}),
    )


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "layers.11.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "rotary_emb.inv_freq",
]


@pytest.mark.parametrize("tied", [False, True])
def test_names_of_checkpoints(tied: bool) -> None:
    config, targets, aliases = small(tied)

    routed = route([*targets, *BUFFERS], targets, qwen.FAMILY.rules(config), aliases)

    assert (routed.missing, routed.unexpected, routed.clashes, routed.duplicates) == ((), (), (), ())
    assert list(routed.tensors) == list(range(len(targets)))


def test_names_without_the_prefix_of_the_model() -> None:
    config, targets, aliases = small(tied=True)
    names = [name.removeprefix("model.") for name in targets]

    routed = route([*names, *BUFFERS], targets, qwen.FAMILY.rules(config), aliases)

    assert (routed.missing, routed.unexpected, routed.clashes) == ((), (), ())


def test_a_checkpoint_without_its_head() -> None:
    config, targets, _ = small(tied=False)
    names = [name for name in targets if name != "lm_head.weight"]

    routed = route([*names, "score.weight"], targets, qwen.FAMILY.rules(config))

    assert routed.missing == ("lm_head.weight",)
    assert routed.unexpected == ("score.weight",)


@pytest.mark.parametrize("family", [llama.FAMILY, qwen.FAMILY, mistral.FAMILY], ids=lambda family: family.name)
def test_all_decoders_know_these_names(family: Family[Any, Any]) -> None:
    rules = family.rules(family.config_kls())
    assert tuple(rules[-len(DECODER_RULES) :]) == DECODER_RULES


# --- the one door


def test_the_length_of_the_first_training_may_stand_beside_the_scaling() -> None:
    scaling = {k: v for k, v in LLAMA_3_2_1B["rope_scaling"].items() if k != "original_max_position_embeddings"}
    for file in (
        LLAMA_3_2_1B | {"rope_scaling": scaling, "original_max_position_embeddings": 64},
        LLAMA_3_2_1B | {"original_max_position_embeddings": 64},  # which comes first, as in transformers
    ):
        assert llama.FAMILY.from_hf(file).rope_scale.original_context_length == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": None}, "is_causal is None"),
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}, "per_layer_config is"),
        ({"attention_chunk_size": 8}, "attention_chunk_size is 8"),
    ],
)
@each
def test_a_key_that_the_family_does_not_honor_is_refused(
    family: Family[Any, Any], file: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotSupportedError, match=rf"{message}.*get_hg_model_hub\(\)"):
        family.from_hf(file | changes)


def test_a_family_reads_no_key_that_is_not_in_its_table() -> None:
    reader = ConfigReader({}, "mistral", table=mistral.CONFIG_JSON)
    with pytest.raises(InternalError, match="'attention_bias'"):
        reader.flag("attention_bias", False)
