from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lading.families.nn.attention import AttentionMask, CausalSelfAttention, attend, causal_mask, query_factors
from lading.families.nn.decoder_spec import AttentionTemperature, DecoderSpec
from lading.families.nn.uninitialized import Linear

CPU = torch.device("cpu")


def full(mask: AttentionMask, n: int, new: int, keys: int) -> Tensor:
    """The mask spelled out, (N, new, K)."""
    if mask.is_causal:
        assert mask.visible is None
        assert new == keys
        return torch.ones(n, new, keys, dtype=torch.bool).tril()
    if mask.visible is None:
        return torch.ones(n, new, keys, dtype=torch.bool)
    return mask.visible[:, 0].expand(n, new, keys)


@pytest.mark.parametrize("past", [0, 1, 4, 9])
@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_masks(past: int, new: int, window: int | None, padded: bool, chunked: bool) -> None:
    torch.manual_seed(past + new)
    total = past + new
    first = 0 if window is None else max(0, past - (window - 1))
    padding = torch.rand(2, total) < 0.6 if padded else None

    mask = causal_mask(new, past=past, window=window, padding=padding, device=CPU, chunked=chunked)
    found = full(mask, 2, new, total - first)
    # Chunks start behind the padding on the left.
    starts = [0, 0] if padding is None else [next((i for i, p in enumerate(row) if p), total) for row in padding]

    for n, i, j in product(range(2), range(new), range(total - first)):
        query, key = past + i, first + j
        expected = key <= query and (window is None or query - key < window)
        if chunked and window is not None:
            expected = key <= query and (key - starts[n]) // window == (query - starts[n]) // window
        if padding is not None:
            expected = (expected and bool(padding[n, key])) or query == key
        assert bool(found[n, i, j]) == expected


@pytest.mark.parametrize(("past", "new", "window"), [(0, 5, None), (0, 5, 5), (0, 1, None), (7, 1, None), (7, 1, 3)])
def test_no_mask_is_made_unless_needed(past: int, new: int, window: int | None) -> None:
    assert causal_mask(new, past=past, window=window, padding=None, device=CPU).visible is None


def test_no_mask_of_chunks_is_made_within_the_first() -> None:
    for past, new in ((0, 5), (4, 1)):
        assert causal_mask(new, past=past, window=5, padding=None, device=CPU, chunked=True).visible is None
    assert causal_mask(1, past=5, window=5, padding=None, device=CPU, chunked=True).visible is not None


def test_the_factors_of_queries_grow_by_steps() -> None:
    found = query_factors(AttentionTemperature(scale=0.5, step=4), 5, past=2, device=CPU)

    steps = torch.tensor([0, 1, 1, 1, 1])  # tokens 3 to 7, counted from 1
    torch.testing.assert_close(found, 1 + 0.5 * torch.log(1.0 + steps)[:, None])


@pytest.mark.parametrize("masked", [False, True])
def test_a_group_of_queries_shares_its_keys(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = AttentionMask(visible=torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()) if masked else AttentionMask()

    found = attend(q, k, v, mask)

    assert found.shape == (2, 5, 48)
    for head in range(6):
        one = attend(q[:, head : head + 1], k[:, head // 3 : head // 3 + 1], v[:, head // 3 : head // 3 + 1], mask)
        torch.testing.assert_close(found[:, :, head * 8 : head * 8 + 8], one)


def test_names_and_shapes() -> None:
    spec = DecoderSpec(
        model_dim=24,
        vocab_size=8,
        max_seq_len=8,
        num_layers=1,
        num_attn_heads=4,
        num_key_value_heads=2,
        head_dim=10,
        ffn_inner_dim=32,
        norm_eps=1e-6,
        rope_theta=1e4,
        qkv_proj_bias=True,
        q_norm=True,
        k_norm=True,
    )
    attention = CausalSelfAttention(spec, 0)

    assert {name: tuple(t.shape) for name, t in attention.state_dict().items()} == {
        "q_proj.weight": (40, 24),
        "q_proj.bias": (40,),
        "k_proj.weight": (20, 24),
        "k_proj.bias": (20,),
        "v_proj.weight": (20, 24),
        "v_proj.bias": (20,),
        "o_proj.weight": (24, 40),
        "q_norm.weight": (10,),
        "k_norm.weight": (10,),
    }
    assert isinstance(attention.q_proj, Linear)
