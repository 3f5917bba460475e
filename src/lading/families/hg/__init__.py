"""Any model of transformers 5, by its class there: ``pip install 'lading-hub[hf]'``.

transformers builds the module on the meta device, and lading reads the checkpoint, as for any other family. Code of a
repository never runs: ``auto_map`` in a ``config.json`` and ``trust_remote_code`` are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import torch
from torch import Tensor
from torch.nn import Module
from torch.overrides import TorchFunctionMode

from lading.cards.config import StrictConfig
from lading.cards.overrides import merge
from lading.errors import ModelCheckpointMismatchError, NotSupportedError, PolicyError
from lading.families.hg.buffers import other_dtypes, reset_buffers
from lading.families.hg.offline import offline_holds
from lading.families.hg.parallel import plan_of
from lading.families.hg.rules import rules_of
from lading.families.nn.checks import MAX_LABELS, MAX_LAYERS
from lading.models.family import Family
from lading.models.hub import ModelHubAccessor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ModelType = Literal["auto", "causal_lm", "seq2seq_lm", "custom"]

_AUTO_CLASSES: Mapping[str, str] = {
    "auto": "AutoModel",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}

_MAJOR = 5
"""The first major version of transformers that declares how the tensors of a checkpoint become parameters."""

_IGNORED_KEYS = frozenset(
    {
        # These name code of the repository, or kernels that transformers would fetch from the hub and run.
        "auto_map",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "kernel_config",
        "use_kernels",
        # This requests further weights from another repository.
        "use_pretrained_backbone",
    }
)

_FLOAT_KEY, _FLOAT_VALUES = "__float__", ("Infinity", "-Infinity", "NaN")
"""The key and values with which transformers 5 writes numbers that JSON does not have."""

_BOUNDS = (
    (("layer", "layers", "depths"), MAX_LAYERS, "layers"),
    # transformers stores the name of each, in 750 bytes.
    (("num_labels",), MAX_LABELS, "labels"),
)
"""The suffixes of keys, the largest valid number, and the noun for it."""


@dataclass(kw_only=True)
class HuggingFaceModelConfig(StrictConfig):
    """The configuration of a transformers model: its class and the content of its ``config.json``.

    The first fields are those of fairseq2 0.8.1. Those for processors, devices and dtypes exist for its cards and have
    no effect: the call to ``load_model`` decides device and dtype.
    """

    hf_name: str = ""
    """The hub repository of the model, for information only."""

    model_type: ModelType = "auto"
    """The kind of transformers class: the bare model, the class for causal or for sequence-to-sequence language
    modeling, or ``custom_model_class``."""

    use_processor: bool = False
    """No effect."""

    device: str = "cpu"
    """No effect."""

    custom_model_class: str | None = None
    """The name of the transformers class for ``custom``; ``None`` means the class that ``architectures`` names."""

    custom_processor_class: str | None = None
    """No effect."""

    trust_remote_code: bool = False
    """No effect: lading refuses a model that transformers itself does not have."""

    dtype: str | None = None
    """No effect."""

    load_kwargs: dict[str, Any] | None = None
    """No effect."""

    enable_gradient_checkpointing: bool = False
    """True to recompute activations in the backward pass instead of storing them."""

    hf_config: dict[str, Any] = field(default_factory=dict)
    """The content of ``config.json``. Values in a card override the file beside the checkpoint."""


def _from_hf(values: Mapping[str, object]) -> HuggingFaceModelConfig:
    named = _architecture(values)
    config = HuggingFaceModelConfig(
        model_type="auto" if named is None else "custom", custom_model_class=named, hf_config=dict(values)
    )
    _class_of(config)

    return config


def _complete(config: HuggingFaceModelConfig, hf_config: Mapping[str, object]) -> HuggingFaceModelConfig:
    config = replace(config, hf_config=merge(hf_config, config.hf_config, path="hf_config"))
    _class_of(config)

    return config


def _architecture(values: Mapping[str, object]) -> str | None:
    stated = values.get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else None

    return first if isinstance(first, str) else None


# --- the class -------------------------------------------------------------------------------------------------------


@offline_holds()
def _class_of(config: HuggingFaceModelConfig) -> tuple[Any, PretrainedConfig]:
    """Return the transformers class that builds the model, an ``Auto…`` class or its own, and its configuration.

    :raises NotSupportedError: transformers is not installed, is too old, or does not have the class.
    :raises PolicyError: the model needs code of its repository.
    """
    if not config.hf_config:
        raise NotSupportedError(
            "A model of the hg family needs a config.json beside its checkpoint, but there is no such file. Put its "
            "content into the card, as `hf_config` in `model_config`."
        )
    _require_transformers(config)
    import transformers

    hf_config = _hf_config(config)
    if config.model_type != "custom":
        return getattr(transformers, _AUTO_CLASSES[config.model_type]), hf_config

    name = config.custom_model_class or _architecture(config.hf_config)
    shared = _shared_classes(hf_config)
    known_as = name if name is None or hasattr(transformers, name) else shared.get(name, name)
    found = getattr(transformers, known_as, None) if known_as is not None and known_as.isidentifier() else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        _refuse(config, f"the class {name!r}")
    of_text: Any = hf_config.sub_configs.get("text_config")
    is_shared = found.__name__ in shared.values()
    if is_shared and found.config_class is of_text:
        return found, hf_config.get_text_config()
    if not is_shared and not isinstance(hf_config, found.config_class or transformers.PreTrainedConfig):
        raise NotSupportedError(
            f"{name} of transformers takes a {getattr(found.config_class, '__name__', None)}, but config.json is "
            f"of the model type {hf_config.model_type!r}."
        )

    return found, hf_config


def _shared_classes(hf_config: PretrainedConfig) -> Mapping[str, str]:
    """Return the transformers classes for models of this type, by the names of the type's own classes.

    A published ``config.json`` has the class names of the code in its repository: ``InternLM3ForCausalLM`` is
    ``LlamaForCausalLM`` in transformers.
    """
    from transformers.models.auto import modeling_auto

    own = type(hf_config).__name__.removesuffix("Config")
    found = {}
    for key, names in vars(modeling_auto).items():
        if key.startswith("MODEL_") and key.endswith("_MAPPING_NAMES"):
            stated = names.get(hf_config.model_type, ())
            for name in (stated,) if isinstance(stated, str) else stated:
                if kind := re.search(r"(For[A-Z]\w*|Model)$", name):
                    found[f"{own}{kind[1]}"] = name

    return found


def _require_transformers(config: HuggingFaceModelConfig) -> None:
    """Require transformers in a supported version.

    :raises NotSupportedError: it is not installed, or too old.
    """
    wanted = f"A model of the type {config.hf_config.get('model_type')!r} needs transformers {_MAJOR}"
    try:
        import transformers
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "transformers"
        why = "is not installed" if missing else f"cannot be imported: {error}"
        raise NotSupportedError(f"{wanted}, which {why}. Run `pip install 'lading-hub[hf]'` to install it.") from None
    if int(transformers.__version__.partition(".")[0]) < _MAJOR:
        raise NotSupportedError(
            f"{wanted}, but version {transformers.__version__} is installed. Run `pip install 'lading-hub[hf]'` to "
            "upgrade."
        )


def _hf_config(config: HuggingFaceModelConfig) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    model_type = config.hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        _refuse(config, f"the model type {model_type!r}")
    if (many := _excessive_count(config.hf_config)) is not None:
        raise _mismatch(many)

    try:
        return CONFIG_MAPPING[model_type].from_dict(_sanitize(config.hf_config))
    except Exception as error:  # a field of a wrong type may raise anything
        raise _mismatch(f"transformers cannot read it: {error}") from error


def _excessive_count(value: Any, key: str = "") -> str | None:
    """Return a text about the first key with more layers or labels than any model has, or ``None``."""
    if isinstance(value, int):
        for ends, most, what in _BOUNDS:
            if key.endswith(ends) and value > most:
                return f"`{key}`, which is {value}, is more than the {most} {what} that any model has"
        return None
    named = value.items() if isinstance(value, Mapping) else ()
    items = [(key, item) for item in value] if isinstance(value, list) else named

    return next((found for name, item in items if (found := _excessive_count(item, str(name))) is not None), None)


def _sanitize(value: Any) -> Any:
    """Return a copy with special numbers decoded, without keys that make transformers fetch or run something."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT_KEY} and value[_FLOAT_KEY] in _FLOAT_VALUES:
            return float(value[_FLOAT_KEY])
        return {key: _sanitize(item) for key, item in value.items() if key not in _IGNORED_KEYS}

    return [_sanitize(item) for item in value] if isinstance(value, list) else value


