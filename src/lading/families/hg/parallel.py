"""transformers' plans for parallel models, as those of lading: where a part of a plan has no equal here, its modules
stay whole on every rank.
"""

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
    """How ``model``, which may be without memory, is split over the ranks of gangs."""
    stated = {_star(name): style for name, style in (model._tp_plan or {}).items()}
    heads = _heads(model) if stated else {}
    tensor = _tensor(model, stated) if heads else {}

    return ParallelPlan(
        tensor=tensor or None,
        divisible=heads | _features(model, tensor) if tensor else {},
        units=tuple(_units(model)) or None,
    )


def _heads(model: PreTrainedModel) -> dict[str, int]:
    """The numbers of heads, which ranks have to divide; none where they are not told, or differ from layer to layer."""
    config: Any = model.config.get_text_config(decoder=True)
    try:
        return {name: size for name in _HEADS if isinstance(size := getattr(config, name, None), int)}
    except Exception as error:  # of no class in common over the versions of transformers
        log.info("the model stays whole: its configuration tells no number of heads: %s", error)
        return {}


def _tensor(model: Module, stated: Mapping[str, str]) -> dict[str, Split]:
    """What is done to modules, by transformers' plan.

    Modules beside one another go together: what one leaves split, another puts together.
    """
    modules = {_star(name): part for name, part in model.named_modules()}
    known = modules.keys() | {_star(name) for name, _ in model.named_parameters()}
    groups: dict[str, dict[str, str]] = {}
    for name in known & stated.keys():
        groups.setdefault(name.rpartition(".")[0], {})[name] = stated[name]

    found: dict[str, Split] = {}
    for parent, styles in groups.items():
        splits = {name: _split(name, style, modules.get(name)) for name, style in styles.items()}
        done = {name: split for name, split in splits.items() if split is not None}
        if others := sorted({style for name, style in styles.items() if name not in done}):
            log.info("modules of %s stay whole: there is no plan here for %s", parent or "the model", ", ".join(others))
        elif (Split.COLUMN in done.values()) != (Split.ROW in done.values()):
            log.info("modules of %s stay whole: what is split there is put together elsewhere", parent or "the model")
        else:
            found |= done

    return _with_ties(model, found)


def _split(name: str, style: str, module: Module | None) -> Split | None:
    """The equal of one of transformers' styles, if the module is of the kind that it is for."""
    split = _SPLITS.get(style)
    if split is Split.VOCABULARY:
        return split if isinstance(module, Embedding) else None
    if split is Split.HEADS:
        # Of norms of all heads together, each rank would need its part.
        return split if name.rpartition(".")[2] in ("q_norm", "k_norm") else None

    return split if isinstance(module, Linear) else None


def _with_ties(model: Module, splits: dict[str, Split]) -> dict[str, Split]:
    """Without what would split a parameter under one of its names only."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_star(name.rpartition(".")[0]))
    for tied in names.values():
        dims = {splits.get(name) for name in tied}
        if len(set(tied)) > 1 and dims not in ({Split.LOGITS, Split.VOCABULARY}, {None}):
            splits = {name: split for name, split in splits.items() if name not in tied}

    return splits


def _features(model: Module, splits: Mapping[str, Split]) -> dict[str, int]:
    """The numbers of features that are split, which ranks have to divide."""
    sizes: dict[str, int] = {}
    for name, part in model.named_modules():
        split = splits.get(_star(name))
        if split in (None, Split.HEADS):
            continue
        key = (
            "num_embeddings" if isinstance(part, Embedding) else "in_features" if split is Split.ROW else "out_features"
        )
        # A number divides all of several sizes if it divides what divides them all.
        sizes[f"{_star(name)}.{key}"] = gcd(getattr(part, key), sizes.get(f"{_star(name)}.{key}", 0))

    return sizes


def _units(model: PreTrainedModel) -> Iterator[str]:
    """The modules whose parameters are gathered together: those that transformers does not split over devices."""
    kinds = set(model._no_split_modules or ())
    names = (_star(name) for name, part in model.named_modules() if name and type(part).__name__ in kinds)
    yield from dict.fromkeys(names)


def _star(name: str) -> str:
    return NUMBER.sub("*", name)
