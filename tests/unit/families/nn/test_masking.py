from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lading.families.nn.masking import Masking, span_mask

MASKING = Masking(
    temporal_mask_span_len=4,
    max_temporal_mask_prob=0.5,
    min_num_temporal_mask_spans=2,
    spatial_mask_span_len=3,
    max_spatial_mask_prob=0.4,
    min_num_spatial_mask_spans=1,
)


def runs(row: torch.Tensor) -> list[int]:
    """The lengths of the runs of true values."""
    text = "".join("x" if value else " " for value in row.tolist())

    return [len(run) for run in text.split()]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_masked_as_often_and_within_their_lengths(seed: int) -> None:
    torch.manual_seed(seed)
    lengths = torch.tensor([50, 30, 21])

    mask = span_mask(lengths, 50, span_len=4, max_prob=0.5, min_num_spans=0)

    assert (mask.shape, mask.dtype) == ((3, 50), torch.bool)
    assert len(set(mask.sum(1).tolist())) == 1
    assert 4 <= int(mask[0].sum()) <= 8  # two spans: half of the shortest row's 20
    assert not mask[1, 30:].any()
    assert not mask[2, 21:].any()


def test_one_row_is_masked_in_spans() -> None:
    torch.manual_seed(0)

    mask = span_mask(torch.tensor([400]), 400, span_len=7, max_prob=0.2, min_num_spans=0)

    assert min(runs(mask[0])) >= 7
    assert int(mask.sum()) <= 0.2 * 400


def test_every_step_may_be_masked() -> None:
    torch.manual_seed(0)
    lengths = torch.full((2000,), 6)

    seen = span_mask(lengths, 6, span_len=2, max_prob=0.5, min_num_spans=0).sum(0)

    assert (seen > 0).all()


@pytest.mark.parametrize(("least", "expected"), [(0, 0), (1, 3), (2, None)])
def test_the_least_number_of_spans(least: int, expected: int | None) -> None:
    torch.manual_seed(0)

    masked = span_mask(torch.tensor([10]), 10, span_len=3, max_prob=0.1, min_num_spans=least).sum()

    if expected is None:
        assert 3 < int(masked) <= 6
    else:
        assert int(masked) == expected


@pytest.mark.parametrize("length", [3, 4])
def test_a_row_that_is_no_longer_than_a_span(length: int) -> None:
    with pytest.raises(ValueError, match=f"4 steps, but one has {length}"):
        span_mask(torch.tensor([9, length]), 9, span_len=4, max_prob=0.5, min_num_spans=0)


def test_masks_of_steps_and_of_features() -> None:
    torch.manual_seed(0)

    assert MASKING.temporal(torch.tensor([20, 30]), 30).shape == (2, 30)
    assert MASKING.spatial(2, 16, torch.device("cpu")).shape == (2, 16)
    assert replace(MASKING, max_temporal_mask_prob=0.0).temporal(torch.tensor([20]), 20) is None
    assert replace(MASKING, max_spatial_mask_prob=0.0).spatial(2, 16, torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_temporal_mask_prob": 1.5}, "max_temporal_mask_prob"),
        ({"max_spatial_mask_prob": -0.1}, "max_spatial_mask_prob"),
        ({"temporal_mask_span_len": 0}, "temporal_mask_span_len"),
        ({"spatial_mask_span_len": 0}, "spatial_mask_span_len"),
        ({"min_num_temporal_mask_spans": -1}, "negative"),
    ],
)
def test_nonsense(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(MASKING, **changes)
