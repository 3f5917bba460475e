"""transformers' plans for parallel models, as those of lading: where a part of a plan has no equal here, its modules
stay whole on every rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch.nn import Embedding, Linear, Module

from lading.nn.sharding import ParallelPlan, Split

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

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def plan_of(model: PreTrainedModel) -> ParallelPlan:
    """How ``model``, which may be without memory, is split over the ranks of gangs."""
    stated = {_star(name): style for name, style in (model._tp_plan or {}).items()}
    tensor = _tensor(model, stated) if stated else None

    return ParallelPlan(
        tensor=tensor or None,
        divisible=_divisible(model, tensor) if tensor else {},
        units=tuple(_units(model)) or None,
    )


def _tensor(model: Module, stated: Mapping[str, str]) -> dict[str, Split]:
    """What is done to modules, by transformers' plan.

    Modules beside one another go together: what one leaves split, another puts together.
    """
    modules = {_star(name): part for name, part in model.named_modules()}
    groups: dict[str, dict[str, str]] = {}
    for name, style in stated.items():
        if name in modules or any(known.startswith(f"{name}.") for known in modules) or _is_parameter(model, name):
            groups.setdefault(name.rpartition(".")[0], {})[name] = style

    found: dict[str, Split] = {}
    for parent, styles in groups.items():
        splits = {name: _split(name, style, modules.get(name)) for name, style in styles.items()}
        if others := sorted(style for name, style in styles.items() if splits[name] is None):
            log.info("modules of %s stay whole: lading has no plan for %s", parent or "the model", ", ".join(others))
        else:
            found |= {name: split for name, split in splits.items() if split is not None}

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


def _divisible(model: PreTrainedModel, splits: Mapping[str, Split]) -> dict[str, int]:
    """The sizes that ranks have to divide: heads, and the features that are split."""
    config: Any = model.config.get_text_config(decoder=True)
    sizes = {name: size for name in _HEADS if isinstance(size := getattr(config, name, None), int)}
    for name, part in model.named_modules():
        split = splits.get(_star(name))
        if split in (Split.COLUMN, Split.LOGITS) and isinstance(part, Linear):
            sizes[f"{_star(name)}.out_features"] = part.out_features
        elif split is Split.ROW and isinstance(part, Linear):
            sizes[f"{_star(name)}.in_features"] = part.in_features
        elif split is Split.VOCABULARY and isinstance(part, Embedding):
            sizes[f"{_star(name)}.num_embeddings"] = part.num_embeddings

    return sizes


def _units(model: PreTrainedModel) -> Iterator[str]:
    """The modules whose parameters are gathered together: those that transformers does not split over devices."""
    kinds = set(model._no_split_modules or ())
    names = (_star(name) for name, part in model.named_modules() if name and type(part).__name__ in kinds)
    yield from dict.fromkeys(names)


def _is_parameter(model: Module, name: str) -> bool:
    return any(_star(own) == name for own, _ in model.named_parameters())


def _star(name: str) -> str:
    return _NUMBER.sub("*", name)
