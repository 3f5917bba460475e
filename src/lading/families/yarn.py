"""The configuration of YaRN (https://arxiv.org/abs/2309.00071), and its keys in ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from lading.families.config_json import ConfigReader
from lading.families.nn.rope_scaling import YaRNScaling


@dataclass(kw_only=True)
class YaRNScaleConfig:
    """The scaling of rotary frequencies."""

    scale_factor: float = 8.0
    """The context to reach, divided by the context of the first training."""

    original_max_seq_len: int = 8192
    """The context of the first training, in tokens."""

    beta_fast: float = 32.0
    """The rotations in that context from which on a dimension stays as it is."""

    beta_slow: float = 1.0
    """The rotations in that context up to which a dimension is stretched by the whole factor."""

    mscale: float = 1.0
    """The sharpening of attention; without ``mscale_all_dim`` it counts as 1."""

    mscale_all_dim: float = 0.0
    """The divisor of ``mscale``; 0 means none."""

    truncate: bool = True
    """True if the dimensions at which stretching starts and ends are rounded to integers."""

    amplitude: float | None = None
    """The factor of cosines and sines; ``None`` computes it from the fields above."""


def yarn_scaling(config: YaRNScaleConfig) -> YaRNScaling:
    """Return the scaling that a configuration describes.

    :raises ValueError: its values are not valid.
    """
    amplitude = config.amplitude
    if amplitude is None:
        amplitude = YaRNScaling.default_amplitude(config.scale_factor)
        if config.mscale and config.mscale_all_dim:
            numerator = YaRNScaling.default_amplitude(config.scale_factor, config.mscale)
            amplitude = numerator / YaRNScaling.default_amplitude(config.scale_factor, config.mscale_all_dim)

    return YaRNScaling(
        factor=config.scale_factor,
        original_seq_len=config.original_max_seq_len,
        beta_fast=config.beta_fast,
        beta_slow=config.beta_slow,
        amplitude=amplitude,
        truncate=config.truncate,
    )


def read_yarn(keys: ConfigReader, max_seq_len: int) -> YaRNScaleConfig:
    """Read the keys of a scaling.

    :param max_seq_len: the longest sequence of the model, for what is not stated.
    """
    original = keys.count("original_max_position_embeddings", max_seq_len)

    return YaRNScaleConfig(
        scale_factor=max_seq_len / original if keys.is_null("factor") else keys.number("factor", None),
        original_max_seq_len=original,
        beta_fast=32.0 if keys.is_null("beta_fast") else keys.number("beta_fast", None),
        beta_slow=1.0 if keys.is_null("beta_slow") else keys.number("beta_slow", None),
        mscale=0.0 if keys.is_null("mscale") else keys.number("mscale", None),
        mscale_all_dim=0.0 if keys.is_null("mscale_all_dim") else keys.number("mscale_all_dim", None),
        truncate=keys.flag("truncate", True),
        amplitude=None if keys.is_null("attention_factor") else keys.number("attention_factor", None),
    )


def yarn_keys(config: YaRNScaleConfig) -> dict[str, object]:
    """Return the keys of a scaling."""
    return {
        "rope_type": "yarn",
        "factor": config.scale_factor,
        "original_max_position_embeddings": config.original_max_seq_len,
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "truncate": config.truncate,
        "attention_factor": yarn_scaling(config).amplitude,
    }
