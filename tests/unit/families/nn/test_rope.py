from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lading.families.nn.rope import RotaryEmbedding, rotate, rotate_adjacent
from lading.families.nn.rope_scaling import LinearScaling, LLaMA3Scaling, YaRNScaling


def scaling(**changes: Any) -> LLaMA3Scaling:
    return LLaMA3Scaling(**{"factor": 8.0, "frequency_factors": (1.0, 4.0), "original_context_length": 8192, **changes})


def test_frequencies() -> None:
    rope = RotaryEmbedding(8, theta=10_000.0)

    torch.testing.assert_close(rope.inv_freq, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_scaled_frequencies_of_llama_3_1() -> None:
    plain = RotaryEmbedding(128, theta=500_000.0).inv_freq
    scaled = RotaryEmbedding(128, theta=500_000.0, scaling=scaling()).inv_freq
    wavelengths = 2 * math.pi / plain

    short, long = wavelengths < 8192 / 4, wavelengths > 8192
    assert torch.equal(scaled[short], plain[short])
    assert torch.equal(scaled[long], plain[long] / 8)

    between = ~short & ~long
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
    assert (scaled.diff() < 0).all()


def test_scaled_frequencies_of_llama_4_are_not_interpolated() -> None:
    plain = RotaryEmbedding(128, theta=500_000.0).inv_freq
    scaled = RotaryEmbedding(128, theta=500_000.0, scaling=scaling(frequency_factors=(1.0, 1.0))).inv_freq

    assert torch.equal(scaled, torch.where(2 * math.pi / plain > 8192, plain / 8, plain))


def test_neighbors_are_rotated_as_halves_are() -> None:
    x, positions = torch.randn(2, 3, 5, 8), torch.arange(5)[None]
    cos, sin = RotaryEmbedding(8, theta=100.0)(positions, torch.float32)
    order = torch.arange(8).view(4, 2).T.flatten()  # even channels first

    assert torch.equal(rotate_adjacent(x, cos, sin)[..., order], rotate(x[..., order], cos, sin))


def yarn(**changes: float) -> YaRNScaling:
    return YaRNScaling(
        **{
            "factor": 8.0,
            "original_seq_len": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "amplitude": YaRNScaling.default_amplitude(8.0),
            "truncate": True,
            **changes,
        }
    )


def test_scaled_frequencies_of_yarn() -> None:
    plain = RotaryEmbedding(128, theta=500_000.0).inv_freq
    scaled = RotaryEmbedding(128, theta=500_000.0, scaling=yarn()).inv_freq
    turns = 8192 * plain / (2 * math.pi)

    # Whole dimensions: up to one more is touched on each side.
    fast, slow = turns > 32 * 1.25, turns < 1 / 1.25
    torch.testing.assert_close(scaled[fast], plain[fast], rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled[slow], plain[slow] / 8, rtol=1e-6, atol=0)
    between = (turns < 30) & (turns > 1.1)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()

    exact = RotaryEmbedding(128, theta=500_000.0, scaling=yarn(truncate=False)).inv_freq
    assert not torch.equal(exact, scaled)
    torch.testing.assert_close(exact, scaled, rtol=0.2, atol=0)


def test_yarn_makes_attention_sharper() -> None:
    plain, scaled = RotaryEmbedding(8, theta=1e4), RotaryEmbedding(8, theta=1e4, scaling=yarn())
    at = torch.zeros(1, 1)

    assert YaRNScaling.default_amplitude(8.0) == pytest.approx(1.2079441541679836)
    assert YaRNScaling.default_amplitude(1.0) == 1.0
    assert plain(at, torch.float32)[0].max() == 1.0
    assert float(scaled(at, torch.float32)[0].max()) == pytest.approx(1.2079441541679836)


def test_yarn_between_two_betas_that_fall_together() -> None:
    frequencies = RotaryEmbedding(8, theta=1e4, scaling=yarn(beta_fast=1.0 + 1e-9, truncate=False)).inv_freq

    assert frequencies.isfinite().all()


def test_linear_scaling() -> None:
    plain = RotaryEmbedding(8, theta=1e4).inv_freq

    assert torch.equal(RotaryEmbedding(8, theta=1e4, scaling=LinearScaling(factor=8.0)).inv_freq, plain / 8)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"factor": 0.5}, "factor"),
        ({"beta_slow": 32.0}, "slow < fast"),
        ({"beta_slow": 0.0}, "slow < fast"),
        ({"original_seq_len": 0}, "original_seq_len"),
        ({"amplitude": 0.0}, "amplitude"),
    ],
)
def test_yarn_that_makes_no_sense(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        yarn(**changes)


def test_a_linear_scaling_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="factor"):
        LinearScaling(factor=0.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"factor": 0.0}, "factor"),
        ({"factor": math.nan}, "factor"),
        ({"frequency_factors": (4.0, 3.0)}, "frequency factors"),
        ({"frequency_factors": (0.0, 4.0)}, "frequency factors"),
        ({"original_context_length": 0}, "original_context_length"),
    ],
)
def test_scalings_that_make_no_sense(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        scaling(**changes)


def test_a_cast_of_the_model_leaves_the_frequencies_alone() -> None:
    rope = RotaryEmbedding(64, theta=10_000.0)
    before = rope.inv_freq.clone()

    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rope.to(dtype)
        assert rope.inv_freq.dtype == torch.float32
        assert torch.equal(rope.inv_freq, before)


def test_buffers_are_recomputed_after_the_meta_device() -> None:
    expected = RotaryEmbedding(64, theta=10_000.0, scaling=scaling()).inv_freq
    with torch.device("meta"):
        rope = RotaryEmbedding(64, theta=10_000.0, scaling=scaling())
    assert rope.inv_freq.is_meta
    assert rope.inv_freq.shape == expected.shape

    rope.to_empty(device="cpu")
    rope.reset_non_persistent_buffers("cpu")
    assert torch.equal(rope.inv_freq, expected)

    rope.reset_non_persistent_buffers("meta")
    assert rope.inv_freq.is_meta


def test_the_frequencies_are_not_in_the_state() -> None:
    assert RotaryEmbedding(64, theta=10_000.0).state_dict() == {}


def test_a_rotation_depends_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    rope = RotaryEmbedding(16, theta=100.0)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(m: int, n: int) -> torch.Tensor:
        at = [rope(torch.tensor([[position]]), torch.float32) for position in (m, n)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert not torch.isclose(score(9, 4), score(9, 5))
    torch.testing.assert_close(score(0, 0), (q * k).sum())


def test_the_first_half_pairs_with_the_second() -> None:
    rope = RotaryEmbedding(4, theta=10_000.0)
    cos, sin = rope(torch.tensor([[1]]), torch.float32)

    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4), cos, sin).flatten()

    torch.testing.assert_close(turned, torch.tensor([math.cos(1.0), 0.0, math.sin(1.0), 0.0]))


def test_shapes_and_dtype() -> None:
    cos, sin = RotaryEmbedding(8, theta=10_000.0)(torch.arange(5).expand(3, -1), torch.bfloat16)

    assert cos.shape == sin.shape == (3, 1, 5, 4)
    assert cos.dtype == sin.dtype == torch.bfloat16
