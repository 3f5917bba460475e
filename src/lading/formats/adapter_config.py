"""Reader of a LoRA adapter's ``adapter_config.json``, as PEFT writes it.

A field that this reader does not know, and that is set, may change how the weights are merged, so it is refused by its
name rather than ignored.

Source: PEFT 0.21 (``peft/tuners/lora/config.py``, ``peft/utils/other.py``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lading.errors import CorruptModelCheckpointError, NotSupportedError

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"

_MERGED = frozenset({"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "modules_to_save", "init_lora_weights"})
"""The fields that decide how the tensors are merged."""

_IRRELEVANT = frozenset(
    {
        # They choose what is trained; the names of the tensors say which modules were.
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias",
        # The shapes of the tensors say the ranks.
        "r", "rank_pattern",
        # The class of a module decides, for PEFT, too.
        "fan_in_fan_out",
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
        "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
        "runtime_config", "qalora_group_size",
    }
)  # fmt: skip
"""The fields that do not change how the tensors are merged."""

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""The values of ``init_lora_weights`` that leave the weights of the base as they are."""

_MAX_NUMBER = 1e30
"""A bound for numbers, far above those of adapters: larger integers may not fit into a float."""

_MAX_KEYS = 10_000
"""The most entries of a field; PEFT writes at most one per module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """The part of an adapter's configuration that decides how its tensors are merged into weights."""

    alpha: float
    alphas: Mapping[str, float]
    """Other values of ``alpha``, by names or regular expressions of modules."""
    root: bool
    """``True`` if ``alpha`` is divided by the square root of the rank, instead of by the rank."""
    saved: tuple[str, ...]
    """The names of modules that were trained whole."""
    base: str | None
    """The name or the path of the model that it was trained on."""

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of the product of the two matrices of a module.

        :raises NotSupportedError: an expression for modules could take too long to match.
        """
        alpha = next((alpha for key, alpha in self.alphas.items() if _matches(key, module)), self.alpha)

        return alpha / (math.sqrt(rank) if self.root else rank)


def parse_adapter_config(config: Mapping[str, object], *, label: str) -> LoraConfig:
    """Return the configuration of a LoRA adapter.

    :param config: the content of its ``adapter_config.json``.
    :param label: the path or the address of the adapter, for errors.

    :raises NotSupportedError: it is of another type than LoRA, or uses a variant that cannot be merged.
    :raises CorruptModelCheckpointError: a field has a value of another type.
    """
    _refuse_others(config, label)

    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or len(alphas) > _MAX_KEYS:
        raise _wrong(label, "alpha_pattern", f"a mapping of at most {_MAX_KEYS:,} modules to numbers", alphas)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or len(saved) > _MAX_KEYS or not all(isinstance(name, str) for name in saved):
        raise _wrong(label, "modules_to_save", f"a list of at most {_MAX_KEYS:,} names", saved)
    root = config.get("use_rslora") or False
    if not isinstance(root, bool):
        raise _wrong(label, "use_rslora", "true or false", root)
    base = config.get("base_model_name_or_path")

    return LoraConfig(
        alpha=_number(config.get("lora_alpha", 8), "lora_alpha", label),
        alphas={key: _number(alpha, f"alpha_pattern.{key}", label) for key, alpha in alphas.items()},
        root=root,
        saved=tuple(saved),
        base=base if isinstance(base, str) else None,
    )


def _refuse_others(config: Mapping[str, object], label: str) -> None:
    """Require that nothing but plain LoRA makes the weights.

    :raises NotSupportedError: something else does.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise NotSupportedError(
            f"The adapter at {label} is expected to be of the `peft_type` 'LORA' ({ADAPTER_CONFIG_NAME}), but is of "
            f"{kind!r}. {_BY_PEFT}"
        )
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS:
        raise NotSupportedError(
            f"The adapter at {label} was initialized by {init!r} ({ADAPTER_CONFIG_NAME}: `init_lora_weights`), which "
            "changes the weights of the base, so it does not fit the original ones. Save it again with "
            "`save_pretrained(folder, path_initial_model_for_weight_conversion=…)`, which makes a plain one."
        )
    for name, value in config.items():
        if name not in _MERGED | _IRRELEVANT and value not in (None, False, 0, "", "none") and value not in ([], {}):
            raise NotSupportedError(
                f"The adapter at {label} uses {name!r} ({ADAPTER_CONFIG_NAME}: {_shown(value)}), expected plain LoRA. "
                f"{_BY_PEFT}"
            )


_BY_PEFT = (
    "Merge it with PEFT, `merge_and_unload()`, save the result with `save_pretrained(folder)`, and state that folder "
    "as `checkpoint`."
)


def _number(value: object, name: str, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _MAX_NUMBER:
        raise _wrong(label, name, "a finite number", value)

    return float(value)


def _wrong(label: str, name: str, expected: str, found: object) -> CorruptModelCheckpointError:
    return CorruptModelCheckpointError(
        label,
        f"{ADAPTER_CONFIG_NAME} of {label}: expected {name!r} to be {expected}, found {_shown(found)}. Save the "
        "adapter again with `save_pretrained`.",
    )


def _shown(value: object) -> str:
    text = repr(value)

    return text if len(text) <= 80 else text[:79] + "…"


# --- expressions for modules ------------------------------------------------------------------------------------------

_LITERAL = re.compile(r"[\w.\-]*")
_REPEAT = re.compile(r"(?<!\\)[*+?{]")
_MAX_REPEATS = 2
_MAX_LENGTH = 200


def _matches(key: str, module: str) -> bool:
    """Return whether a key of a pattern means a module: the end of its name, from the beginning of a component on.

    :raises NotSupportedError: the expression could take too long to match.
    """
    if _LITERAL.fullmatch(key) and not _may_match(key, module):
        return False
    compiled = _compile(key)

    return any(compiled.fullmatch(module, start) for start in [0, *(dot.end() for dot in re.finditer(r"\.", module))])


def _may_match(key: str, module: str) -> bool:
    # A dot of an expression matches any character.
    return len(key) <= len(module) and all(
        mine in (".", theirs) for mine, theirs in zip(reversed(key), reversed(module), strict=False)
    )


def _compile(key: str) -> re.Pattern[str]:
    # Of these, no expression takes more than the third power of the length of a name.
    grouped = key.count("(") + len(_REPEAT.findall(key)) > _MAX_REPEATS or re.search(r"\)[*+?{]", key)
    if len(key) > _MAX_LENGTH and not _LITERAL.fullmatch(key):
        grouped = True
    try:
        if not grouped:
            return re.compile(key)
    except (re.error, RecursionError, OverflowError):
        pass

    raise NotSupportedError(
        f"The key {_shown(key)} of `alpha_pattern` ({ADAPTER_CONFIG_NAME}) is expected to be the name of a module, or "
        f"a regular expression with at most {_MAX_REPEATS} groups and repetitions, none of them nested. Replace it by "
        "the names of the modules."
    )
