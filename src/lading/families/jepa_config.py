"""The configurations of JEPA models."""

from __future__ import annotations

from dataclasses import dataclass, field

from lading.families.nn.checks import MAX_LAYERS, require_positive, shared_fields
from lading.families.nn.vision_spec import VisionSpec


@dataclass(kw_only=True)
class JepaEncoderConfig:
    """The configuration of the encoder, a vision transformer; the defaults are those of the base model for images."""

    model_dim: int = 768
    """The width of the model."""

    num_input_channels: int = 3
    """The number of channels of an image, or of a frame of a video."""

    input_dims: tuple[int, ...] = (224, 224)
    """The size of an input: (height, width) of an image, or (depth, height, width) of a video."""

    patch_dims: tuple[int, ...] = (16, 16)
    """The size of a patch, likewise."""

    num_encoder_layers: int = 12
    """The number of layers."""

    num_encoder_attn_heads: int = 12
    """The number of attention heads."""

    qkv_bias: bool = True
    """True if the projections of queries, keys and values have a bias."""

    attn_dropout_p: float = 0.0
    """The dropout probability of the attention weights."""

    ffn_inner_dim_ratio: float = 4.0
    """The inner width of the feed-forward networks, divided by ``model_dim``; see :meth:`ffn_inner_dim`."""

    init_std: float = 0.02
    """The standard deviation of the initial weights."""

    dropout_p: float = 0.0
    """The dropout probability of the outputs of attention and feed-forward blocks."""

    droppath_p: float = 0.0
    """The probability that a block is skipped for an input in training."""

    uniform_power: bool = False
    """True if each dimension of a video gets a third of a position, false if the depth gets half of it."""

    norm_eps: float = 1e-6
    """The number that is added to the variance before taking its root."""

    learned_positions: bool = False
    """True if the checkpoint has the positions, false if they are computed. I-JEPA's have to come from its checkpoints,
    because they order the dimensions of an image in another way."""

    def ffn_inner_dim(self) -> int:
        """Return the inner width of the feed-forward networks, rounded down.

        :raises ValueError: it is too large, or not a number.
        """
        try:
            return int(self.model_dim * self.ffn_inner_dim_ratio)
        except (OverflowError, ValueError) as error:
            raise ValueError(f"`model_dim` times `ffn_inner_dim_ratio` is not a width: {error}") from None


def encoder_spec(config: JepaEncoderConfig) -> VisionSpec:
    """Return the options of the encoder.

    :raises ValueError: the sizes are not valid.
    """
    shared = shared_fields(VisionSpec, config) | {
        "input_dims": tuple(config.input_dims),
        "patch_dims": tuple(config.patch_dims),
        "ffn_inner_dim": config.ffn_inner_dim(),
    }

    return VisionSpec(**shared, num_layers=config.num_encoder_layers, num_attn_heads=config.num_encoder_attn_heads)


@dataclass(kw_only=True)
class JepaConfig:
    """The configuration of a JEPA model, the encoder alone."""

    encoder_config: JepaEncoderConfig = field(default_factory=JepaEncoderConfig)
    """The encoder."""


@dataclass(kw_only=True)
class JepaClassifierConfig:
    """The configuration of a JEPA model with a classifier."""

    encoder_config: JepaEncoderConfig = field(default_factory=JepaEncoderConfig)
    """The encoder."""

    pool_depth: int = 1
    """The number of further layers over the patches before they are pooled; 1 means none."""

    decoder_projection: bool = True
    """True if the attention of the queries has an output projection."""

    num_queries: int = 1
    """The number of trained queries that attend to the patches."""

    num_classes: int = 1000
    """The number of classes."""


def checked_classifier(config: JepaClassifierConfig) -> VisionSpec:
    """Return the options of the encoder.

    :raises ValueError: the sizes of the encoder or of the classifier are not valid.
    """
    require_positive(config, "pool_depth", "num_queries", "num_classes")
    if config.pool_depth > MAX_LAYERS:
        raise ValueError(f"`pool_depth` must be at most {MAX_LAYERS}, but is {config.pool_depth}")

    return encoder_spec(config.encoder_config)
