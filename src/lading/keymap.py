"""Rules that say, declaratively, which tensors of a checkpoint make which parameters of a model.

The parameter names of the built-in families *are* the names that Hugging Face checkpoints use, so that the commonest
checkpoint needs no rule. Rules are for the others, and for tensors that a checkpoint holds although a model needs none.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lading.errors import InternalError


@dataclass(frozen=True, slots=True)
class Rule:
    """``source`` names a tensor of the checkpoint, ``target`` the parameter that it makes.

    Both are patterns: ``{n}``, with any lower-case name in the braces, stands for a number, ``{rest*}`` for anything.
    What a placeholder stands for in the source, it stands for in the target. A ``target`` of ``None`` means that the
    tensor is known and not needed.
    """

    source: str
    target: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Which tensor of the manifest makes which target, in columns, and what does not fit."""

    targets: array[int]
    """Positions among the targets; type code ``I``."""
    tensors: array[int]
    """For each of ``targets`` the position of its tensor in the manifest; type code ``I``."""
    duplicates: tuple[tuple[int, int], ...] = ()
    """(target, tensor): a tied parameter that the checkpoint holds more than once; the copies must be equal."""
    missing: tuple[str, ...] = ()
    """Names of targets that no tensor makes."""
    unexpected: tuple[str, ...] = ()
    """Names of tensors that no rule knows and that make no target."""
    clashes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """A target that several tensors claim, and their names."""


def route(
    tensor_names: Sequence[str],
    target_names: Sequence[str],
    rules: Sequence[Rule] = (),
    aliases: Mapping[str, str] | None = None,
) -> Route:
    """Assign tensors to targets.

    A name goes through the first rule whose source matches all of it; a name that no rule matches stands for itself.

    :param aliases: further names of tied targets → the name among ``target_names``.
    """
    aliases = aliases or {}
    position = {name: i for i, name in enumerate(target_names)}

    # (target, name after the rules) → the tensors that claim it.
    claims: dict[int, dict[str, list[int]]] = {}
    unexpected: list[str] = []

    for tensor, renamed in enumerate(rename(tensor_names, rules)):
        if renamed is None:
            continue

        target = position.get(aliases.get(renamed, renamed))
        if target is None:
            unexpected.append(tensor_names[tensor])
        else:
            claims.setdefault(target, {}).setdefault(renamed, []).append(tensor)

    targets, tensors = array("I"), array("I")
    missing: list[str] = []
    duplicates: list[tuple[int, int]] = []
    clashes: list[tuple[str, tuple[str, ...]]] = []

    for target, name in enumerate(target_names):
        claimed = claims.get(target)
        if claimed is None:
            missing.append(name)
            continue

        # Two tensors that bear the same name after the rules are a mistake; two names of a tied parameter are not.
        for ids in claimed.values():
            if len(ids) > 1:
                clashes.append((name, tuple(tensor_names[i] for i in ids)))

        first = claimed[name][0] if name in claimed else next(iter(claimed.values()))[0]
        targets.append(target)
        tensors.append(first)
        duplicates += [(target, ids[0]) for ids in claimed.values() if ids[0] != first]

    return Route(
        targets=targets,
        tensors=tensors,
        duplicates=tuple(duplicates),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        clashes=tuple(clashes),
    )


def rename(names: Sequence[str], rules: Sequence[Rule]) -> list[str | None]:
    """Each name after the first rule whose source matches all of it; ``None`` where that rule drops the tensor."""
    if not rules:
        return list(names)

    compiled = [_compile(rule) for rule in rules]
    # One expression for all rules tells in one go whether any matches, which for most names none does.
    any_rule = re.compile("|".join(f"(?:{_NAMED.sub('(?:', pattern.pattern)})" for pattern, _ in compiled))
    renamed: list[str | None] = []

    for name in names:
        if any_rule.fullmatch(name) is None:
            renamed.append(name)
            continue
        for pattern, target in compiled:
            if match := pattern.fullmatch(name):
                renamed.append(None if target is None else target.format(**match.groupdict()))
                break

    return renamed


_NAMED = re.compile(r"\(\?P<[a-z]+>")
_PLACEHOLDER = re.compile(r"\{([a-z]+)(\*?)\}")


@lru_cache(maxsize=1024)
def _compile(rule: Rule) -> tuple[re.Pattern[str], str | None]:
    """The rule as a regular expression and a format string."""
    pattern, at = "", 0
    known: list[str] = []
    for match in _PLACEHOLDER.finditer(rule.source):
        pattern += re.escape(rule.source[at : match.start()])
        pattern += f"(?P<{match[1]}>{'.+' if match[2] else '[0-9]+'})"
        known.append(match[1])
        at = match.end()
    pattern += re.escape(rule.source[at:])

    wanted = {m[1] for m in _PLACEHOLDER.finditer(rule.target or "")}
    if unknown := wanted - set(known):
        raise InternalError(f"the target of {rule} uses placeholders that its source does not have: {unknown}")

    return re.compile(pattern), None if rule.target is None else _PLACEHOLDER.sub(r"{\1}", rule.target)