def _refuse(config: HuggingFaceModelConfig, what: str) -> NoReturn:
    """Refuse a model that transformers does not have.

    :raises NotSupportedError: always, or a :class:`PolicyError` if code of the repository has the model.
    """
    import transformers

    lacks = f"config.json asks for {what}, which transformers {transformers.__version__} does not have"
    if config.trust_remote_code or "auto_map" in config.hf_config:
        raise PolicyError(
            f"{lacks}: the model needs code of its repository, which lading never runs. Install a version of "
            "transformers that has it, or a package with its own family for it."
        )
    raise NotSupportedError(f"{lacks}, and no registered family reads it (`lading families` lists them).")


def _mismatch(problem: str) -> ModelCheckpointMismatchError:
    return ModelCheckpointMismatchError(
        "config.json",
        f"config.json must describe a model of transformers, but {problem}. Compare the file with the one "
        "that the publisher of the model provides.",
    )


# --- the module ------------------------------------------------------------------------------------------------------


@offline_holds()
def _build(config: HuggingFaceModelConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    kls, hf_config = _class_of(config)
    try:
        with _SkipInit():
            if config.model_type == "custom":
                model = kls._from_config(hf_config, dtype=dtype)
            else:
                model = kls.from_config(hf_config, dtype=dtype, trust_remote_code=False)
    except ImportError as error:
        raise NotSupportedError(f"{kls.__name__} of transformers needs another package: {error}") from error
    except Exception as error:  # inconsistent sizes may raise anything
        raise _mismatch(f"{kls.__name__} cannot be built from it: {error}") from error
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


def _outline(config: HuggingFaceModelConfig) -> PreTrainedModel:
    """Return a model on the meta device, for inspection; the last one is cached.

    It is built in bfloat16, to distinguish tensors of the dtype of the model from those that are always float32.
    """
    return _cached_outline(json.dumps([config.model_type, config.custom_model_class, config.hf_config], sort_keys=True))


@lru_cache(maxsize=1)
def _cached_outline(key: str) -> PreTrainedModel:
    model_type, custom_model_class, hf_config = json.loads(key)
    config = HuggingFaceModelConfig(model_type=model_type, custom_model_class=custom_model_class, hf_config=hf_config)
    with torch.device("meta"):
        return _build(config, torch.bfloat16)


def _may_lack(config: HuggingFaceModelConfig, names: Sequence[str]) -> Sequence[str]:
    """Return the names that ``from_pretrained`` does not require in a checkpoint.

    They are computed positions, and batch counters, which checkpoints of old versions of torch lack.
    """
    patterns = {*(_outline(config)._keys_to_ignore_on_load_missing or ()), r"(^|\.)num_batches_tracked$"}

    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def _untie(model: Module, names: Sequence[str]) -> None:
    """Untie parameters that the checkpoint stores with different values, as ``from_pretrained`` does."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner, tied = model.get_submodule(path), model.get_parameter(name)
        setattr(owner, leaf, torch.nn.Parameter(torch.empty_like(tied), tied.requires_grad))
        cast("PreTrainedModel", model).all_tied_weights_keys.pop(name, None)


# --- tensors that no checkpoint holds --------------------------------------------------------------------------------


def _init(model: Module, config: HuggingFaceModelConfig, name: str, tensor: Tensor) -> None:
    """Initialize one parameter as transformers does, in a model on the meta device with this parameter in memory."""
    from transformers import PreTrainedModel

    outline: Module = _outline(config)
    path, _, leaf = name.rpartition(".")
    steps = path.split(".") if path else []
    owners = [outline.get_submodule(".".join(steps[:i])) for i in range(len(steps) + 1)]
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


FAMILY = Family(
    name="hg",
    kls=Module,
    config_kls=HuggingFaceModelConfig,
    build=_build,
    init=_init,
    rules_of_names=lambda config, names: rules_of(_outline(config), names),
    may_lack=_may_lack,
    parallel_plan=lambda config: plan_of(_outline(config)),
    from_hf=_from_hf,
    reads_other_model_types=True,
    complete=_complete,
    untie=_untie,
    dtypes=lambda model, config, dtype: other_dtypes(model, dtype, _outline(config)),
    reset_buffers=lambda model, config, device, dtype: reset_buffers(model, device, dtype, lambda: _outline(config)),
)

get_hg_model_hub = ModelHubAccessor("hg", Module, HuggingFaceModelConfig)
