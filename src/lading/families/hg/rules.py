"""The conversion of transformers' checkpoint mappings to rules.

transformers applies regular expressions one after another, and looks at the names in the model. Here each name of the
checkpoint goes through them, and names that differ only in numbers then share a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lading.errors import NotSupportedError
from lading.planning.composition import Regroup
from lading.planning.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A number that is a whole component of a dotted name."""

_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|(^|\.)position_ids$|(^|\.)attn\.(masked_)?bias$")
"""The names of buffers that old versions of transformers save."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_STACK = "a"


def rules_of(model: PreTrainedModel, names: Sequence[str]) -> list[Rule]:
    """Return the rules with which tensors of these names make the parameters of ``model``.

    :raises NotSupportedError: no rule expresses how transformers computes a parameter.
    """
    names = list(dict.fromkeys(name.partition("#")[0] for name in names))  # parts that ranks saved need no rule
    by_form: dict[str, list[tuple[Rule, ...]]] = {}
    for rules in _rules_of_names(model, names):
        by_form.setdefault(NUMBER.sub("#", rules[0].source), []).append(rules)

    return [rule for group in by_form.values() for rule in _merge_rules(group)]


# --- transformers' mappings ------------------------------------------------------------------------------------------


def _rules_of_names(model: PreTrainedModel, names: Sequence[str]) -> Iterator[tuple[Rule, ...]]:
    """Yield the rules of each name, several if its tensor is cut; ``stack`` is set, but has no placeholder yet."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = model.base_model_prefix
    dropped = _dropped(model, names)

    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, shapes)
        if renamed not in shapes and name in shapes:
            renamed, pattern = rename_source_key(name, [], [], prefix, shapes)

        if renamed not in shapes and dropped(renamed):
            yield (Rule(name, None, computed=_COMPUTED.search(name) is not None),)
        elif pattern is None or renamed not in shapes:
            yield (Rule(name, renamed),)
        else:
            yield _convert(model, name, renamed, by_pattern[pattern], pattern, shapes)


