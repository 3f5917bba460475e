"""wav2vec 2.0 (https://arxiv.org/abs/2006.11477) as it is pre-trained: quantised frames are told from distractors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.config import STRICT
from lading.errors import NotSupportedError
from lading.families.huggingface import ConfigReader
from lading.family import Family
from lading.hub import ModelHubAccessor
from lading.keymap import Rule
from lading.nn.masking import Masking
from lading.nn.quantizer import GumbelQuantizer, QuantizerOutput, init_quantizer
from lading.nn.speech_encoder import SpeechModel, SpeechSpec, init_projection, init_speech, speech_plan
from lading.nn.uninitialized import Linear


@dataclass(kw_only=True)
class Wav2Vec2EncoderConfig:
    """The encoder that the wav2vec 2.0 families share; the defaults are those of the base model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model_dim: int = 768
    """The width of the model."""

    max_seq_len: int = 4096
    """The longest sequence, in frames. Convolutional positions have no such limit, and don't look at it."""

    feature_dim: int = 512
    """The width of a frame."""

    use_fbank: bool = False
    """Whether the model reads log-mel filter banks in place of a waveform."""

    first_pass_dropout_p: float = 0.0
    """The dropout probability of frames, before masking and positions."""

    layer_norm_features: bool = True
    """Whether frames are normalised once they have positions."""

    feature_extractor_layer_descs: list[tuple[int, int, int]] = field(
        default_factory=lambda: [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
    )
    """Output dimension, kernel size and stride of each convolution over the waveform."""

    feature_extractor_bias: bool = False
    """Whether these convolutions have biases."""

    feature_extractor_layer_norm_convs: bool = False
    """Whether each of them is followed by a layer normalisation; if not, the first by a group normalisation."""

    feature_grad_scale: float = 0.1
    """What their gradient is multiplied by in training."""

    num_fbank_channels: int = 0
    """The number of channels of the filter banks."""

    fbank_stride: int = 0
    """The number of neighbouring filter banks that make a frame."""

    sample_fbank_every_k: int = 0
    """Which filter banks are left out; not supported beyond 1, which is none of them."""

    pos_encoder_type: Literal["conv", "relative", "rotary"] = "conv"
    """How frames come by positions; only ``conv`` is supported."""

    pos_encoder_depth: int = 1
    """The number of convolutions for that; only 1 is supported."""

    pos_conv_kernel_size: int = 128
    """The kernel size of that convolution, in frames."""

    num_pos_conv_groups: int = 16
    """The number of its groups."""

    use_conformer: bool = False
    """Whether the layers are Conformer blocks; not supported."""

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
    """The probability with which a layer is left out in training."""

    norm_order: Literal["POST", "PRE"] = "POST"
    """Whether a layer normalises what its blocks read, or their outputs with their residuals."""

    depthwise_conv_kernel_size: int = 0
    """The kernel size of the convolutions of Conformer blocks."""

    feature_projection: bool | None = None
    """Whether frames are projected to the width of the model; ``None`` means where these differ."""

    norm_eps: float = 1e-5
    """What is added to the variance before its root is taken."""

    init_std: float = 0.02
    """The standard deviation of random weights inside the layers."""


@dataclass(kw_only=True)
class Wav2Vec2Config:
    """The configuration of a model for pre-training; the defaults are those of the base model."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    encoder_config: Wav2Vec2EncoderConfig = field(default_factory=Wav2Vec2EncoderConfig)
    """The encoder."""

    final_dim: int = 256
    """The width in which the encoder's outputs and quantised frames are compared."""

    final_proj_bias: bool = True
    """Whether the projection of the encoder's outputs to it has a bias."""

    quantizer_encoder_grad: bool = True
    """Whether the frontend learns through the quantiser, too."""

    temporal_mask_span_len: int = 10
    """The length of a masked span, in frames."""

    max_temporal_mask_prob: float = 0.69
    """The share of frames that masked spans would cover if none overlapped."""

    min_num_temporal_mask_spans: int = 2
    """The least number of masked spans in a sequence."""

    spatial_mask_span_len: int = 10
    """The length of a masked span, in features."""

    max_spatial_mask_prob: float = 0.0
    """The share of features that masked spans would cover if none overlapped."""

    min_num_spatial_mask_spans: int = 2
    """The least number of masked spans over features."""

    quantized_dim: int = 256
    """The width of a quantised frame."""

    num_codebooks: int = 2
    """The number of codebooks, each of which gives a part of a quantised frame."""

    num_codebook_entries: int = 320
    """The number of entries of each."""

    codebook_sampling_temperature: tuple[float, float, float] = (2.0, 0.5, 0.999995)
    """That of the first update, the lowest one, and the factor between two updates."""

    num_distractors: int = 100
    """The number of wrong candidates for each masked frame."""

    logit_temp: float = 0.1
    """The temperature by which similarities are divided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wav2Vec2Output:
    """What a model for pre-training says of M masked frames in each sequence."""

    logits: Tensor
    """(N, M, 1 + num_distractors), float32; the right candidate is the first. Those equal to it are minus infinity."""
    states: Tensor
    """What the encoder says of masked frames, (N, M, final_dim)."""
    targets: Tensor
    """What they are, quantised, (N, M, final_dim)."""
    quantizer: QuantizerOutput
    temporal_mask: Tensor
    """True where a frame is masked, (N, T)."""
    hidden: Tensor
    """The encoder's outputs, (N, T, model_dim)."""
    raw_features: Tensor
    """Frames before normalisation, (N, T, feature_dim): training keeps their squares small."""
    num_frames: Tensor
    """Of each sequence without padding, (N), int64."""


class Wav2Vec2(nn.Module):
    """A wav2vec 2.0 model for pre-training; its parameters are uninitialised."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()

        spec = encoder_spec(config.encoder_config, masked=True)

        self.masking = _masking(config)
        self.target_dropout_p = spec.feature_dropout_p
        self.quantizer_encoder_grad = config.quantizer_encoder_grad
        self.num_distractors = config.num_distractors
        self.logit_temp = config.logit_temp

        self.wav2vec2 = SpeechModel(spec)
        self.quantizer = GumbelQuantizer(
            spec.feature_dim,
            config.quantized_dim,
            num_codebooks=config.num_codebooks,
            num_entries=config.num_codebook_entries,
            temperature=config.codebook_sampling_temperature,
        )
        self.project_hid = Linear(spec.model_dim, config.final_dim, bias=config.final_proj_bias)
        self.project_q = Linear(config.quantized_dim, config.final_dim)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        temporal_mask: Tensor | None = None,
        distractors: Tensor | None = None,
    ) -> Wav2Vec2Output:
        """A waveform (N, S), or filter banks (N, S, C), masked in evaluation, too.

        :param attention_mask: (N, S); 1 is sound, 0 the padding after it.
        :param temporal_mask: bool, (N, T), true in M places of each row; by default drawn.
        :param distractors: int64, (N, M, L), which of the M masked frames of a sequence are its wrong candidates; by
            default ``num_distractors`` others, drawn.

        :raises ValueError: an input or a mask of another shape, sound that is too short for a frame, or for a mask.
        """
        encoded = self.wav2vec2(input_values, attention_mask, masking=self.masking, temporal_mask=temporal_mask)
        mask = encoded.temporal_mask

        features = encoded.features if self.quantizer_encoder_grad else encoded.features.detach()
        features = dropout(features, self.target_dropout_p, self.training)

        quantized = self.quantizer(_masked(features, mask))
        # What a linear with bias gives is a view, and FSDP warns of modules that return one.
        targets = self.project_q(quantized.vectors).clone()
        states = self.project_hid(_masked(encoded.hidden, mask)).clone()

        if distractors is None:
            distractors = draw_distractors(targets, self.num_distractors)

        return Wav2Vec2Output(
            logits=contrastive_logits(states, targets, distractors, temperature=self.logit_temp),
            states=states,
            targets=targets,
            quantizer=quantized,
            temporal_mask=mask,
            hidden=encoded.hidden,
            raw_features=encoded.raw_features,
            num_frames=encoded.num_frames,
        )


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """(N, T, D) → (N, M, D)."""
    counts = mask.sum(1).tolist()
    if len(set(counts)) > 1 or counts[0] < 2:
        raise ValueError(f"a mask must have the same number of frames in each row, and two or more, but has {counts}")

    return x[mask].view(x.size(0), counts[0], x.size(2))


def draw_distractors(targets: Tensor, num_distractors: int) -> Tensor:
    """(N, M, D) → int64, (N, M, num_distractors): for each frame, others of the same sequence, with replacement."""
    batch_size, num_masked, _ = targets.shape

    own = torch.arange(num_masked, device=targets.device)[None, :, None]
    drawn = torch.randint(num_masked - 1, (batch_size, num_masked, num_distractors), device=targets.device)

    return drawn + (drawn >= own)


def contrastive_logits(states: Tensor, targets: Tensor, distractors: Tensor, *, temperature: float) -> Tensor:
    """Twice (N, M, D), and indices (N, M, L) into M → (N, M, 1 + L), float32: equation 3 of the paper."""
    rows = torch.arange(targets.size(0), device=targets.device)[:, None, None]
    wrong = targets[rows, distractors]
    candidates = torch.cat((targets[:, :, None], wrong), dim=2)

    logits = torch.cosine_similarity(states[:, :, None].float(), candidates.float(), dim=-1) / temperature
    same = (wrong == targets[:, :, None]).all(-1)

    return logits.masked_fill(nn.functional.pad(same, (1, 0)), -torch.inf)


def encoder_spec(config: Wav2Vec2EncoderConfig, *, masked: bool) -> SpeechSpec:
    """The switches of the encoder.

    :param masked: whether the model has an embedding to put in place of masked frames.

    :raises NotSupportedError: Conformer blocks, other than convolutional positions, or filter banks that are left out.
    :raises ValueError: sizes that make no encoder.
    """
    for name, supported in (("use_conformer", False), ("pos_encoder_type", "conv"), ("pos_encoder_depth", 1)):
        if getattr(config, name) != supported:
            raise NotSupportedError(
                f"The wav2vec 2.0 families support no other `{name}` than {supported!r}, but the configuration says "
                f"{getattr(config, name)!r}."
            )
    if config.use_fbank and config.sample_fbank_every_k > 1:
        raise NotSupportedError(
            "The wav2vec 2.0 families leave no filter banks out, but the configuration's `sample_fbank_every_k` is "
            f"{config.sample_fbank_every_k}."
        )
    if config.use_fbank and min(config.num_fbank_channels, config.fbank_stride) < 1:
        raise ValueError(
            "`num_fbank_channels` and `fbank_stride` must be positive, but are "
            f"{config.num_fbank_channels} and {config.fbank_stride}"
        )

    project = config.feature_projection
    return SpeechSpec(
        model_dim=config.model_dim,
        feature_dim=config.feature_dim,
        fbank=(config.num_fbank_channels, config.fbank_stride) if config.use_fbank else None,
        conv_layer_descs=config.feature_extractor_layer_descs,
        conv_bias=config.feature_extractor_bias,
        conv_layer_norm=config.feature_extractor_layer_norm_convs,
        feature_grad_scale=config.feature_grad_scale,
        project_features=config.feature_dim != config.model_dim if project is None else project,
        pos_conv_kernel_size=config.pos_conv_kernel_size,
        num_pos_conv_groups=config.num_pos_conv_groups,
        num_layers=config.num_encoder_layers,
        num_attn_heads=config.num_encoder_attn_heads,
        ffn_inner_dim=config.ffn_inner_dim,
        norm_first=config.norm_order == "PRE",
        norm_features=config.layer_norm_features,
        norm_eps=config.norm_eps,
        feature_dropout_p=config.first_pass_dropout_p,
        dropout_p=config.dropout_p,
        attn_dropout_p=config.attn_dropout_p,
        ffn_inner_dropout_p=config.ffn_inner_dropout_p,
        layer_drop_p=config.layer_drop_p,
        masked=masked,
    )


def _masking(config: Wav2Vec2Config) -> Masking:
    if not config.max_temporal_mask_prob > 0.0:
        raise ValueError(
            "without masked frames there is nothing to learn: `max_temporal_mask_prob` must be positive, but is "
            f"{config.max_temporal_mask_prob}"
        )

    return Masking(
        temporal_span_len=config.temporal_mask_span_len,
        max_temporal_prob=config.max_temporal_mask_prob,
        min_num_temporal_spans=config.min_num_temporal_mask_spans,
        spatial_span_len=config.spatial_mask_span_len,
        max_spatial_prob=config.max_spatial_mask_prob,
        min_num_spatial_spans=config.min_num_spatial_mask_spans,
    )


def _init(model: Wav2Vec2, config: Wav2Vec2Config, name: str, parameter: Tensor) -> None:
    part, _, rest = name.partition(".")
    if part == "wav2vec2":
        init_speech(model.wav2vec2, rest, parameter, std=config.encoder_config.init_std)
    elif part == "quantizer":
        init_quantizer(rest, parameter)
    else:
        init_projection(parameter, config.encoder_config.model_dim if part == "project_hid" else config.quantized_dim)


# --- checkpoints -----------------------------------------------------------------------------------------------------

_CONV = "feature_extractor.conv_layers.{n}"
_POS_CONV = "encoder.pos_conv_embed.conv"
_LAYER = "encoder.layers.{n}"

_FAIRSEQ = {
    "mask_emb": "masked_spec_embed",
    f"{_CONV}.0.{{p*}}": f"{_CONV}.conv.{{p}}",
    f"{_CONV}.2.1.{{p*}}": f"{_CONV}.layer_norm.{{p}}",  # a layer normalisation stands between two transpositions
    f"{_CONV}.2.{{p*}}": f"{_CONV}.layer_norm.{{p}}",
    "layer_norm.{p*}": "feature_projection.layer_norm.{p}",
    "post_extract_proj.{p*}": "feature_projection.projection.{p}",
    "encoder.pos_conv.0.weight_g": f"{_POS_CONV}.parametrizations.weight.original0",
    "encoder.pos_conv.0.weight_v": f"{_POS_CONV}.parametrizations.weight.original1",
    "encoder.pos_conv.0.bias": f"{_POS_CONV}.bias",
    "encoder.layer_norm.{p*}": "encoder.layer_norm.{p}",
    f"{_LAYER}.self_attn.{{p*}}": f"{_LAYER}.attention.{{p}}",
    f"{_LAYER}.self_attn_layer_norm.{{p*}}": f"{_LAYER}.layer_norm.{{p}}",
    f"{_LAYER}.fc1.{{p*}}": f"{_LAYER}.feed_forward.intermediate_dense.{{p}}",
    f"{_LAYER}.fc2.{{p*}}": f"{_LAYER}.feed_forward.output_dense.{{p}}",
    f"{_LAYER}.final_layer_norm.{{p*}}": f"{_LAYER}.final_layer_norm.{{p}}",
}
"""Names of fairseq's checkpoints → those here, without the names of what is around the encoder."""

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
    f"{_LAYER}.self_attn.output_proj.{{p*}}": f"{_LAYER}.attention.out_proj.{{p}}",
    f"{_LAYER}.ffn.inner_proj.{{p*}}": f"{_LAYER}.feed_forward.intermediate_dense.{{p}}",
    f"{_LAYER}.ffn.output_proj.{{p*}}": f"{_LAYER}.feed_forward.output_dense.{{p}}",
    f"{_LAYER}.ffn_layer_norm.{{p*}}": f"{_LAYER}.final_layer_norm.{{p}}",
}
"""Names of fairseq2's checkpoints, where they are not fairseq's."""


