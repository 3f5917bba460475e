"""Random masks over time steps and features, as in wav2vec 2.0 (https://arxiv.org/abs/2006.11477)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lading.families.nn.checks import require_positive

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(kw_only=True)
class MaskingConfig:
    """The amount of masking; the defaults are those of pre-training."""

    temporal_mask_span_len: int = 10
    """The length of a masked span, in frames."""

    max_temporal_mask_prob: float = 0.69
    """The share of frames that masked spans would cover if none overlapped; 0 masks none."""

    min_num_temporal_mask_spans: int = 2
    """The minimum number of masked spans in a sequence."""

    spatial_mask_span_len: int = 10
    """The length of a masked span, in features."""

    max_spatial_mask_prob: float = 0.0
    """The share of features that masked spans would cover if none overlapped; 0 masks none."""

    min_num_spatial_mask_spans: int = 2
    """The minimum number of masked spans over features."""


@dataclass(kw_only=True)
class Masking(MaskingConfig):
    """The drawing of masks. Random numbers come from torch's generator of the device.

    :raises ValueError: a probability is outside [0, 1], or a span is empty.
    """

    def __post_init__(self) -> None:
        for name in ("max_temporal_mask_prob", "max_spatial_mask_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` must be in [0, 1], but is {getattr(self, name)}")
        require_positive(self, "temporal_mask_span_len", "spatial_mask_span_len")
        if self.min_num_temporal_mask_spans < 0 or self.min_num_spatial_mask_spans < 0:
            raise ValueError(
                "the least numbers of masked spans must not be negative, but are "
                f"{self.min_num_temporal_mask_spans} and {self.min_num_spatial_mask_spans}"
            )

    def temporal(self, lengths: Tensor, max_length: int) -> Tensor | None:
        """Draw a mask over time: numbers of time steps (N), int64 → (N, max_length), true where masked, or ``None``.

        :raises ValueError: a sequence is not longer than a span.
        """
        if self.max_temporal_mask_prob == 0.0:
            return None

        return span_mask(
            lengths,
            max_length,
            span_len=self.temporal_mask_span_len,
            max_prob=self.max_temporal_mask_prob,
            min_num_spans=self.min_num_temporal_mask_spans,
        )

    def spatial(self, batch_size: int, dim: int, device: torch.device) -> Tensor | None:
        """Draw a mask over features → (batch_size, dim), true where a feature is masked in all time steps, or ``None``.

        :raises ValueError: a span has as many features as the input, or more.
        """
        if self.max_spatial_mask_prob == 0.0:
            return None

        import torch

        return span_mask(
            torch.full((batch_size,), dim, device=device),
            dim,
            span_len=self.spatial_mask_span_len,
            max_prob=self.max_spatial_mask_prob,
            min_num_spans=self.min_num_spatial_mask_spans,
        )


def span_mask(lengths: Tensor, max_length: int, *, span_len: int, max_prob: float, min_num_spans: int) -> Tensor:
    """Draw spans: lengths of rows (N), int64 → (N, max_length), true where masked, equally often in each row.

    Spans are drawn with replacement and may overlap. In rows with less overlap than others, some steps are unmasked
    again, so that the masked steps of all rows make one tensor.

    :raises ValueError: a row is not longer than a span.
    """
    import torch

    shortest = int(lengths.min())
    if shortest <= span_len:
        raise ValueError(
            f"a sequence must be longer than a masked span, which has {span_len} steps, but one has {shortest}"
        )

    # Never the whole row, so that some context is left to predict from.
    num_spans = max(min_num_spans, int(max_prob / span_len * (shortest - 1)))
    if num_spans == 0:
        return torch.zeros(lengths.size(0), max_length, dtype=torch.bool, device=lengths.device)

    offsets = torch.rand(lengths.size(0), num_spans, device=lengths.device)
    starts = (offsets * (lengths - span_len + 1)[:, None]).long()
    steps = starts[:, :, None] + torch.arange(span_len, device=lengths.device)
    covered = torch.zeros(lengths.size(0), max_length, dtype=torch.bool, device=lengths.device)
    covered.scatter_(1, steps.flatten(1), True)

    scores = torch.rand(covered.shape, device=lengths.device).masked_fill_(~covered, -1.0)
    kept = scores.topk(int(covered.sum(1).min()), dim=1, sorted=False).indices

    return torch.zeros_like(covered).scatter_(1, kept, True)
