"""The conversion of transformers' parallel plans to lading's; modules of unknown style stay whole on every rank."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any

from torch.nn import Embedding, Linear, Module

from lading.families.hg.rules import NUMBER
from lading.models.parallel_plan import ParallelPlan, Split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("lading")

_SPLITS: Mapping[str, Split] = {
    "colwise": Split.COLUMN,
    "rowwise": Split.ROW,
    "colwise_gather_output": Split.LOGITS,
    "colwise_rep": Split.LOGITS,
    "embedding_rowwise": Split.VOCABULARY,
    "replicated_with_grad_allreduce": Split.HEADS,
}

_HEADS = ("num_attention_heads", "num_key_value_heads")


def plan_of(model: PreTrainedModel) -> ParallelPlan:
    """Return the plan that splits ``model``, which may be on the meta device, over the ranks of gangs."""
    stated = {_generalize(name): style for name, style in (model._tp_plan or {}).items()}
    heads = _heads(model) if stated else {}
    tensor = _tensor(model, stated) if heads else {}

    return ParallelPlan(
        tensor=tensor or None,
        divisible=heads | _features(model, tensor) if tensor else {},
        units=tuple(_units(model)) or None,
    )


def _heads(model: PreTrainedModel) -> dict[str, int]:
    """Return the numbers of heads, which ranks must divide; empty if they are unknown or differ between layers."""
    config: Any = model.config.get_text_config(decoder=True)
    try:
        return {name: size for name in _HEADS if isinstance(size := getattr(config, name, None), int)}
    except Exception as error:  # versions of transformers raise different classes
        log.info("the model stays whole: its configuration has no number of heads: %s", error)
        return {}


def _tensor(model: Module, stated: Mapping[str, str]) -> dict[str, Split]:
    """Return the splits of modules in transformers' plan.

    Sibling modules belong together: one splits an activation that another gathers.
    """
    modules = {_generalize(name): part for name, part in model.named_modules()}
    known = modules.keys() | {_generalize(name) for name, _ in model.named_parameters()}
    groups: dict[str, dict[str, str]] = {}
    for name in known & stated.keys():
        groups.setdefault(name.rpartition(".")[0], {})[name] = stated[name]

    found: dict[str, Split] = {}
    for parent, styles in groups.items():
        splits = {name: _split(name, style, modules.get(name)) for name, style in styles.items()}
        done = {name: split for name, split in splits.items() if split is not None}
        if others := sorted({style for name, style in styles.items() if name not in done}):
            log.info("modules of %s stay whole: lading has no split for %s", parent or "the model", ", ".join(others))
        elif (Split.COLUMN in done.values()) != (Split.ROW in done.values()):
            log.info("modules of %s stay whole: other modules gather the activations they split", parent or "the model")
        else:
            found |= done

    return _without_broken_ties(model, found)


def _split(name: str, style: str, module: Module | None) -> Split | None:
    """Return the split for one of transformers' styles, or ``None`` if it does not apply to the module."""
    split = _SPLITS.get(style)
    if split is Split.VOCABULARY:
        return split if isinstance(module, Embedding) else None
    if split is Split.HEADS:
        # A norm over all heads together would have to be split.
        return split if name.rpartition(".")[2] in ("q_norm", "k_norm") else None

    return split if isinstance(module, Linear) else None


def _without_broken_ties(model: Module, splits: dict[str, Split]) -> dict[str, Split]:
    """Remove the splits that would split a tied parameter under one of its names only."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_generalize(name.rpartition(".")[0]))
    for tied in names.values():
        dims = {splits.get(name) for name in tied}
        if len(set(tied)) > 1 and dims not in ({Split.LOGITS, Split.VOCABULARY}, {None}):
            splits = {name: split for name, split in splits.items() if name not in tied}

    return splits


def _features(model: Module, splits: Mapping[str, Split]) -> dict[str, int]:
    """Return the numbers of features that are split, which ranks must divide."""
    sizes: dict[str, int] = {}
    for name, part in model.named_modules():
        split = splits.get(_generalize(name))
        if split in (None, Split.HEADS):
            continue
        key = (
            "num_embeddings" if isinstance(part, Embedding) else "in_features" if split is Split.ROW else "out_features"
        )
        # A number divides several sizes if it divides their greatest common divisor.
        sizes[f"{_generalize(name)}.{key}"] = gcd(getattr(part, key), sizes.get(f"{_generalize(name)}.{key}", 0))

    return sizes


def _units(model: PreTrainedModel) -> Iterator[str]:
    """Yield the modules whose parameters are gathered together: those that transformers keeps on one device."""
    kinds = set(model._no_split_modules or ())
    names = (_generalize(name) for name, part in model.named_modules() if name and type(part).__name__ in kinds)
    yield from dict.fromkeys(names)


def _generalize(name: str) -> str:
    return NUMBER.sub("*", name)
