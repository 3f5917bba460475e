"""LoRA adapters of tiny models: trained by PEFT, or written by hand."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def train(folder: Path, model: str, *, sizes: Any = None, **lora: Any) -> None:
    """Write what :func:`train_model` does, of a new model.

    :param model: the class in transformers, without ``ForCausalLM``.
    """
    import transformers

    torch.manual_seed(0)
    kls = getattr(transformers, f"{model}ForCausalLM", None) or transformers.GPT2LMHeadModel
    base = kls(getattr(transformers, f"{model}Config")(**(SIZES if sizes is None else sizes)))
    base.save_pretrained(folder / "base")
    train_model(folder, base, **{"task_type": "CAUSAL_LM"} | lora)


def train_model(folder: Path, base: Any, **lora: Any) -> None:
    """Write an ``adapter`` of PEFT with random values, and the ``merged.pt`` that PEFT makes of it and ``base``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        peft = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8} | lora))
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn(parameter.shape).to(parameter.dtype) * 0.05
        peft.save_pretrained(folder / "adapter")
        torch.save(dict(peft.merge_and_unload().state_dict()), folder / "merged.pt")


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    """Write an adapter as PEFT does; names begin after ``base_model.model.``, and ``None`` takes a key away."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / ADAPTER)
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None} | config
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))

    return folder


ADAPTER = "adapter_model.safetensors"


def factors(module: str, outputs: int, inputs: int, *, rank: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """The two matrices of a module."""
    generator = torch.Generator().manual_seed(seed)

    return {
        f"{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


Q_PROJ = "model.layers.0.self_attn.q_proj"


def within_one_ulp(found: Tensor, expected: Tensor) -> bool:
    """Return whether no element differs by more than the next number after the expected one."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    next_ = torch.nextafter(expected.abs(), torch.full_like(expected, float("inf"))) - expected.abs()

    return bool(((found - expected).abs() <= next_).all())
