"""Treatment of tensors by transformers beyond reading them: numbers that no checkpoint holds, such as rotary
frequencies, and dtypes that differ from the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from lading.errors import NotSupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def other_dtypes(model: Module, dtype: torch.dtype, outline: PreTrainedModel) -> dict[str, torch.dtype]:
    """Return the dtypes of those parameters and persistent buffers that ``from_pretrained`` does not load in ``dtype``.

    :param model: made in float32, without memory.
    :param outline: the same model, made in bfloat16.
    """
    patterns: set[str] = set()
    if dtype == torch.float16:
        patterns |= set(outline._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        patterns |= set(outline._keep_in_fp32_modules_strict or ())
    # transformers searches for these, too, so that "wo" stands for every name with these letters.
    kept = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in sorted(patterns)) or "(?!)")

    others: dict[str, torch.dtype] = {}
    made = outline.state_dict()
    for name, tensor in model.state_dict().items():
        if kept.search(name):
            own = torch.float32
        else:
            own = _dtype_in(dtype, tensor, made.get(name))
        if own != dtype:
            others[name] = own

    return others


def _dtype_in(dtype: torch.dtype, tensor: Tensor, other: Tensor | None) -> torch.dtype:
    """Return the dtype that a tensor has in a model that is made in ``dtype``.

    Some are always of one, as rotary frequencies are.

    :param tensor: in the model that is made in float32.
    :param other: in the one that is made in bfloat16; ``None`` where it has none of that name.
    """
    follows = tensor.dtype == torch.float32 and (other is None or other.dtype != torch.float32)

    return dtype if follows else tensor.dtype


def reset_buffers(
    model: Module, device: torch.device, dtype: torch.dtype, outline: Callable[[], PreTrainedModel]
) -> None:
    """Have transformers compute non-persistent buffers as it does after a load of its own.

    Each is computed over zeros and over ones: what differs then was not computed at all.

    :param dtype: of the model.
    :param outline: gives the same model without memory, made in bfloat16.

    :raises NotSupportedError: transformers computes one nowhere but in the constructor.
    """
    _state_dtype(model.config, dtype)
    buffers = _non_persistent_buffers(model)
    if not buffers:
        return

    dtypes = {} if dtype == torch.float32 else _buffer_dtypes(outline(), buffers, dtype)
    results: list[dict[str, Tensor]] = []
    with _only_buffers(model):
        for fill in (0, 1):
            for name, (owner, leaf, buffer) in buffers.items():
                own = dtypes.get(name, buffer.dtype)
                owner._buffers[leaf] = torch.full_like(buffer, fill, device=device, dtype=own)
            _init_weights(model, model)
            results.append({name: owner.get_buffer(leaf) for name, (owner, leaf, _) in buffers.items()})

    left = [name for name, tensor in results[0].items() if not torch.equal(tensor, results[1][name])]
    if left:
        raise NotSupportedError(
            f"{type(model).__name__} of transformers does not compute {', '.join(left)} after a load, and no "
            "checkpoint holds it. A newer version of transformers may."
        )


def _state_dtype(hf_config: Any, dtype: torch.dtype) -> None:
    """Have the model's configuration say what it holds, as after ``from_pretrained``."""
    hf_config.dtype = dtype
    for name in hf_config.sub_configs:
        if (part := getattr(hf_config, name, None)) is not None:
            part.dtype = dtype


def _non_persistent_buffers(model: Module) -> dict[str, tuple[Module, str, Tensor]]:
    """By name, each with its owner and its name there; a buffer that several names share comes under each."""
    found = {}
    for prefix, owner in model.named_modules():
        for leaf in sorted(owner._non_persistent_buffers_set):
            buffer = owner._buffers.get(leaf)
            if buffer is not None:
                found[f"{prefix}.{leaf}" if prefix else leaf] = owner, leaf, buffer

    return found


def _buffer_dtypes(
    outline: PreTrainedModel, buffers: Mapping[str, tuple[Module, str, Tensor]], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the dtypes that ``buffers``, of a model made in float32, have in one that is made in ``dtype``."""
    others = _non_persistent_buffers(outline)

    return {name: _dtype_in(dtype, buffer, others[name][2]) for name, (_, _, buffer) in buffers.items()}


@contextmanager
def _only_buffers(model: Module) -> Iterator[None]:
    """Have transformers leave alone all that was loaded, as it does after a load of its own: by its mark."""
    from transformers import initialization

    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    with torch.no_grad(), initialization.guard_torch_init_functions():
        yield


def _init_weights(module: Module, model: Any) -> None:
    """What transformers' ``initialize_weights`` does, each part by the model that it belongs to.

    Parts without non-persistent buffers are passed over.
    """
    from transformers import PreTrainedModel

    if not any(part._non_persistent_buffers_set for part in module.modules()):
        return
    for child in module.children():
        _init_weights(child, child if isinstance(child, PreTrainedModel) else model)
    model._init_weights(module)
