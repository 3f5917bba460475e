"""The encoder of the wav2vec 2.0 families: its configuration, and its names in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from lading.errors import NotSupportedError
from lading.families import conformer_names
from lading.families.config_json import ConfigReader, Entries, Field, KeyGroup, keys_of, read_fields, same_for_all
from lading.families.nn.checks import shared_fields
from lading.families.nn.speech_spec import SpeechSpec
from lading.planning.composition import Regroup
from lading.planning.rules import Rule


@dataclass(kw_only=True)
class Wav2Vec2EncoderConfig:
    """The configuration of the encoder; the defaults are those of the base model."""

    model_dim: int = 768
    """The width of the model."""

    max_seq_len: int = 4096
    """The longest sequence, in frames, for relative and rotary positions. Convolutional ones have no limit."""

    feature_dim: int = 512
    """The width of a frame."""

    use_fbank: bool = False
    """True if the model reads log-mel filter banks instead of a waveform."""

    first_pass_dropout_p: float = 0.0
    """The dropout probability of frames, before masking and positions."""

    layer_norm_features: bool = True
    """True if frames are normalized after positions are added."""

    feature_extractor_layer_descs: list[tuple[int, int, int]] = field(
        default_factory=lambda: [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    )
    """The output dimension, kernel size and stride of each convolution over the waveform."""

    feature_extractor_bias: bool = False
    """True if these convolutions have biases."""

    feature_extractor_layer_norm_convs: bool = False
    """True for a layer normalization after each convolution, false for a group normalization after the first."""

    feature_grad_scale: float = 0.1
    """The factor of their gradient in training."""

    num_fbank_channels: int = 0
    """The number of channels of the filter banks."""

    fbank_stride: int = 0
    """The number of adjacent filter banks per frame."""

    sample_fbank_every_k: int = 0
    """The sampling of filter banks; only 0 and 1, which keep all of them, are supported."""

    pos_encoder_type: Literal["conv", "relative", "rotary"] = "conv"
    """The kind of positions: a convolution, embeddings of distances (https://arxiv.org/abs/1901.02860), or rotations
    (https://arxiv.org/abs/2104.09864)."""

    pos_encoder_depth: int = 1
    """The number of convolutions for positions. A single one has a normalized weight; of several, each normalizes its
    output, as in data2vec (https://arxiv.org/abs/2202.03555)."""

    pos_conv_kernel_size: int = 128
    """The kernel size of that convolution, in frames; several share it."""

    num_pos_conv_groups: int = 16
    """The number of groups of that convolution."""

    use_conformer: bool = False
    """True for Conformer layers (https://arxiv.org/abs/2005.08100), false for Transformer layers."""

    num_encoder_layers: int = 12
    """The number of layers."""

    num_encoder_attn_heads: int = 12
    """The number of attention heads."""

    ffn_inner_dim: int = 3072
    """The inner width of the feed-forward networks."""

    dropout_p: float = 0.1
    """The dropout probability of frames with positions, and of the outputs of attention and feed-forward blocks."""

    attn_dropout_p: float = 0.1
    """The dropout probability of the attention weights."""

    ffn_inner_dropout_p: float = 0.0
    """The dropout probability inside the feed-forward networks."""

    layer_drop_p: float = 0.05
    """The probability that a layer is skipped in training."""

    norm_order: Literal["POST", "PRE"] = "POST"
    """The position of normalizations: before each block, or after its residual is added."""

    depthwise_conv_kernel_size: int = 0
    """The kernel size of the convolutions of Conformer layers, in frames."""

    feature_projection: bool | None = None
    """True if frames are projected to the width of the model; ``None`` means if the widths differ."""

    norm_eps: float = 1e-5
    """The number that is added to the variance before taking its root."""

    init_std: float = 0.02
    """The standard deviation of the initial weights inside the layers."""


def encoder_spec(config: Wav2Vec2EncoderConfig, *, masked: bool) -> SpeechSpec:
    """Return the options of the encoder.

    :param masked: whether the model has an embedding for masked frames.

    :raises NotSupportedError: the configuration has sampled filter banks.
    :raises ValueError: the sizes are not valid.
    """
    if config.use_fbank and config.sample_fbank_every_k > 1:
        raise NotSupportedError(
            "The wav2vec 2.0 families use all filter banks, but the configuration's `sample_fbank_every_k` is "
            f"{config.sample_fbank_every_k}."
        )
    if config.use_fbank and min(config.num_fbank_channels, config.fbank_stride) < 1:
        raise ValueError(
            "`num_fbank_channels` and `fbank_stride` must be positive, but are "
            f"{config.num_fbank_channels} and {config.fbank_stride}"
        )

    project = config.feature_projection
    own = {
        "max_seq_len": None if config.pos_encoder_type == "conv" else config.max_seq_len,
        "depthwise_conv_kernel_size": config.depthwise_conv_kernel_size if config.use_conformer else None,
    }
    return SpeechSpec(
        **shared_fields(SpeechSpec, config) | own,
        fbank=(config.num_fbank_channels, config.fbank_stride) if config.use_fbank else None,
        project_features=config.feature_dim != config.model_dim if project is None else project,
        num_layers=config.num_encoder_layers,
        num_attn_heads=config.num_encoder_attn_heads,
        norm_first=config.norm_order == "PRE",
        masked=masked,
    )


# --- checkpoints -----------------------------------------------------------------------------------------------------

_CONV = "feature_extractor.conv_layers.{n}"
_POS_CONV = "encoder.pos_conv_embed.conv"
_LAYER = "encoder.layers.{n}"

_TRANSFORMER_FAIRSEQ2 = {
    **{f"self_attn.{name}_proj.{{p*}}": f"attention.{name}_proj.{{p}}" for name in "qkv"},
    "self_attn.output_proj.{p*}": "attention.out_proj.{p}",
    **{f"self_attn.{source}": f"attention.{target}" for source, target in conformer_names.RELATIVE.items()},
    "self_attn_layer_norm.{p*}": "layer_norm.{p}",
    "ffn.inner_proj.{p*}": "feed_forward.intermediate_dense.{p}",
    "ffn.output_proj.{p*}": "feed_forward.output_dense.{p}",
    "ffn_layer_norm.{p*}": "final_layer_norm.{p}",
}
_TRANSFORMER_FAIRSEQ = {
    "self_attn.{p*}": "attention.{p}",
    "self_attn_layer_norm.{p*}": "layer_norm.{p}",
    "fc1.{p*}": "feed_forward.intermediate_dense.{p}",
    "fc2.{p*}": "feed_forward.output_dense.{p}",
    "final_layer_norm.{p*}": "final_layer_norm.{p}",
}
"""The names of Transformer layers in checkpoints → those in lading, relative to the layer."""

_FAIRSEQ = {
    "mask_emb": "masked_spec_embed",
    f"{_CONV}.0.{{p*}}": f"{_CONV}.conv.{{p}}",
    f"{_CONV}.2.1.{{p*}}": f"{_CONV}.layer_norm.{{p}}",  # a layer normalization between two transpositions
    f"{_CONV}.2.{{p*}}": f"{_CONV}.layer_norm.{{p}}",
    "layer_norm.{p*}": "feature_projection.layer_norm.{p}",
    "post_extract_proj.{p*}": "feature_projection.projection.{p}",
    "encoder.pos_conv.0.weight_g": f"{_POS_CONV}.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": f"{_POS_CONV}.parametrizations.weight.original1",
    "encoder.pos_conv.0.bias": f"{_POS_CONV}.bias",
    "encoder.pos_conv.{n}.0.{p*}": "encoder.pos_conv_embed.layers.{n}.conv.{p}",
    "encoder.layer_norm.{p*}": "encoder.layer_norm.{p}",
}
"""The names outside layers in fairseq's checkpoints → those in lading, relative to the encoder."""

_FRONTEND = "encoder_frontend"
_FAIRSEQ2 = {
    "masker.temporal_mask_embed": "masked_spec_embed",
    f"{_FRONTEND}.feature_extractor.layers.{{n}}.conv.{{p*}}": f"{_CONV}.conv.{{p}}",
    f"{_FRONTEND}.feature_extractor.layers.{{n}}.group_norm.{{p*}}": f"{_CONV}.layer_norm.{{p}}",
    f"{_FRONTEND}.feature_extractor.layers.{{n}}.layer_norm.{{p*}}": f"{_CONV}.layer_norm.{{p}}",
    f"{_FRONTEND}.post_extract_layer_norm.{{p*}}": "feature_projection.layer_norm.{p}",
    f"{_FRONTEND}.model_dim_proj.{{p*}}": "feature_projection.projection.{p}",
    f"{_FRONTEND}.pos_encoder.conv.weight_g": f"{_POS_CONV}.parametrizations.weight.original0",
    f"{_FRONTEND}.pos_encoder.conv.weight_v": f"{_POS_CONV}.parametrizations.weight.original1",
    f"{_FRONTEND}.pos_encoder.conv.bias": f"{_POS_CONV}.bias",
    f"{_FRONTEND}.pos_encoder.layers.{{n}}.conv.{{p*}}": "encoder.pos_conv_embed.layers.{n}.conv.{p}",
}
"""The names outside layers in fairseq2's checkpoints → those in lading."""


def encoder_rules(config: Wav2Vec2EncoderConfig, *, masked: bool, fairseq_prefix: str = "") -> list[Rule]:
    """Return the rules for the encoder in checkpoints of fairseq, fairseq2 and old ones of Hugging Face.

    :param masked: whether the model has an embedding for masked frames.
    :param fairseq_prefix: the prefix of the encoder's names in fairseq's checkpoints.
    """
    # In post-norm models, fairseq2 puts the same normalization into the frontend.
    frontend_norm = "input_layer_norm" if config.norm_order == "PRE" else "layer_norm"
    layer_names = (
        (conformer_names.FAIRSEQ, conformer_names.FAIRSEQ2)
        if config.use_conformer
        else (_TRANSFORMER_FAIRSEQ, _TRANSFORMER_FAIRSEQ2)
    )
    layers, fairseq2_layers = (conformer_names.in_layers(names, _LAYER, _LAYER) for names in layer_names)
    fairseq = _FAIRSEQ | layers
    turned = None
    if config.pos_encoder_type == "rotary":
        # fairseq2's rotations turn neighboring channels, and fairseq's come before the projections.
        turned = Regroup(0, config.model_dim // config.num_encoder_attn_heads // 2, 2)
        fairseq = _FAIRSEQ

    rules = {
        f"wav2vec2.{_POS_CONV}.weight_g": f"{_POS_CONV}.parametrizations.weight.original0",
        f"wav2vec2.{_POS_CONV}.weight_v": f"{_POS_CONV}.parametrizations.weight.original1",
        "wav2vec2.masked_spec_embed": "masked_spec_embed",
        **_FAIRSEQ2,
        f"{_FRONTEND}.layer_norm.{{p*}}": f"encoder.{frontend_norm}.{{p}}",
        **fairseq2_layers,
        **fairseq,
        **{f"{fairseq_prefix}{source}": target for source, target in fairseq.items()},
    }
    unwanted = set() if masked else {"masked_spec_embed"}

    return [
        Rule(
            source,
            None if target in unwanted else f"wav2vec2.{target}",
            order=turned if target.endswith((".q_proj.{p}", ".k_proj.{p}")) else None,
        )
        for source, target in rules.items()
    ]


TRAINING_ONLY = ("feature_grad_scale", "masked")
"""The options of the encoder that ``config.json`` cannot express, and that affect only training."""


def _read_convolutions(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    dims = keys.counts("conv_dim", (512,) * 7)
    kernels = keys.counts("conv_kernel", (10, 3, 3, 3, 3, 2, 2))
    strides = keys.counts("conv_stride", (5, 2, 2, 2, 2, 2, 2))
    if not dims or not len(dims) == len(kernels) == len(strides):
        keys.mismatch("conv_dim", f"as many numbers as conv_kernel ({len(kernels)}) and conv_stride ({len(strides)})")

    return {
        "feature_dim": dims[-1],
        "feature_extractor_layer_descs": list(zip(dims, kernels, strides, strict=True)),
    }


def _convolution_keys(config: Wav2Vec2EncoderConfig) -> Mapping[str, object]:
    descs = config.feature_extractor_layer_descs

    return {
        "conv_dim": [dim for dim, _, _ in descs],
        "conv_kernel": [kernel for _, kernel, _ in descs],
        "conv_stride": [stride for _, _, stride in descs],
    }


def _read_norm_order(keys: ConfigReader, earlier: Mapping[str, Any]) -> Mapping[str, Any]:
    norm_first = keys.flag("do_stable_layer_norm", False)

    return {"norm_order": "PRE" if norm_first else "POST", "layer_norm_features": not norm_first}


_ENTRIES: Entries = (
    same_for_all("hidden_act", "gelu"),
    same_for_all("feat_extract_activation", "gelu"),
    Field("model_dim", "hidden_size", ConfigReader.count, 768),
    KeyGroup(("conv_dim", "conv_kernel", "conv_stride"), _read_convolutions, _convolution_keys),
    Field("feature_extractor_bias", "conv_bias", ConfigReader.flag, False),
    Field(
        "feature_extractor_layer_norm_convs",
        "feat_extract_norm",
        lambda keys, key, default: keys.choice(key, default, {"group": "group", "layer": "layer"}) == "layer",
        "group",
        write=lambda config: "layer" if config.feature_extractor_layer_norm_convs else "group",
    ),
    Field("first_pass_dropout_p", "feat_proj_dropout", ConfigReader.number, 0.0),
    Field("pos_conv_kernel_size", "num_conv_pos_embeddings", ConfigReader.count, 128),
    Field("num_pos_conv_groups", "num_conv_pos_embedding_groups", ConfigReader.count, 16),
    Field("num_encoder_layers", "num_hidden_layers", ConfigReader.layers, 12),
    Field("num_encoder_attn_heads", "num_attention_heads", ConfigReader.count, 12),
    Field("ffn_inner_dim", "intermediate_size", ConfigReader.count, 3072),
    Field("dropout_p", "hidden_dropout", ConfigReader.number, 0.1),
    Field("attn_dropout_p", "attention_dropout", ConfigReader.number, 0.1),
    Field("ffn_inner_dropout_p", "activation_dropout", ConfigReader.number, 0.1),
    Field("layer_drop_p", "layerdrop", ConfigReader.number, 0.1),
    KeyGroup(
        ("do_stable_layer_norm",),
        _read_norm_order,
        lambda config: {"do_stable_layer_norm": config.norm_order == "PRE"},
    ),
    Field("norm_eps", "layer_norm_eps", ConfigReader.number, 1e-5),
    Field("init_std", "initializer_range", ConfigReader.number, 0.02),
)
"""The keys of ``config.json`` that describe the encoder."""

ENCODER: Final = KeyGroup(
    tuple(key for entry in _ENTRIES for key in entry.keys),
    # Any frontend learns at full speed, and its frames are projected.
    lambda keys, earlier: {
        "encoder_config": Wav2Vec2EncoderConfig(
            feature_grad_scale=1.0, feature_projection=True, **read_fields(_ENTRIES, keys)
        )
    },
    lambda config: keys_of(_ENTRIES, config.encoder_config),
)
"""The encoder of a configuration."""

NO_ADAPTERS: Final[Mapping[str, object]] = {"add_adapter": False, "adapter_attn_dim": None}
"""The keys that change the results of transformers, with the only value that the families support."""


def _count_of_masks(keys: ConfigReader, key: str, default: int) -> int:
    return keys.index(key, default) or 0


MASKING: Final[Entries] = (
    Field("temporal_mask_span_len", "mask_time_length", ConfigReader.count, 10),
    Field("max_temporal_mask_prob", "mask_time_prob", ConfigReader.number, 0.05),
    Field("min_num_temporal_mask_spans", "mask_time_min_masks", _count_of_masks, 2),
    Field("spatial_mask_span_len", "mask_feature_length", ConfigReader.count, 10),
    Field("max_spatial_mask_prob", "mask_feature_prob", ConfigReader.number, 0.0),
    Field("min_num_spatial_mask_spans", "mask_feature_min_masks", _count_of_masks, 0),
)
"""The keys of ``config.json`` that say how much is masked."""
