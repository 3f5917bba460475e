"""Write a tiny Hugging Face style checkpoint: ``python tests/make_checkpoint.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from lading.families.qwen import QwenConfig

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
}


CARD_CONFIG = """\
model_config: {model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2,
  num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true,
  ffn_inner_dim: 64}
"""
"""The configuration in a card."""


def qwen_card(name: str, uri: object, **fields: object) -> str:
    """A card of the checkpoint; the values of other fields are as they stand in YAML."""
    stated = {"name": name, "model_family": "qwen", "checkpoint": uri, **fields}

    return "".join(f"{key}: {value}\n" for key, value in stated.items()) + CARD_CONFIG


def qwen_config() -> QwenConfig:
    """What lading reads :data:`CONFIG` as."""
    from lading.families.qwen import QwenConfig

    return QwenConfig(
        model_dim=32,
        max_seq_len=128,
        vocab_size=100,
        tied_embeddings=True,
        num_layers=2,
        num_attn_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        qkv_proj_bias=False,
        q_norm=True,
        k_norm=True,
        ffn_inner_dim=64,
        rope_theta=1_000_000.0,
    )


def tensors(layers: int = 2, dim: int = 32, ffn: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32).mul(0.1).bfloat16()

    state = {"model.embed_tokens.weight": random(100, dim), "model.norm.weight": random(dim)}
    for n in range(layers):
        layer = f"model.layers.{n}"
        state |= {
            f"{layer}.input_layernorm.weight": random(dim),
            f"{layer}.post_attention_layernorm.weight": random(dim),
            f"{layer}.self_attn.q_proj.weight": random(32, dim),
            f"{layer}.self_attn.k_proj.weight": random(16, dim),
            f"{layer}.self_attn.v_proj.weight": random(16, dim),
            f"{layer}.self_attn.o_proj.weight": random(dim, 32),
            f"{layer}.self_attn.q_norm.weight": random(8),
            f"{layer}.self_attn.k_norm.weight": random(8),
            f"{layer}.mlp.gate_proj.weight": random(ffn, dim),
            f"{layer}.mlp.up_proj.weight": random(ffn, dim),
            f"{layer}.mlp.down_proj.weight": random(dim, ffn),
        }
    return state


def make(folder: Path, shards: int = 1, **changes: object) -> Path:
    """A Qwen 3 of two layers with random weights, in ``shards`` files.

    :param changes: keys of ``config.json`` to set; ``None`` takes a key away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in (CONFIG | changes).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))

    state = tensors()
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    weight_map = {}
    for n in range(shards):
        name = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(state.items())[n::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]))