def encoder_rules(config: Wav2Vec2EncoderConfig, *, masked: bool, fairseq_prefix: str = "") -> list[Rule]:
    """Rules for the encoder in checkpoints of fairseq, fairseq2 and older ones of Hugging Face.

    :param masked: whether the model has an embedding to put in place of masked frames.
    :param fairseq_prefix: what stands before the encoder's names in fairseq's checkpoints.
    """
    # The same normalisation, which fairseq2 counts to the frontend where the layers have theirs last.
    frontend_norm = "input_layer_norm" if config.norm_order == "PRE" else "layer_norm"

    rules = {
        f"wav2vec2.{_POS_CONV}.weight_g": f"{_POS_CONV}.parametrizations.weight.original0",
        f"wav2vec2.{_POS_CONV}.weight_v": f"{_POS_CONV}.parametrizations.weight.original1",
        "wav2vec2.masked_spec_embed": "masked_spec_embed",
        **_FAIRSEQ2,
        f"{_FRONTEND}.layer_norm.{{p*}}": f"encoder.{frontend_norm}.{{p}}",
        **_FAIRSEQ,
        **{f"{fairseq_prefix}{source}": target for source, target in _FAIRSEQ.items()},
    }
    unwanted = set() if masked else {"masked_spec_embed"}

    return [Rule(source, None if target in unwanted else f"wav2vec2.{target}") for source, target in rules.items()]


