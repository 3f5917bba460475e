"""S2T Conformer (https://arxiv.org/abs/2005.08100), speech translation from filter banks, as fairseq trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import TYPE_CHECKING

from lading.families import conformer_names
from lading.families.encoder_decoder_family import encoder_decoder_rules
from lading.families.nn.checks import shared_fields
from lading.families.nn.s2t_conformer_spec import S2TConformerSpec, s2t_conformer_plan
from lading.families.nn.speech_spec import LayerSpec
from lading.models.accessor import ModelHubAccessor
from lading.models.family import Family
from lading.planning.rules import Rule
from lading.system.deferred import deferred, deferred_call

if TYPE_CHECKING:
    from lading.families.nn.s2t_conformer import S2TConformer as S2TConformer
else:
    __getattr__ = deferred(globals(), S2TConformer="lading.families.nn.s2t_conformer")


@dataclass(kw_only=True)
class S2TConformerConfig:
    """The configuration of an S2T Conformer; the defaults are those of the medium one."""

    model_dim: int = 256
    """The width of the model."""

    max_source_seq_len: int = 6000
    """The longest source, in frames of four filter banks."""

    num_fbank_channels: int = 80
    """The number of channels of the filter banks."""

    max_target_seq_len: int = 1024
    """The longest target, in tokens."""

    target_vocab_size: int = 181
    """The number of symbols."""

    pad_idx: int = 1
    """The index of the symbol for padding."""

    use_relative_pos: bool = False
    """True if the encoder computes with distances between frames, false for sinusoidal positions."""

    num_encoder_layers: int = 12
    """The number of encoder layers."""

    num_decoder_layers: int = 6
    """The number of decoder layers."""

    num_encoder_attn_heads: int = 4
    """The number of attention heads in encoder layers."""

    num_decoder_attn_heads: int = 8
    """The number of attention heads in decoder layers."""

    depthwise_conv_kernel_size: int = 31
    """The kernel size of the convolutions of encoder layers, in frames."""

    ffn_inner_dim: int = 2048
    """The inner width of the feed-forward networks."""

    dropout_p: float = 0.1
    """The dropout probability of the inputs of both stacks, of attention weights, inside feed-forward networks, and of
    the outputs of the blocks of encoder layers."""

    first_source_position: int = 0
    """The position of the first frame. fairseq counts from 2, fairseq2 from 0."""


def _spec(config: S2TConformerConfig) -> S2TConformerSpec:
    dropouts = dict.fromkeys(("dropout_p", "ffn_inner_dropout_p", "attn_dropout_p"), config.dropout_p)
    conformer = LayerSpec(
        **shared_fields(LayerSpec, config) | dropouts,
        num_attn_heads=config.num_encoder_attn_heads,
        pos_encoder_type="relative" if config.use_relative_pos else "sinusoidal",
        norm_first=False,
        norm_eps=1e-5,
    )

    return S2TConformerSpec(
        **shared_fields(S2TConformerSpec, config) | dropouts | {"dropout_p": 0.0},
        vocab_size=config.target_vocab_size,
        tied_embeddings=False,
        input_dropout_p=config.dropout_p,
        conformer=conformer,
    )


def _rules(config: S2TConformerConfig) -> Sequence[Rule]:
    return encoder_decoder_rules(
        Rule("encoder_frontend.feature_extractor.layers.{n}.conv.{p*}", "model.encoder.conv.conv_layers.{n}.{p}"),
        Rule("encoder_frontend.proj.{p*}", "model.encoder.linear.{p}"),
        *_layer_rules("encoder.layers.{n}", conformer_names.FAIRSEQ2),
        Rule("encoder.subsample.{p*}", "model.encoder.conv.{p}"),
        *_layer_rules("encoder.conformer_layers.{n}", conformer_names.FAIRSEQ),
    )


def _layer_rules(layer: str, names: Mapping[str, str]) -> Iterator[Rule]:
    return starmap(Rule, conformer_names.in_layers(names, layer, "model.encoder.layers.{n}").items())


_create = deferred_call("lading.families.nn.s2t_conformer:S2TConformer")
_init = deferred_call("lading.families.nn.s2t_conformer:init_s2t_conformer")

FAMILY: Family[S2TConformer, S2TConformerConfig] = Family(
    name="s2t_conformer",
    kls="lading.families.nn.s2t_conformer:S2TConformer",
    config_kls=S2TConformerConfig,
    build=lambda config: _create(_spec(config)),
    init=lambda model, config, name, parameter: _init(model, name, parameter),
    shapes=lambda config: _spec(config).shapes(),
    rules=_rules,
    parallel_plan=lambda config: s2t_conformer_plan(_spec(config)),
)

get_s2t_conformer_model_hub: ModelHubAccessor[S2TConformer, S2TConformerConfig] = ModelHubAccessor(
    "s2t_conformer", FAMILY.kls, S2TConformerConfig
)
