"""What transformers does to the names and tensors of a checkpoint, as rules.

transformers says it in regular expressions that are applied one after another, and by looking at the names that a
model has. Here each name of the checkpoint goes through them; names that differ in numbers alone then share a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lading.errors import NotSupportedError
from lading.planning.composition import Regroup
from lading.planning.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")
"""A number that is a whole part of a name."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class _Way:
    """Where a tensor goes; the fields mean what they mean in a rule."""

    target: str | None
    concat: tuple[int, int] | None = None
    stacked: bool = False
    order: Regroup | None = None
    cut: tuple[int, int, int] | None = None


def rules_of(model: PreTrainedModel, names: Sequence[str]) -> list[Rule]:
    """The rules by which tensors of these names make the parameters of ``model``.

    :raises NotSupportedError: transformers computes a parameter in a way that no rule expresses.
    """
    names = list(dict.fromkeys(name.partition("#")[0] for name in names))  # parts of ranks need no rule
    by_form: dict[str, list[tuple[str, tuple[_Way, ...]]]] = {}
    for name, ways in _ways(model, names):
        by_form.setdefault(NUMBER.sub("#", name), []).append((name, ways))

    return [rule for group in by_form.values() for rule in _rules_of_form(group)]


# --- what transformers does ------------------------------------------------------------------------------------------


def _ways(model: PreTrainedModel, names: Sequence[str]) -> Iterator[tuple[str, tuple[_Way, ...]]]:
    """Each name, and where its tensor goes: to several parameters, if it is cut."""
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
            yield name, (_Way(None),)
        elif pattern is None or renamed not in shapes:
            yield name, (_Way(renamed),)
        else:
            yield name, _converted(model, name, renamed, by_pattern[pattern], pattern, shapes)