def _dropped(model: PreTrainedModel, names: Sequence[str]) -> Callable[[str], bool]:
    """Return a predicate for names that are not in the model and not needed by it."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= _draft_layers(model.config)
    patterns.add(_COMPUTED.pattern)
    known = re.compile("|".join(f"(?:{pattern})" for pattern in sorted(patterns)))
    prefix = f"{model.base_model_prefix}."
    # A model without a head, loaded from a checkpoint with one.
    is_base = len(prefix) > 1 and not hasattr(model, model.base_model_prefix)
    of_head = is_base and any(name.startswith(prefix) for name in names)

    return lambda name: known.search(name) is not None or (of_head and not name.startswith(prefix))


def _draft_layers(config: Any) -> set[str]:
    """Return a pattern for the layers after the last one that draft further tokens, if the configuration has any."""
    config = config.get_text_config()
    first, count = getattr(config, "num_hidden_layers", None), getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(first, int) or not isinstance(count, int) or not 0 < count <= _MAX_DRAFT_LAYERS:
        return set()

    return {rf"(^|\.)layers\.({'|'.join(str(first + i) for i in range(count))})\."}


_MAX_DRAFT_LAYERS = 100
"""The largest number of draft layers, each a part of an expression; published models have one."""


def _convert(
    model: PreTrainedModel,
    name: str,
    renamed: str,
    converter: Any,
    pattern: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[Rule, ...]:
    """Return the rules for the tensor ``name`` that do what transformers' operations do.

    :raises NotSupportedError: rules do not express one of the operations.
    """
    from transformers.core_model_loading import (
        Chunk,
        Concatenate,
        Interleave,
        MergeModulelist,
        PermuteForRope,
        Split,
    )

    rule, stacked = Rule(name, renamed), 0
    targets = [renamed.replace(converter.target_patterns[0], each) for each in converter.target_patterns]
    cuts: list[tuple[int, int, int]] | None = None
    many = "*" in pattern
    orders: list[Regroup | None] = [None] * len(targets)

    for operation in converter.operations:
        match operation:
            case MergeModulelist(dim=0) if many and not stacked:
                rule, stacked = replace(rule, stack=_STACK), 1
                many = False
            case Concatenate(dim=dim, num_shards_attribute=None) if not many and dim >= stacked:
                rule = replace(rule, concat=(dim - stacked, converter.source_patterns.index(pattern)))
            case Chunk(dim=dim, num_shards_attribute=None) if all(target in shapes for target in targets):
                cuts = _cuts(dim, [shapes[target][dim] for target in targets])
            case Split(dim=dim) if all(target in shapes for target in targets):
                cuts = _cuts(dim, [shapes[target][dim] for target in targets])
            case Interleave(dim=dim) if cuts is None and not stacked:
                size = shapes[renamed][dim] * len(targets)
                rows = 2 if operation.inverse else size // 2
                rule = replace(rule, order=Regroup(dim, rows, size // rows))
            case PermuteForRope() if not stacked and rule.concat is None:
                for i, target in enumerate(targets):
                    # If the tensor was cut before, the patterns of the targets identify its parts.
                    known_as = pattern if cuts is None else converter.target_patterns[i]
                    only = operation.permute_layer_names
                    if only is None or any(each in known_as for each in only):
                        orders[i] = _rope_order(model, operation, shapes[target][0])
            case _:
                raise NotSupportedError(
                    f"transformers makes {renamed} from {name} and others with {operation!r}, for which lading has no "
                    "rule. Save the model with a version of transformers that writes it as it is in memory, or load it "
                    "with transformers itself."
                )

    if cuts is None:
        return (rule if orders[0] is None else replace(rule, order=orders[0]),)

    return tuple(
        replace(rule, target=target, cut=cut, order=order or rule.order)
        for target, cut, order in zip(targets, cuts, orders, strict=True)
    )


def _cuts(dim: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _rope_order(model: PreTrainedModel, operation: Any, size: int) -> Regroup:
    """Return the reordering from rotations of adjacent channels of a head to rotations of its two halves."""
    config: Any = model.config
    if operation.subconfig_key is not None:
        config = getattr(config, operation.subconfig_key, config)
    half = size // getattr(config, "num_attention_heads", 1) // 2

    return Regroup(0, 2, half) if operation.inverse else Regroup(0, half, 2)


# --- names that differ only in numbers --------------------------------------------------------------------------------


def _merge_rules(group: Sequence[tuple[Rule, ...]]) -> list[Rule]:
    """Return the rules for names that differ only in numbers: one for all, if all map their numbers the same way.

    :param group: the rules of each name.
    """
    names = [rules[0].source for rules in group]
    if all(rules == (Rule(name, name),) for name, rules in zip(names, group, strict=True)) or any(
        "{" in name or "}" in name for name in names
    ):
        return []

    if len({len(rules) for rules in group}) == 1:
        common = [rule for rules in zip(*group, strict=True) if (rule := _common(rules)) is not None]
        if len(common) == len(group[0]):
            return common

    return [_with_stack(rule) for rules in group for rule in rules]


def _common(rules: Sequence[Rule]) -> Rule | None:
    """Return the rule that does what ``rules`` do for their names; ``None`` without one."""
    first = rules[0]
    numbers = [NUMBER.findall(rule.source) for rule in rules]
    count = len(numbers[0])
    if count > len(_LETTERS) or any(replace(rule, source=first.source, target=first.target) != first for rule in rules):
        return None
    source = _with_placeholders(first.source, range(count))
    if all(rule.target is None for rule in rules):
        return replace(first, source=source)
    if first.target is None:
        return None

    kept = len(NUMBER.findall(first.target))
    if first.stack is not None and kept != count - 1:
        return None
    for slots in combinations(range(count), kept):
        form = _with_placeholders(first.target, slots)
        if any(
            rule.target != form.format(**{_LETTERS[slot]: own[slot] for slot in slots})
            for rule, own in zip(rules, numbers, strict=True)
        ):
            continue
        stack = None if first.stack is None else next(_LETTERS[i] for i in range(count) if i not in slots)
        return replace(first, source=source, target=form, stack=stack)

    return None


def _with_placeholders(name: str, slots: Sequence[int]) -> str:
    """Return the name with placeholders in place of its numbers."""
    left = iter(slots)

    return NUMBER.sub(lambda _: f"{{{_LETTERS[next(left)]}}}", name)


def _with_stack(rule: Rule) -> Rule:
    """Return the rule with a placeholder for the number that is not in the target, which counts stacked tensors."""
    if rule.stack is None:
        return rule
    *_, last = NUMBER.finditer(rule.source)

    return replace(rule, source=f"{rule.source[: last.start()]}{{{_STACK}}}{rule.source[last.end() :]}")
