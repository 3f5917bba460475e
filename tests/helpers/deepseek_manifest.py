"""The manifest of DeepSeek V3 as published: the names, dtypes and shapes of its 91,991 tensors."""

from __future__ import annotations

from collections.abc import Iterator

from lading.formats.manifest import Manifest
from tests.helpers.published_experts import manifest_of

Tensors = Iterator[tuple[str, str, tuple[int, ...]]]

DIM, HEADS, RANK, EXPERTS = 7168, 128, 512, 256


def tensors() -> Tensors:
    """Yield name, dtype and shape of each tensor, in the order of the layers."""
    yield "model.embed_tokens.weight", "BF16", (129_280, DIM)
    for i in range(62):
        layer = f"model.layers.{i}"
        if i == 61:  # drafts further tokens
            yield f"{layer}.embed_tokens.weight", "BF16", (129_280, DIM)
            yield f"{layer}.enorm.weight", "BF16", (DIM,)
            yield f"{layer}.hnorm.weight", "BF16", (DIM,)
            yield f"{layer}.eh_proj.weight", "BF16", (DIM, 2 * DIM)
        yield f"{layer}.input_layernorm.weight", "BF16", (DIM,)
        yield f"{layer}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", (RANK,)
        yield from scaled(f"{layer}.self_attn.q_a_proj", 1536, DIM)
        yield from scaled(f"{layer}.self_attn.q_b_proj", HEADS * 192, 1536)
        yield from scaled(f"{layer}.self_attn.kv_a_proj_with_mqa", RANK + 64, DIM)
        yield from scaled(f"{layer}.self_attn.kv_b_proj", HEADS * 256, RANK)
        yield from scaled(f"{layer}.self_attn.o_proj", DIM, HEADS * 128)
        yield f"{layer}.post_attention_layernorm.weight", "BF16", (DIM,)
        if i < 3:
            yield from gated(f"{layer}.mlp", 18_432)
            continue
        yield f"{layer}.mlp.gate.weight", "BF16", (EXPERTS, DIM)
        yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (EXPERTS,)
        yield from gated(f"{layer}.mlp.shared_experts", 2048)
        for e in range(EXPERTS):
            yield from gated(f"{layer}.mlp.experts.{e}", 2048)
        if i == 61:
            yield f"{layer}.shared_head.norm.weight", "BF16", (DIM,)
            yield f"{layer}.shared_head.head.weight", "BF16", (129_280, DIM)
    yield "model.norm.weight", "BF16", (DIM,)
    yield "lm_head.weight", "BF16", (129_280, DIM)


def gated(name: str, inner: int) -> Tensors:
    yield from scaled(f"{name}.gate_proj", inner, DIM)
    yield from scaled(f"{name}.up_proj", inner, DIM)
    yield from scaled(f"{name}.down_proj", DIM, inner)


def scaled(name: str, rows: int, columns: int) -> Tensors:
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def deepseek_manifest() -> Manifest:
    """Return the manifest of all tensors."""
    return manifest_of({name: (dtype, shape) for name, dtype, shape in tensors()})
