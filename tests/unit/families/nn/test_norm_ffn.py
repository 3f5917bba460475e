from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu

from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.ffn import GatedFeedForward
from lading.families.nn.norm import RMSNorm


def feed_forward(**options: Any) -> GatedFeedForward:
    spec = DecoderSpec(
        model_dim=6,
        vocab_size=8,
        max_seq_len=8,
        num_layers=1,
        num_attn_heads=1,
        num_key_value_heads=1,
        ffn_inner_dim=10,
        norm_eps=1e-6,
        rope_theta=1e4,
        **options,
    )

    return GatedFeedForward(spec)


def test_the_root_mean_square_becomes_one() -> None:
    norm = RMSNorm(64, eps=1e-8)
    torch.nn.init.ones_(norm.weight)

    y = norm(100.0 * torch.randn(3, 5, 64))

    torch.testing.assert_close(y.pow(2).mean(-1), torch.ones(3, 5))


def test_half_precision_is_normalised_in_float32() -> None:
    norm = RMSNorm(4, eps=1e-5).half()
    torch.nn.init.ones_(norm.weight)

    # The square of 1000 is beyond float16.
    y = norm(torch.full((1, 4), 1000.0, dtype=torch.float16))

    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones(1, 4, dtype=torch.float16))


def test_where_the_weight_is_applied() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32).to(torch.bfloat16)
    narrow, wide = (RMSNorm(32, eps=1e-5, wide=w).to(torch.bfloat16) for w in (False, True))
    for norm in (narrow, wide):
        torch.nn.init.constant_(norm.weight, 1.23)
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)

    assert torch.equal(narrow(x), unit.to(torch.bfloat16) * narrow.weight)
    assert torch.equal(wide(x), (unit * wide.weight.float()).to(torch.bfloat16))
    assert not torch.equal(narrow(x), wide(x))


def test_what_the_weight_is_counted_from() -> None:
    plain, shifted = RMSNorm(8, eps=1e-5), RMSNorm(8, eps=1e-5, offset=1.0)
    torch.nn.init.constant_(plain.weight, 1.25)
    torch.nn.init.constant_(shifted.weight, 0.25)
    x = torch.randn(3, 8)

    assert torch.equal(shifted(x), plain(x))


def test_the_gate_may_be_a_gelu() -> None:
    torch.manual_seed(0)
    ffn = feed_forward(ffn_activation="gelu_tanh")
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6)

    gate = gelu(linear(x, ffn.gate_proj.weight), approximate="tanh")
    torch.testing.assert_close(ffn(x), linear(gate * linear(x, ffn.up_proj.weight), ffn.down_proj.weight))


def test_the_feed_forward_network_is_gated() -> None:
    torch.manual_seed(0)
    ffn = feed_forward(ffn_bias=True)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 6)

    gate = linear(x, ffn.gate_proj.weight, ffn.gate_proj.bias)
    up = linear(x, ffn.up_proj.weight, ffn.up_proj.bias)

    torch.testing.assert_close(ffn(x), linear(silu(gate) * up, ffn.down_proj.weight, ffn.down_proj.bias))


def test_biases_are_optional() -> None:
    assert list(feed_forward().state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