def _rules(config: Wav2Vec2Config) -> Sequence[Rule]:
    return (
        # fairseq's `project_q` is called that here, too; its and fairseq2's `final_proj` are one.
        Rule("final_proj.{p*}", "project_hid.{p}"),
        Rule("final_target_proj.{p*}", "project_q.{p}"),
        Rule("quantizer.vars", "quantizer.codevectors"),
        Rule("quantizer.entries", "quantizer.codevectors"),
        Rule("quantizer.entry_proj.{p*}", "quantizer.weight_proj.{p}"),
        Rule("quantizer.num_updates", None),
        *encoder_rules(config.encoder_config, masked=True),
    )


def encoder_from_hf(keys: ConfigReader) -> Wav2Vec2EncoderConfig:
    """The encoder that a ``config.json`` describes.

    :raises NotSupportedError: quantised weights, adapters, or other activations.
    """
    keys.refuse_quantised()
    keys.require("add_adapter", False)
    keys.require("adapter_attn_dim", None)
    for activation in ("hidden_act", "feat_extract_activation"):
        keys.choice(activation, "gelu", {"gelu": "gelu"})
    conv_norm = keys.choice("feat_extract_norm", "group", {"group": "group", "layer": "layer"})
    norm_first = keys.flag("do_stable_layer_norm", False)

    dims = keys.counts("conv_dim", (512,) * 7)
    kernels = keys.counts("conv_kernel", (10, 3, 3, 3, 3, 2, 2))
    strides = keys.counts("conv_stride", (5, 2, 2, 2, 2, 2, 2))
    if not dims or not len(dims) == len(kernels) == len(strides):
        keys.mismatch("conv_dim", f"as many numbers as conv_kernel ({len(kernels)}) and conv_stride ({len(strides)})")

    return Wav2Vec2EncoderConfig(
        model_dim=keys.count("hidden_size", 768),
        feature_dim=dims[-1],
        first_pass_dropout_p=keys.number("feat_proj_dropout", 0.0),
        layer_norm_features=not norm_first,
        feature_extractor_layer_descs=list(zip(dims, kernels, strides, strict=True)),
        feature_extractor_bias=keys.flag("conv_bias", False),
        feature_extractor_layer_norm_convs=conv_norm == "layer",
        feature_grad_scale=1.0,
        pos_conv_kernel_size=keys.count("num_conv_pos_embeddings", 128),
        num_pos_conv_groups=keys.count("num_conv_pos_embedding_groups", 16),
        num_encoder_layers=keys.count("num_hidden_layers", 12),
        num_encoder_attn_heads=keys.count("num_attention_heads", 12),
        ffn_inner_dim=keys.count("intermediate_size", 3072),
        dropout_p=keys.number("hidden_dropout", 0.1),
        attn_dropout_p=keys.number("attention_dropout", 0.1),
        ffn_inner_dropout_p=keys.number("activation_dropout", 0.1),
        layer_drop_p=keys.number("layerdrop", 0.1),
        norm_order="PRE" if norm_first else "POST",
        feature_projection=True,
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        init_std=keys.number("initializer_range", 0.02),
    )


