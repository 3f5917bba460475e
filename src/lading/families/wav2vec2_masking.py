"""The masking of the wav2vec 2.0 families: its part of a configuration, and its keys in ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass

from lading.families.config_json import ConfigReader, Field
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


def _count_of_masks(keys: ConfigReader, key: str, default: int) -> int:
    return keys.index(key, default) or 0


MASKING_ENTRIES = (
    Field("temporal_mask_span_len", "mask_time_length", ConfigReader.count, 10),
    Field("max_temporal_mask_prob", "mask_time_prob", ConfigReader.number, 0.05),
    Field("min_num_temporal_mask_spans", "mask_time_min_masks", _count_of_masks, 2),
    Field("spatial_mask_span_len", "mask_feature_length", ConfigReader.count, 10),
    Field("max_spatial_mask_prob", "mask_feature_prob", ConfigReader.number, 0.0),
    Field("min_num_spatial_mask_spans", "mask_feature_min_masks", _count_of_masks, 0),
)
"""The keys of ``config.json`` that say how much is masked."""
