"""Modules without memory, and how they come by it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lading.errors import InternalError, NotSupportedError
from lading.family import Family
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.targets import targets_of


def check_config_type(config: Any, family: Family[Any, Any]) -> None:
    """:raises TypeError: ``config`` is not of the family's configuration class."""
    if not isinstance(config, family.config_kls):
        raise TypeError(
            f"`config` must be of type {family.config_kls.__name__}, the configuration of the {family.name} family, "
            f"but is of type {type(config).__name__}"
        )


def build_on_meta(family: Family[Any, Any], config: Any) -> Module:
    """The module without memory. Parameters are float32 on the meta device, whatever the defaults of this process."""
    with _default_dtype(torch.float32), _no_collection(), torch.device("meta"):
        built = family.build(config)

    if not isinstance(built, family.kls):
        raise InternalError(
            f"The {family.name} family is expected to build a {family.kls.__name__}, but built a "
            f"{type(built).__name__}."
        )
    module: Module = built

    return module


@contextmanager
def _no_collection() -> Iterator[None]:
    # Thousands of new objects start a collection, which goes through all that torch has imported: ten times the build.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def create_model(
    family: Family[Any, Any], config: Any, *, device: torch.device, dtype: torch.dtype, meta: bool
) -> Module:
    """A new model with random parameters, or one without memory.

    :raises NotSupportedError: ``meta``, and the family cannot.
    """
    check_config_type(config, family)
    if meta and not family.supports_meta:
        raise NotSupportedError(f"Models of the {family.name} family cannot be made on the meta device.")

    module = build_on_meta(family, config)
    targets = targets_of(module, dtype=dtype)
    where = torch.device("meta") if meta else device
    empty = {
        name: torch.empty(shape, dtype=TORCH_DTYPES[own or ""], device=where)
        for name, shape, own in zip(targets.names, targets.shapes, targets.dtypes, strict=True)
    }
    assign(module, empty, targets.aliases)

    if not meta:
        family.init(module, config)
        reset_buffers(module, device)

    return module


def assign(module: Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Give the module its tensors; a tied parameter stays one object under all of its names."""
    state: dict[str, Tensor] = {}
    for name, own in module.state_dict(keep_vars=True).items():
        first = aliases.get(name, name)
        if first not in tensors:
            continue  # extra state
        if isinstance(own, Parameter):
            state[name] = state[first] if first in state else Parameter(tensors[first], own.requires_grad)
        else:
            state[name] = tensors[first]

    module.load_state_dict(state, strict=False, assign=True)


def reset_buffers(module: Module, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds, such as rotary frequencies.

    :raises InternalError: something of the module is still on the meta device afterwards.
    """
    for part in module.modules():
        reset = getattr(part, "reset_non_persistent_buffers", None)
        if reset is not None:
            reset(device)

    left = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    if left:
        raise InternalError(
            f"{type(module).__name__} leaves {', '.join(left)} without memory. Modules with non-persistent buffers "
            "must implement `reset_non_persistent_buffers(device)`."
        )