def _dropped(model: PreTrainedModel, names: Sequence[str]) -> Callable[[str], bool]:
    """Tells whether a name that the model does not have is of something that it does not need."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    patterns |= _draft_layers(model.config)
    # Buffers that old versions of transformers saved.
    patterns |= {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)attn\.(masked_)?bias$"}
    known = re.compile("|".join(f"(?:{pattern})" for pattern in sorted(patterns)))
    prefix = f"{model.base_model_prefix}."
    # The model without a head, of a checkpoint with one.
    is_base = len(prefix) > 1 and not hasattr(model, model.base_model_prefix)
    of_head = is_base and any(name.startswith(prefix) for name in names)

    return lambda name: known.search(name) is not None or (of_head and not name.startswith(prefix))


def _draft_layers(config: Any) -> set[str]:
    """Return a pattern for the layers behind the last one that draft further tokens, if the configuration says so."""
    config = config.get_text_config()
    first, count = getattr(config, "num_hidden_layers", None), getattr(config, "num_nextn_predict_layers", None)
    if not isinstance(first, int) or not isinstance(count, int) or not 0 < count <= _MAX_DRAFT_LAYERS:
        return set()

    return {rf"(^|\.)layers\.({'|'.join(str(first + i) for i in range(count))})\."}


_MAX_DRAFT_LAYERS = 100
"""Published models have one; each is a part of an expression."""


def _converted(
    model: PreTrainedModel,
    name: str,
    renamed: str,
    converter: Any,
    pattern: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[_Way, ...]:
    """Where transformers' operations take the tensor ``name``.

    :raises NotSupportedError: an operation is not one of those that rules express.
    """
    from transformers.core_model_loading import (
        Chunk,
        Concatenate,
        Interleave,
        MergeModulelist,
        PermuteForRope,
        Split,
    )

    way = _Way(renamed)
    targets = [renamed.replace(converter.target_patterns[0], each) for each in converter.target_patterns]
    cuts: list[tuple[int, int, int]] | None = None
    many = "*" in pattern
    orders: list[Regroup | None] = [None] * len(targets)

    for operation in converter.operations:
        match operation:
            case MergeModulelist(dim=0) if many and not way.stacked:
                way = replace(way, stacked=True)
                many = False
            case Concatenate(dim=dim, num_shards_attribute=None) if not many and dim >= way.stacked:
                way = replace(way, concat=(dim - way.stacked, converter.source_patterns.index(pattern)))
            case Chunk(dim=dim, num_shards_attribute=None) if all(target in shapes for target in targets):
                cuts = _cuts(dim, [shapes[target][dim] for target in targets])
            case Split(dim=dim) if all(target in shapes for target in targets):
                cuts = _cuts(dim, [shapes[target][dim] for target in targets])
            case Interleave(dim=dim) if cuts is None and not way.stacked:
                size = shapes[renamed][dim] * len(targets)
                rows = 2 if operation.inverse else size // 2
                way = replace(way, order=Regroup(dim, rows, size // rows))
            case PermuteForRope() if not way.stacked and way.concat is None:
                for i, target in enumerate(targets):
                    # Where the tensor was cut before, its parts are known by the patterns of the targets.
                    known_as = pattern if cuts is None else converter.target_patterns[i]
                    only = operation.permute_layer_names
                    if only is None or any(each in known_as for each in only):
                        orders[i] = _rope_order(model, operation, shapes[target][0])
            case _:
                raise NotSupportedError(
                    f"transformers makes {renamed} of {name} and others by {operation!r}, for which there is no rule. "
                    "Save the model with a version of transformers that writes it as it is in memory, or load it with "
                    "transformers itself."
                )

    if cuts is None:
        return (way if orders[0] is None else replace(way, order=orders[0]),)

    return tuple(
        replace(way, target=target, cut=cut, order=order or way.order)
        for target, cut, order in zip(targets, cuts, orders, strict=True)
    )


def _cuts(dim: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def _rope_order(model: PreTrainedModel, operation: Any, size: int) -> Regroup:
    """From channels of a head that are turned as neighbours to those that are turned as halves."""
    config: Any = model.config
    if operation.subconfig_key is not None:
        config = getattr(config, operation.subconfig_key, config)
    half = size // getattr(config, "num_attention_heads", 1) // 2

    return Regroup(0, 2, half) if operation.inverse else Regroup(0, half, 2)


# --- names that differ in numbers alone ------------------------------------------------------------------------------


def _rules_of_form(group: Sequence[tuple[str, tuple[_Way, ...]]]) -> list[Rule]:
    """The rules of names that are equal but for their numbers: one for all, if the numbers go the same way in each."""
    if all(ways == (_Way(name),) for name, ways in group) or any("{" in name or "}" in name for name, _ in group):
        return []

    numbers = [NUMBER.findall(name) for name, _ in group]
    count = len(numbers[0])
    common = []
    for i in range(max(len(ways) for _, ways in group)):
        rule = None if any(len(ways) <= i for _, ways in group) else _common(group, numbers, i, count)
        if rule is None:
            return [rule for name, ways in group for rule in _literal(name, ways)]
        common.append(rule)

    return common


def _common(
    group: Sequence[tuple[str, tuple[_Way, ...]]], numbers: Sequence[Sequence[str]], i: int, count: int
) -> Rule | None:
    ways = [ways[i] for _, ways in group]
    first = ways[0]
    if any(replace(way, target=None) != replace(first, target=None) for way in ways) or count > len(_LETTERS):
        return None
    source = _placed(group[0][0], range(count))
    if all(way.target is None for way in ways):
        return Rule(source, None)
    if first.target is None:
        return None

    kept = len(NUMBER.findall(first.target))
    if first.stacked and kept != count - 1:
        return None
    for slots in combinations(range(count), kept):
        form = _placed(first.target, slots)
        if any(
            way.target != form.format(**{_LETTERS[slot]: own[slot] for slot in slots})
            for way, own in zip(ways, numbers, strict=True)
        ):
            continue
        stack = next(_LETTERS[i] for i in range(count) if i not in slots) if first.stacked else None
        return Rule(source, form, concat=first.concat, stack=stack, order=first.order, cut=first.cut)

    return None


def _placed(name: str, slots: Sequence[int]) -> str:
    """The name with placeholders instead of its numbers."""
    left = iter(slots)

    return NUMBER.sub(lambda _: f"{{{_LETTERS[next(left)]}}}", name)


def _literal(name: str, ways: Sequence[_Way]) -> Iterator[Rule]:
    for way in ways:
        source, stack = name, None
        if way.stacked:
            # The number that the target lacks counts the stacked tensors.
            *_, last = NUMBER.finditer(name)
            source, stack = f"{name[: last.start()]}{{a}}{name[last.end() :]}", "a"
        yield Rule(source, way.target, concat=way.concat, stack=stack, order=way.order, cut=way.cut)
