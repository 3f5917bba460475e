"""The modules of transformers: built on the meta device, and initialized."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from lading.errors import NotSupportedError
from lading.families.hg.config import HuggingFaceModelConfig, class_of, mismatch
from lading.families.hg.offline import offline_holds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@offline_holds()
def build(config: HuggingFaceModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kls, hf_config = class_of(config)
    try:
        with _SkipInit():
            if config.model_type == "custom":
                model = kls._from_config(hf_config, dtype=dtype)
            else:
                model = kls.from_config(hf_config, dtype=dtype, trust_remote_code=False)
    except ImportError as error:
        raise NotSupportedError(f"{kls.__name__} of transformers needs another package: {error}") from error
    except Exception as error:  # inconsistent sizes may raise anything
        raise mismatch(f"{kls.__name__} cannot be built from it: {error}") from error
    if config.enable_gradient_checkpointing:
        # Older versions of transformers 5 use the second name.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()

    return cast("PreTrainedModel", model)


class _SkipInit(TorchFunctionMode):
    """A mode that skips random initialization, which takes most of the time of a build on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]

        return func(*args, **(kwargs or {}))


def outline(config: HuggingFaceModelConfig) -> PreTrainedModel:
    """Return a model on the meta device, for inspection; the last one is cached.

    It is built in bfloat16, to distinguish tensors of the dtype of the model from those that are always float32.
    """
    return _cached_outline(json.dumps([config.model_type, config.custom_model_class, config.hf_config], sort_keys=True))


@lru_cache(maxsize=1)
def _cached_outline(key: str) -> PreTrainedModel:
    model_type, custom_model_class, hf_config = json.loads(key)
    config = HuggingFaceModelConfig(model_type=model_type, custom_model_class=custom_model_class, hf_config=hf_config)
    with torch.device("meta"):
        return build(config, torch.bfloat16)


def may_lack(config: HuggingFaceModelConfig, names: Sequence[str]) -> Sequence[str]:
    """Return the names that ``from_pretrained`` does not require in a checkpoint.

    They are computed positions, and batch counters, which checkpoints of old versions of torch lack.
    """
    patterns = {*(outline(config)._keys_to_ignore_on_load_missing or ()), r"(^|\.)num_batches_tracked$"}

    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def transposed(config: HuggingFaceModelConfig) -> frozenset[str]:
    """Return the weights of ``Conv1D``, which have the inputs as their first dim, as in GPT-2."""
    from transformers.pytorch_utils import Conv1D

    return frozenset(f"{name}.weight" for name, part in outline(config).named_modules() if isinstance(part, Conv1D))


def untie(model: Module, names: Sequence[str]) -> None:
    """Untie parameters that the checkpoint stores with different values, as ``from_pretrained`` does."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner, tied = model.get_submodule(path), model.get_parameter(name)
        setattr(owner, leaf, torch.nn.Parameter(torch.empty_like(tied), tied.requires_grad))
        cast("PreTrainedModel", model).all_tied_weights_keys.pop(name, None)


def init(model: Module, config: HuggingFaceModelConfig, name: str, tensor: Tensor) -> None:
    """Initialize one parameter as transformers does, in a model on the meta device with this parameter in memory."""
    from transformers import PreTrainedModel

    whole: Module = outline(config)
    path, _, leaf = name.rpartition(".")
    steps = path.split(".") if path else []
    owners = [whole.get_submodule(".".join(steps[:i])) for i in range(len(steps) + 1)]
    owner = owners[-1]
    held: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    before = held[leaf]
    with torch.no_grad():
        tensor.zero_()
        held[leaf] = torch.nn.Parameter(tensor, tensor.is_floating_point()) if held is owner._parameters else tensor
        try:
            if callable(reset := getattr(owner, "reset_parameters", None)):
                reset()
            for i in reversed(range(len(owners))):
                models = [each for each in owners[: i + 1] if isinstance(each, PreTrainedModel)]
                models[-1]._init_weights(owners[i])  # type: ignore[no-untyped-call]
        finally:
            held[leaf] = before
