"""Mixtures of experts against those of transformers: the same weights give the same outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts import MixtureOfExperts
from lading.families.nn.experts_spec import ExpertsSpec
from lading.models.targets import Buffer
from tests.helpers.parity_tools import randomise, relative_difference

TOLERANCE = 1e-5
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


def deepseek(**others: Any) -> nn.Module:
    from transformers.models.deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    return DeepseekV3MoE(
        DeepseekV3Config(
            **SIZES, moe_intermediate_size=12, n_routed_experts=12, num_experts_per_tok=4, n_group=3, topk_group=2,
            n_shared_experts=2, **others,
        )
    )  # fmt: skip


def llama4(**others: Any) -> nn.Module:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    return Llama4TextMoe(Llama4TextConfig(**SIZES, intermediate_size=12, num_local_experts=5, **others))


DEEPSEEK: dict[str, Any] = {
    "num_experts": 12, "top_k": 4, "inner_dim": 12, "num_groups": 3, "top_k_groups": 2, "shared_inner_dim": 24,
    "scores": "sigmoid", "correction_bias": True, "wide_router": True,
}  # fmt: skip
LLAMA4: dict[str, Any] = {
    "num_experts": 5, "inner_dim": 12, "shared_inner_dim": 12, "scores": "sigmoid", "weighs_inputs": True,
    "transposed": True, "router_name": "router", "shared_name": "shared_expert",
}  # fmt: skip

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "deepseek": (
        lambda: deepseek(norm_topk_prob=True, routed_scaling_factor=2.5), {**DEEPSEEK, "normalized": True, "scale": 2.5}
    ),
    "deepseek-not-normalized": (lambda: deepseek(norm_topk_prob=False, routed_scaling_factor=1.0), DEEPSEEK),
    "llama4": (lambda: llama4(num_experts_per_tok=1), {**LLAMA4, "top_k": 1}),
    "llama4-two-experts": (lambda: llama4(num_experts_per_tok=2), {**LLAMA4, "top_k": 2}),
}  # fmt: skip


def pair(case: str) -> tuple[MixtureOfExperts, nn.Module]:
    make, options = CASES[case]
    torch.manual_seed(0)
    theirs = make().eval()
    randomise(theirs)
    for buffer in theirs.buffers():
        buffer.uniform_(-0.3, 0.3)
    spec = DecoderSpec(
        model_dim=32, vocab_size=9, max_seq_len=9, num_layers=1, num_attn_heads=4, num_key_value_heads=4,
        ffn_inner_dim=12, norm_eps=1e-6, rope_theta=1e4,
    )  # fmt: skip
    ours = MixtureOfExperts(ExpertsSpec(**options), spec).eval()
    shapes = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    stated = ExpertsSpec(**options).shapes(32)
    assert {name: s.shape if isinstance(s, Buffer) else s for name, s in stated.items()} == shapes
    ours.load_state_dict(theirs.state_dict())

    return ours, theirs


def first(value: Any) -> Tensor:
    """The output, without the logits that some return beside it."""
    return value[0].reshape(3, 7, 32) if isinstance(value, tuple) else value


@pytest.mark.parametrize("case", CASES)
def test_the_same_outputs_and_gradients(case: str) -> None:
    ours, theirs = pair(case)
    x = torch.randn(3, 7, 32, requires_grad=True)
    y = x.detach().clone().requires_grad_()

    found, expected = ours(x), first(theirs(y))
    found.square().mean().backward()
    expected.square().mean().backward()

    assert relative_difference(found, expected) <= TOLERANCE
    assert torch.equal(ours(x), found)
    assert relative_difference(x.grad, y.grad) <= 10 * TOLERANCE
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert relative_difference(parameter.grad, their_gradients[name]) <= 10 * TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_no_tokens(case: str) -> None:
    ours, _ = pair(case)
    x = torch.zeros(1, 0, 32, requires_grad=True)

    y = ours(x)
    y.sum().backward()

    assert y.shape == x.shape
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, _ = pair("deepseek")
    x = torch.randn(2, 3, 32)
    exact = ours(x)

    found = ours.to(dtype)(x.to(dtype))

    assert found.dtype == dtype
    assert relative_difference(found.float(), exact) <= (1e-5 if dtype == torch.float64 else 0.1)
