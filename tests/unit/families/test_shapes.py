"""The shapes that families state without building a module, which are those of the module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lading.catalog.store import get_asset_store
from lading.errors import ModelConfigError
from lading.families.bert import BertConfig
from lading.families.deepseek import DeepSeekConfig
from lading.families.gemma3 import Gemma3Config
from lading.families.gemma3n import Gemma3nConfig
from lading.families.jepa import JepaConfig, JepaEncoderConfig
from lading.families.jepa_classifier import JepaClassifierConfig
from lading.families.llama import LLaMAConfig
from lading.families.llama4 import Llama4Config, Llama4ExpertsConfig
from lading.families.mistral import MistralConfig
from lading.families.mixtral import MixtralConfig
from lading.families.nllb import NllbConfig
from lading.families.olmo import OLMOConfig
from lading.families.qwen import QwenConfig
from lading.families.qwen3_moe import Qwen3MoEConfig
from lading.families.s2t_transformer import S2TTransformerConfig
from lading.families.wav2vec2 import Wav2Vec2Config
from lading.families.wav2vec2_asr import Wav2Vec2AsrConfig
from lading.families.wav2vec2_encoder import Wav2Vec2EncoderConfig
from lading.models.construct import build_on_meta
from lading.models.family import get_family
from lading.models.resolve import arch_config, model_config
from lading.models.shapes import count_parameters, targets_of_config
from lading.models.targets import targets_of
from tests.helpers.native_families import NATIVE


def same(family: str, config: Any) -> None:
    built = targets_of(build_on_meta(get_family(family), config), dtype=None)
    assert targets_of_config(get_family(family), config) == built


@pytest.mark.parametrize("name", NATIVE)
def test_those_of_all_architectures_and_cards(name: str, home: Path) -> None:
    store = get_asset_store()
    family = get_family(name)
    configs = [arch_config(arch.name, family, store) for arch in store.architectures(name)]
    configs += [model_config(store.retrieve_card(card.name), family, store) for card in store.models(family=name)]
    assert configs
    seen: list[Any] = []
    for config in configs:
        if config not in seen:
            seen.append(config)
            same(name, config)


SMALL = {"model_dim": 48, "vocab_size": 99, "num_layers": 3, "num_attn_heads": 4, "ffn_inner_dim": 56}
STACKS: dict[str, Any] = {
    "model_dim": 48,
    "num_encoder_layers": 2,
    "num_decoder_layers": 3,
    "num_encoder_attn_heads": 4,
    "num_decoder_attn_heads": 6,
    "ffn_inner_dim": 56,
}
VISION = JepaEncoderConfig(model_dim=48, num_encoder_layers=2, num_encoder_attn_heads=4)
GEMMA_3N = Gemma3nConfig(
    **SMALL | {"num_layers": 4},
    num_key_value_heads=2,
    head_dim=8,
    altup_hidden_dim=40,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=90,
    hidden_size_per_layer_input=6,
)
ENCODER = Wav2Vec2EncoderConfig(
    model_dim=48, num_encoder_layers=2, num_encoder_attn_heads=4, ffn_inner_dim=56, num_pos_conv_groups=4
)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", LLaMAConfig(**SMALL, num_key_value_heads=2)),
        ("llama4", Llama4Config(**SMALL, num_key_value_heads=2, nope_layer_interval=2, use_qk_norm=True)),
        ("llama4", Llama4Config(**SMALL, num_key_value_heads=2, experts=Llama4ExpertsConfig(num_experts=3, top_k=2))),
        ("mistral", MistralConfig(**SMALL, num_key_value_heads=1)),
        ("qwen", QwenConfig(**SMALL, num_key_value_heads=2, head_dim=16)),
        ("qwen", QwenConfig(**SMALL, num_key_value_heads=4, qkv_proj_bias=False, q_norm=True, k_norm=True)),
        ("qwen", QwenConfig(**SMALL, num_key_value_heads=4, k_norm=True)),
        ("olmo", OLMOConfig(**SMALL, num_key_value_heads=2, pad_idx=1)),
        ("gemma3", Gemma3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
        ("mixtral", MixtralConfig(**SMALL, num_key_value_heads=2, num_experts=3)),
        ("deepseek", DeepSeekConfig(**SMALL, num_key_value_heads=4, attn_bias=True)),
        ("deepseek", DeepSeekConfig(**SMALL, num_key_value_heads=4, query_rank=None, num_dense_layers=1)),
        ("qwen3_moe", Qwen3MoEConfig(**SMALL, num_experts=9, expert_inner_dim=20, dense_layers=[0])),
        ("qwen3_moe", Qwen3MoEConfig(**SMALL, num_experts=9, moe_layer_step=4)),
        ("gemma3n", GEMMA_3N),
        ("gemma3n", replace(GEMMA_3N, num_kv_shared_layers=0, altup_num_inputs=1, ffn_inner_dims=[8, 24, 16, 8])),
    ],
    ids=[
        "llama",
        "llama4",
        "llama4-two-experts",
        "mistral",
        "qwen2.5",
        "qwen3",
        "qwen-k",
        "olmo",
        "gemma3",
        "mixtral",
        "deepseek-dense",
        "deepseek",
        "qwen3-moe",
        "no-experts",
        "gemma3n",
        "gemma3n-widths",
    ],
)
def test_those_of_decoders(family: str, config: Any, tied: bool) -> None:
    same(family, replace(config, tied_embeddings=tied))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", BertConfig(**SMALL, type_vocab_size=3, max_seq_len=17, pooler=False)),
        ("bert", BertConfig(**SMALL)),
        ("wav2vec2", Wav2Vec2Config(encoder_config=ENCODER, final_dim=24, quantized_dim=36, num_codebooks=3)),
        ("wav2vec2", Wav2Vec2Config(encoder_config=ENCODER, final_proj_bias=False)),
        (
            "wav2vec2",
            Wav2Vec2Config(
                encoder_config=replace(
                    ENCODER,
                    norm_order="PRE",
                    feature_extractor_bias=True,
                    feature_extractor_layer_norm_convs=True,
                    feature_extractor_layer_descs=[(20, 10, 5), (48, 3, 2)],
                    feature_dim=48,
                )
            ),
        ),
        ("wav2vec2_asr", Wav2Vec2AsrConfig(encoder_config=ENCODER, use_masking=False, target_vocab_size=7)),
        (
            "wav2vec2_asr",
            Wav2Vec2AsrConfig(
                encoder_config=replace(
                    ENCODER,
                    use_fbank=True,
                    num_fbank_channels=10,
                    fbank_stride=2,
                    feature_dim=20,
                    norm_order="PRE",
                    layer_norm_features=False,
                )
            ),
        ),
        ("wav2vec2_asr", Wav2Vec2AsrConfig(encoder_config=replace(ENCODER, layer_norm_features=False))),
        ("nllb", NllbConfig(**STACKS, vocab_size=99)),
        ("s2t_transformer", S2TTransformerConfig(**STACKS, target_vocab_size=99, num_fbank_channels=7)),
        ("s2t_transformer", S2TTransformerConfig(**STACKS, target_vocab_size=99, tied_embeddings=True)),
        ("jepa", JepaConfig(encoder_config=replace(VISION, qkv_bias=False, learned_positions=True))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(4, 32, 48), patch_dims=(2, 16, 16)))),
        ("jepa_classifier", JepaClassifierConfig(encoder_config=VISION, num_classes=7, num_queries=2)),
        ("jepa_classifier", JepaClassifierConfig(encoder_config=VISION, pool_depth=3, decoder_projection=False)),
    ],
)
def test_those_of_encoders(family: str, config: Any) -> None:
    same(family, config)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen", QwenConfig(num_attn_heads=3, num_key_value_heads=2)),
        ("llama4", Llama4Config(nope_layer_interval=0)),
        ("llama4", Llama4Config(attention_chunk_size=-1)),
        ("llama4", Llama4Config(attn_temperature_floor=0)),
        ("llama4", Llama4Config(experts=Llama4ExpertsConfig(interleave_moe_layer_step=0))),
        ("llama4", Llama4Config(experts=Llama4ExpertsConfig(use_shared_expert=False, capacity_factor=0.0))),
        ("qwen3_moe", Qwen3MoEConfig(num_experts=7)),
        ("qwen3_moe", Qwen3MoEConfig(moe_layer_step=0)),
        ("mixtral", MixtralConfig(top_k=0)),
        ("deepseek", DeepSeekConfig(num_key_value_heads=1)),
        ("deepseek", DeepSeekConfig(rotary_dim=63)),
        ("gemma3n", replace(GEMMA_3N, altup_active_idx=4)),
        ("gemma3n", replace(GEMMA_3N, num_kv_shared_layers=3)),
        ("bert", BertConfig(model_dim=10, num_attn_heads=3)),
        ("wav2vec2", Wav2Vec2Config(quantized_dim=5, num_codebooks=2)),
        ("wav2vec2", Wav2Vec2Config(final_dim=0)),
        ("wav2vec2", Wav2Vec2Config(max_temporal_mask_prob=0.0)),
        ("wav2vec2_asr", Wav2Vec2AsrConfig(target_vocab_size=0)),
        ("wav2vec2_asr", Wav2Vec2AsrConfig(max_spatial_mask_prob=2.0)),
        ("nllb", NllbConfig(num_decoder_attn_heads=3)),
        ("nllb", NllbConfig(pad_idx=-1)),
        ("nllb", NllbConfig(model_dim=2, num_encoder_attn_heads=1, num_decoder_attn_heads=1)),
        ("nllb", NllbConfig(num_decoder_layers=0)),
        ("s2t_transformer", S2TTransformerConfig(num_fbank_channels=0)),
        ("s2t_transformer", S2TTransformerConfig(first_source_position=-1)),
        ("jepa", JepaConfig(encoder_config=replace(VISION, patch_dims=(2, 16, 16)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(224,), patch_dims=(16,)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, patch_dims=(16, 0)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(16, 15)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(2**31, 16)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, input_dims=(2**20, 2**20), patch_dims=(1, 1)))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, model_dim=3, num_encoder_attn_heads=1))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, ffn_inner_dim_ratio=0.0))),
        ("jepa", JepaConfig(encoder_config=replace(VISION, ffn_inner_dim_ratio=float("nan")))),
        ("jepa_classifier", JepaClassifierConfig(num_classes=0)),
        ("jepa_classifier", JepaClassifierConfig(pool_depth=10**5)),
    ],
)
def test_a_configuration_of_no_model_is_refused_with_the_same_words(family: str, config: Any) -> None:
    with pytest.raises(ModelConfigError) as built:
        build_on_meta(get_family(family), config)
    with pytest.raises(ModelConfigError) as stated:
        targets_of_config(get_family(family), config)
    assert str(stated.value) == str(built.value)


def test_another_configuration_class_is_refused() -> None:
    with pytest.raises(TypeError, match="QwenConfig"):
        targets_of_config(get_family("qwen"), BertConfig())


def test_tied_parameters_count_once() -> None:
    untied = QwenConfig(**SMALL, num_key_value_heads=2)
    tied = replace(untied, tied_embeddings=True)
    family = get_family("qwen")
    assert count_parameters(family, untied) - count_parameters(family, tied) == 99 * 48