def _from_hf(values: Mapping[str, object]) -> Wav2Vec2Config:
    """The temperatures of codebooks are not in the file: training scripts hold them."""
    keys = ConfigReader(values, "wav2vec2")
    keys.require("apply_spec_augment", True)

    config = Wav2Vec2Config(
        encoder_config=encoder_from_hf(keys),
        final_dim=keys.count("proj_codevector_dim", 256),
        temporal_mask_span_len=keys.count("mask_time_length", 10),
        max_temporal_mask_prob=keys.number("mask_time_prob", 0.05),
        min_num_temporal_mask_spans=keys.index("mask_time_min_masks", 2) or 0,
        spatial_mask_span_len=keys.count("mask_feature_length", 10),
        max_spatial_mask_prob=keys.number("mask_feature_prob", 0.0),
        min_num_spatial_mask_spans=keys.index("mask_feature_min_masks", 0) or 0,
        quantized_dim=keys.count("codevector_dim", 256),
        num_codebooks=keys.count("num_codevector_groups", 2),
        num_codebook_entries=keys.count("num_codevectors_per_group", 320),
        num_distractors=keys.count("num_negatives", 100),
        logit_temp=keys.number("contrastive_logits_temperature", 0.1),
    )

    return keys.checked(config, lambda c: (encoder_spec(c.encoder_config, masked=True), _masking(c)))


FAMILY = Family(
    name="wav2vec2",
    kls=Wav2Vec2,
    config_kls=Wav2Vec2Config,
    build=Wav2Vec2,
    init=_init,
    rules=_rules,
    parallel_plan=lambda config: speech_plan(encoder_spec(config.encoder_config, masked=True), "wav2vec2"),
    hf_model_types=frozenset({"wav2vec2"}),
    hf_architectures=frozenset({"Wav2Vec2ForPreTraining"}),
    from_hf=_from_hf,
)

get_wav2vec2_model_hub = ModelHubAccessor("wav2vec2", Wav2Vec2, Wav2Vec2Config)
