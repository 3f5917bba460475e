"""S2T Transformer (https://arxiv.org/abs/1911.08460), speech recognition and translation from filter banks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lading.families.config_json import ConfigReader, ConfigTable, Field, KeyGroup
from lading.families.encoder_decoder_family import (
    CHANGES_EACH,
    NOT_READ,
    encoder_decoder_entries,
    encoder_decoder_family,
    encoder_decoder_rules,
)
from lading.families.nn.checks import shared_fields
from lading.families.nn.encoder_decoder_spec import FILTER_DIM, FILTER_KERNELS, EncoderDecoderSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred

if TYPE_CHECKING:
    from lading.families.nn.encoder_decoder import S2TTransformer as S2TTransformer
else:
    __getattr__ = deferred(globals(), S2TTransformer="lading.families.nn.encoder_decoder")


@dataclass(kw_only=True)
class S2TTransformerConfig:
    """The configuration of an S2T Transformer; the defaults are those of the medium one."""

    model_dim: int = 512
    """The width of the model."""

    max_source_seq_len: int = 1024
    """The longest source, in frames of four filter banks."""

    num_fbank_channels: int = 80
    """The number of channels of the filter banks."""

    max_target_seq_len: int = 1024
    """The longest target, in tokens."""

    target_vocab_size: int = 10_000
    """The number of symbols."""

    pad_idx: int = 1
    """The index of the symbol for padding."""

    num_encoder_layers: int = 12
    """The number of encoder layers."""

    num_decoder_layers: int = 6
    """The number of decoder layers."""

    num_encoder_attn_heads: int = 8
    """The number of attention heads in encoder layers."""

    num_decoder_attn_heads: int = 8
    """The number of attention heads in decoder layers."""

    ffn_inner_dim: int = 2048
    """The inner width of the feed-forward networks."""

    dropout_p: float = 0.15
    """The dropout probability of the inputs of both stacks, of attention weights, and inside feed-forward networks."""

    tied_embeddings: bool = False
    """True if the output projection is the embedding table."""

    first_source_position: int = 0
    """The position of the first frame. fairseq and transformers count from 2, fairseq2 from 0."""


def _spec(config: S2TTransformerConfig) -> EncoderDecoderSpec:
    return EncoderDecoderSpec(
        **shared_fields(EncoderDecoderSpec, config) | {"dropout_p": 0.0},
        vocab_size=config.target_vocab_size,
        input_dropout_p=config.dropout_p,
        attn_dropout_p=config.dropout_p,
        ffn_inner_dropout_p=config.dropout_p,
    )


def _rules(config: S2TTransformerConfig) -> Sequence[Rule]:
    return encoder_decoder_rules(
        Rule("encoder_frontend.feature_extractor.layers.{n}.conv.{p*}", "model.encoder.conv.conv_layers.{n}.{p}"),
        Rule("encoder.subsample.{p*}", "model.encoder.conv.{p}"),
        Rule("encoder.transformer_layers.{p*}", "model.encoder.layers.{p}"),
    )


def _positions_of_transformers(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"first_source_position": 2}


CONFIG_JSON = ConfigTable(
    family="s2t_transformer",
    model_type="speech_to_text",
    architecture="Speech2TextForConditionalGeneration",
    config_kls=S2TTransformerConfig,
    spec=_spec,
    entries=(
        *encoder_decoder_entries(layers=(12, 6), heads=4, model_dim=256, inner=2048),
        Field("max_source_seq_len", "max_source_positions", ConfigReader.count, 6000),
        Field("max_target_seq_len", "max_target_positions", ConfigReader.count, 1024),
        Field("num_fbank_channels", "input_feat_per_channel", ConfigReader.count, 80),
        Field("target_vocab_size", "vocab_size", ConfigReader.count, 10_000),
        Field("tied_embeddings", "tie_word_embeddings", ConfigReader.flag, True),
        KeyGroup((), _positions_of_transformers, lambda config: {}),
    ),
    required={
        **CHANGES_EACH,
        "input_channels": 1,
        "num_conv_layers": len(FILTER_KERNELS),
        "conv_kernel_sizes": list(FILTER_KERNELS),
        "conv_channels": FILTER_DIM,
    },
    ignored=NOT_READ,
)
"""The keys of ``config.json``."""


FAMILY: Family[S2TTransformer, S2TTransformerConfig] = encoder_decoder_family(
    CONFIG_JSON, "lading.families.nn.encoder_decoder:S2TTransformer", _spec, rules=_rules
)

get_s2t_transformer_model_hub: ModelHubAccessor[S2TTransformer, S2TTransformerConfig] = ModelHubAccessor(
    "s2t_transformer", FAMILY.kls, S2TTransformerConfig
)
