"""The configuration of a transformers model, and the class in transformers that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from lading.cards.overrides import merge
from lading.errors import ModelCheckpointMismatchError, NotSupportedError, PolicyError
from lading.families.hg.offline import offline_holds
from lading.families.nn.checks import MAX_LABELS, MAX_LAYERS
from lading.system.needs import needs_torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
        # A load dequantizes the weights.
        "quantization_config",
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
class HuggingFaceModelConfig:
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


def from_hf(values: Mapping[str, object]) -> HuggingFaceModelConfig:
    named = _architecture(values)
    config = HuggingFaceModelConfig(
        model_type="auto" if named is None else "custom", custom_model_class=named, hf_config=dict(values)
    )
    class_of(config)

    return config


def complete(config: HuggingFaceModelConfig, hf_config: Mapping[str, object]) -> HuggingFaceModelConfig:
    config = replace(config, hf_config=merge(hf_config, config.hf_config, path="hf_config"))
    class_of(config)

    return config


def _architecture(values: Mapping[str, object]) -> str | None:
    stated = values.get("architectures")
    first = stated[0] if isinstance(stated, list) and stated else None

    return first if isinstance(first, str) else None


# --- the class -------------------------------------------------------------------------------------------------------


@offline_holds()
def class_of(config: HuggingFaceModelConfig) -> tuple[Any, PretrainedConfig]:
    """Return the transformers class that builds the model, an ``Auto…`` class or its own, and its configuration.

    :raises NotSupportedError: transformers is not installed, is too old, or does not have the class.
    :raises PolicyError: the model needs code of its repository.
    """
    if not config.hf_config:
        raise NotSupportedError(
            "A model of the hg family needs a config.json beside its checkpoint, but the file does not exist. Put its "
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
    with needs_torch("A model of the hg family"):
        import torch  # noqa: F401 (without it transformers has the names of its classes only)

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
        raise mismatch(many)

    try:
        return CONFIG_MAPPING[model_type].from_dict(_sanitize(config.hf_config))
    except Exception as error:  # a field of a wrong type may raise anything
        raise mismatch(f"transformers cannot read it: {error}") from error


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


def mismatch(problem: str) -> ModelCheckpointMismatchError:
    return ModelCheckpointMismatchError(
        "config.json",
        f"config.json must describe a model of transformers, but {problem}. Compare the file with the one "
        "that the publisher of the model provides.",
    )
