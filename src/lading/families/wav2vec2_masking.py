"""The masking of the wav2vec 2.0 families: its part of a configuration, and its keys in ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lading.families.config_json import ConfigReader
from lading.families.nn.masking import Masking


@dataclass(kw_only=True)
class MaskingFields:
    """The configuration of masking; the defaults are those of pre-training."""

    temporal_mask_span_len: int = 10
    """The length of a masked span, in frames."""

    max_temporal_mask_prob: float = 0.69
    """The share of frames that masked spans would cover if none overlapped."""

    min_num_temporal_mask_spans: int = 2
    """The minimum number of masked spans in a sequence."""

    spatial_mask_span_len: int = 10
    """The length of a masked span, in features."""

    max_spatial_mask_prob: float = 0.0
    """The share of features that masked spans would cover if none overlapped."""

    min_num_spatial_mask_spans: int = 2
    """The minimum number of masked spans over features."""


def masking_of(config: MaskingFields) -> Masking:
    """Return the masking of a configuration.

    :raises ValueError: a share is outside [0, 1], or a span is empty.
    """
    return Masking(
        temporal_span_len=config.temporal_mask_span_len,
        max_temporal_prob=config.max_temporal_mask_prob,
        min_num_temporal_spans=config.min_num_temporal_mask_spans,
        spatial_span_len=config.spatial_mask_span_len,
        max_spatial_prob=config.max_spatial_mask_prob,
        min_num_spatial_spans=config.min_num_spatial_mask_spans,
    )


def masking_from_hf(keys: ConfigReader) -> dict[str, Any]:
    """The :class:`MaskingFields`, by name, that a ``config.json`` states."""
    return {
        "temporal_mask_span_len": keys.count("mask_time_length", 10),
        "max_temporal_mask_prob": keys.number("mask_time_prob", 0.05),
        "min_num_temporal_mask_spans": keys.index("mask_time_min_masks", 2) or 0,
        "spatial_mask_span_len": keys.count("mask_feature_length", 10),
        "max_spatial_mask_prob": keys.number("mask_feature_prob", 0.0),
        "min_num_spatial_mask_spans": keys.index("mask_feature_min_masks", 0) or 0,
    }


def masking_to_hf(config: MaskingFields) -> dict[str, object]:
    """The keys of ``config.json`` that say how much is masked."""
    return {
        "mask_time_length": config.temporal_mask_span_len,
        "mask_time_prob": config.max_temporal_mask_prob,
        "mask_time_min_masks": config.min_num_temporal_mask_spans,
        "mask_feature_length": config.spatial_mask_span_len,
        "mask_feature_prob": config.max_spatial_mask_prob,
        "mask_feature_min_masks": config.min_num_spatial_mask_spans,
    }
