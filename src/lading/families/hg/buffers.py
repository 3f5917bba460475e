"""Buffers that no checkpoint holds, such as rotary frequencies, and dtypes that differ from the model's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lading.errors import NotSupportedError
from lading.families.hg.config import HuggingFaceModelConfig
from lading.families.hg.outline import outline


def other_dtypes(model: Module, config: HuggingFaceModelConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtypes of the parameters and persistent buffers that ``from_pretrained`` does not load in ``dtype``.

    :param model: the model, built in float32 on the meta device.
    """
    other = outline(config)
    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= set(other._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(other._keep_in_fp32_modules_strict or ())
    # transformers also searches for these patterns, so that "wo" matches every name with these letters.
    kept = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in sorted(patterns)) or "(?!)")

    others: dict[str, torch.dtype] = {}
    made = other.state_dict()
    for name, tensor in model.state_dict().items():
        if kept.search(name):
            own = torch.float32
        else:
            own = _dtype_when_built_in(dtype, tensor, made.get(name))
        if own != dtype:
            others[name] = own

    return others


def _dtype_when_built_in(dtype: torch.dtype, tensor: Tensor, other: Tensor | None) -> torch.dtype:
    """Return the dtype of a tensor in a model that is built in ``dtype``.

    Some tensors, such as rotary frequencies, always have the same dtype.

    :param tensor: the tensor in the model that is built in float32.
    :param other: the tensor in the model that is built in bfloat16; ``None`` if it has no tensor of that name.
    """
    follows = tensor.dtype == torch.float32 and (other is None or other.dtype != torch.float32)

    return dtype if follows else tensor.dtype


def reset_buffers(model: Module, config: HuggingFaceModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compute non-persistent buffers with transformers, as it does after its own load.

    Each is computed over zeros and over ones: a buffer that differs was not computed at all.

    :param dtype: the dtype of the model.

    :raises NotSupportedError: transformers computes a buffer in the constructor only.
    """
    _set_config_dtype(model.config, dtype)
    buffers = _non_persistent_buffers(model)
    if not buffers:
        return

    made = {} if dtype == torch.float32 else _non_persistent_buffers(outline(config))
    results: list[dict[str, Tensor]] = []
    with _only_buffers(model):
        for fill in (0, 1):
            for name, (owner, leaf, buffer) in buffers.items():
                own = _dtype_when_built_in(dtype, buffer, made[name][2]) if made else buffer.dtype
                owner._buffers[leaf] = torch.full_like(buffer, fill, device=device, dtype=own)
            _init_weights(model, model)
            results.append({name: owner.get_buffer(leaf) for name, (owner, leaf, _) in buffers.items()})

    left = [name for name, tensor in results[0].items() if not torch.equal(tensor, results[1][name])]
    if left:
        raise NotSupportedError(
            f"{type(model).__name__} of transformers does not compute {', '.join(left)} after a load, and no "
            "checkpoint holds it. Try a newer version of transformers."
        )


def _set_config_dtype(hf_config: Any, dtype: torch.dtype) -> None:
    """Set the dtype in the configuration of the model, as ``from_pretrained`` does."""
    hf_config.dtype = dtype
    for name in hf_config.sub_configs:
        if (part := getattr(hf_config, name, None)) is not None:
            part.dtype = dtype


def _non_persistent_buffers(model: Module) -> dict[str, tuple[Module, str, Tensor]]:
    """Return the buffers by name, each with its owner and its name there; a shared buffer appears under each name."""
    found = {}
    for prefix, owner in model.named_modules():
        for leaf in sorted(owner._non_persistent_buffers_set):
            buffer = owner._buffers.get(leaf)
            if buffer is not None:
                found[f"{prefix}.{leaf}" if prefix else leaf] = owner, leaf, buffer

    return found


@contextmanager
def _only_buffers(model: Module) -> Iterator[None]:
    """Mark all loaded tensors as initialized, so that transformers leaves them alone, as after its own load."""
    from transformers import initialization

    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad(), initialization.guard_torch_init_functions():
        yield


def _init_weights(module: Module, model: Any) -> None:
    """Initialize each submodule with the model that it belongs to, as transformers' ``initialize_weights`` does.

    Submodules without non-persistent buffers are skipped.
    """
    from transformers import PreTrainedModel

    if not any(part._non_persistent_buffers_set for part in module.modules()):
        return
    for child in module.children():
        _init_weights(child, child if isinstance(child, PreTrainedModel) else model)
    model._init_weights(module)
