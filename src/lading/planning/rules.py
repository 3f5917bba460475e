"""Rules: declarative mappings from the tensors of a checkpoint to the parameters of a model.

The parameter names of the built-in families *are* the names in Hugging Face checkpoints, so that the commonest
checkpoint needs no rule. Rules are for other checkpoints, and for tensors in a checkpoint that a model does not need.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from lading.errors import InternalError
from lading.planning.box import Box
from lading.planning.composition import (
    Joined,
    Regroup,
    Reordered,
    Sliced,
    Source,
    Stacked,
    Transposed,
    Unfolded,
    shape_of,
    tensors_of,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A mapping from ``source``, the name of a tensor in the checkpoint, to ``target``, the parameter that it makes.

    Both are patterns: ``{n}``, with any lowercase name in the braces, matches a number of at most nine digits,
    ``{rest*}`` any text. A placeholder has the same value in the target as in the source. A ``target`` of ``None``
    means that the tensor is known and not needed.

    If several tensors make one target, the rule of each gives its position in the target::

        Rule("layers.{n}.wq", "layers.{n}.qkv", concat=(0, 0))                     # q, then k, then v, along dim 0
        Rule("layers.{n}.wk", "layers.{n}.qkv", concat=(0, 1))
        Rule("layers.{n}.wv", "layers.{n}.qkv", concat=(0, 2))
        Rule("experts.{e}.w1", "experts.gate_up", stack="e", concat=(0, 0))        # [experts, gate and up, dim]
        Rule("experts.{e}.w3", "experts.gate_up", stack="e", concat=(0, 1))

    If one tensor makes several targets, one rule per target, with the same source, gives the part of the tensor::

        Rule("layers.{n}.qkv", "layers.{n}.wq", cut=(0, 0, 4096))                  # dim, first index, size
        Rule("layers.{n}.qkv", "layers.{n}.wk", cut=(0, 4096, 1024))

    The parts that ranks of gangs saved, which :mod:`lading.formats` names ``NAME#TP`` or ``NAME#TP.SDP``, need no rule:
    a rule is for ``NAME``, and the shape of the target determines the dim along which the parts are joined, or that the
    parts are copies, in which case the first is used.
    """

    source: str
    target: str | None
    concat: tuple[int, int] | None = None
    """The ``(dim, position)`` of the tensor, counted from 0, among those that are concatenated along this dim of the
    target, or of the stacked element if they are stacked too."""
    stack: str | None = None
    """The placeholder with the index of the tensor along a new first dim of the target; ``target`` does not use it."""
    order: Regroup | None = None
    """The reordering of its indices along a dim: after ``unfold`` and ``transpose``, and before everything else except
    the joining of parts that ranks saved."""
    computed: bool = False
    """Without a target: whether the tensor holds nothing that was trained, such as a buffer that the model computes."""
    cut: tuple[int, int, int | None] | None = None
    """The ``(dim, first index, size)`` of the part of the tensor that makes the target, after the reordering. A size of
    ``None`` means all indices from the first on. Where tensor-parallel ranks saved parts of a tensor, each holds a
    share of each target: its own part is cut likewise."""
    unfold: int | None = None
    """The number of indices of a new first dim, into which the first dim of the tensor, or of the part of each rank, is
    divided: as many experts, whose matrices are below one another."""
    transpose: bool = False
    """True if the last two dims of the tensor, or of the part of each rank, are exchanged."""

    @property
    def arranges(self) -> bool:
        """True if the rule does more than rename."""
        return bool(self.concat or self.stack or self.order or self.cut or self.unfold or self.transpose)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The assignment of tensors of the manifest to targets, in columns, and the names that have no match."""

    targets: array[int]
    """The positions among the targets; type code ``I``."""
    tensors: array[int]
    """The position in the manifest of the tensor, or of the first tensor, of each target; type code ``I``."""
    composed: Mapping[int, Source] = field(default_factory=dict)
    """The compositions, by position in ``targets``, of targets that are not one tensor as it is."""
    duplicates: tuple[tuple[int, Source], ...] = ()
    """The ``(target, source)`` of each other copy of a tied parameter; the copies must be equal."""
    further_names: tuple[str, ...] = ()
    """The name of the copy in each of ``duplicates``, among the other names of the parameter."""
    missing: tuple[str, ...] = ()
    """The names of targets without a tensor."""
    unneeded: tuple[str, ...] = ()
    """The names of tensors that were trained, and that a rule without a target matches."""
    drawn: tuple[str, ...] = ()
    """The names of targets that need no tensor: they keep the values of a new model."""
    unexpected: tuple[str, ...] = ()
    """The names of tensors that no rule and no target matches."""
    clashes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """The targets that several tensors claim, and the names of these tensors."""
    incomplete: tuple[tuple[str, str], ...] = ()
    """The targets that the available tensors cannot make, and the reasons."""

    def sources(self) -> list[tuple[int, Source]]:
        """Return pairs of a target and its source."""
        columns = zip(self.targets, self.tensors, strict=True)

        return [(target, self.composed.get(i, tensor)) for i, (target, tensor) in enumerate(columns)]

    def without(self, targets: Mapping[int, str]) -> Route:
        """Return the route without ``targets``, by position with their names: something else makes them."""
        kept = [i for i, target in enumerate(self.targets) if target not in targets]
        copies = [i for i, (target, _) in enumerate(self.duplicates) if target not in targets]
        names = frozenset(targets.values())

        return replace(
            self,
            targets=array("I", [self.targets[i] for i in kept]),
            tensors=array("I", [self.tensors[i] for i in kept]),
            composed={n: self.composed[i] for n, i in enumerate(kept) if i in self.composed},
            duplicates=tuple(self.duplicates[i] for i in copies),
            further_names=tuple(self.further_names[i] for i in copies),
            missing=tuple(name for name in self.missing if name not in names),
            drawn=tuple(name for name in self.drawn if name not in names),
            clashes=tuple(clash for clash in self.clashes if clash[0] not in names),
            incomplete=tuple(each for each in self.incomplete if each[0] not in names),
        )


def route(
    tensor_names: Sequence[str],
    target_names: Sequence[str],
    rules: Sequence[Rule] = (),
    aliases: Mapping[str, str] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] = (),
    target_shapes: Sequence[tuple[int, ...]] = (),
) -> Route:
    """Assign tensors to targets.

    The first rule whose source matches a full name applies, with other rules of the same source if they cut the
    tensor; a name that no rule matches is the name of its target.

    :param aliases: other names of tied targets → the name among ``target_names``.
    :param shapes: the shapes of the tensors; needed if several tensors make one target.
    :param target_shapes: the shapes of the targets; needed likewise.
    """
    aliases = aliases or {}
    position = {name: i for i, name in enumerate(target_names)}
    order = position | {name: len(position) + i for i, name in enumerate(aliases)}

    # (target, name after the rules) → the tensors that claim it.
    claims: dict[int, dict[str, list[tuple[int, _Position | None]]]] = {}
    unexpected: list[str] = []
    unneeded: list[str] = []

    for tensor, renamed, place in _apply(tensor_names, rules):
        if renamed is None:
            if place is not None and place.rule is not None and not place.rule.computed:
                unneeded.append(tensor_names[tensor])
            continue

        target = position.get(aliases.get(renamed, renamed))
        if target is None:
            unexpected.append(tensor_names[tensor])
        else:
            claims.setdefault(target, {}).setdefault(renamed, []).append((tensor, place))

    targets, tensors = array("I"), array("I")
    composed: dict[int, Source] = {}
    missing: list[str] = []
    duplicates: list[tuple[int, Source]] = []
    further_names: list[str] = []
    clashes: list[tuple[str, tuple[str, ...]]] = []
    incomplete: list[tuple[str, str]] = []

    for target, name in enumerate(target_names):
        claimed = claims.get(target)
        if claimed is None:
            missing.append(name)
            continue

        sources: dict[str, Source] = {}
        for renamed, places in claimed.items():
            # Two tensors with the same name after the rules are a mistake; two names of a tied parameter are not.
            if again := _clash(places):
                clashes.append((name, tuple(tensor_names[i] for i in again)))
                sources[renamed] = places[0][0]
            elif places[0][1] is None:
                sources[renamed] = places[0][0]
            else:
                try:
                    sources[renamed] = _compose(places, shapes, target_shapes[target])
                except ValueError as error:
                    incomplete.append((name, str(error)))

        if not sources:
            continue
        # The copy that comes first in the model is used, whatever the order in the files.
        first = min(sources, key=order.__getitem__)
        source = sources[first]
        if not isinstance(source, int):
            composed[len(targets)] = source
        targets.append(target)
        tensors.append(next(tensors_of(source)))
        duplicates += [(target, other) for renamed, other in sources.items() if renamed != first]
        further_names += [renamed for renamed in sources if renamed != first]

    return Route(
        targets=targets,
        tensors=tensors,
        composed=composed,
        duplicates=tuple(duplicates),
        further_names=tuple(further_names),
        unneeded=tuple(unneeded),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        clashes=tuple(clashes),
        incomplete=tuple(incomplete),
    )


def rename(names: Sequence[str], rules: Sequence[Rule]) -> list[str | None]:
    """Apply to each name the first rule whose source matches it fully; ``None`` if that rule drops the tensor.

    A name whose tensor is cut appears once for each rule that cuts it.
    """
    return [renamed for _, renamed, _ in _apply(names, rules)]


def parts_of(target: str, shape: tuple[int, ...], rules: Sequence[Rule]) -> list[tuple[str, tuple[int, ...], Box]]:
    """Return the tensors that the rules join or stack to a target, each with its shape and its box of the target.

    Tensors that are joined are equally large. A target that no rule makes is one tensor.
    """
    made = [(match, rule) for rule in rules if (match := _pattern(rule.target or "")[0].fullmatch(target))]
    if not made:
        return [(target, shape, Box.whole(shape))]
    if any(rule.order or rule.cut or rule.unfold or rule.transpose for _, rule in made):
        raise InternalError(f"rules of {target} that do more than join and stack are not applied backwards")

    found: list[tuple[str, tuple[int, ...], Box]] = []
    for index in range(shape[0]) if made[0][1].stack else (0,):
        for match, rule in made:
            stacked = rule.stack is not None
            starts, sizes = [0] * len(shape), list(shape)
            if rule.stack is not None:
                starts[0], sizes[0] = index, 1
            if rule.concat is not None:
                dim = rule.concat[0] + stacked
                sizes[dim] = shape[dim] // len(made)
                starts[dim] = rule.concat[1] * sizes[dim]
            numbers = match.groupdict() | ({rule.stack: index} if rule.stack else {})
            name = _PLACEHOLDER.sub(r"{\1}", rule.source).format(**numbers)
            found.append((name, tuple(sizes[stacked:]), Box(tuple(starts), tuple(sizes))))

    return found


@dataclass(frozen=True, slots=True)
class _Position:
    """The position of a tensor in a target."""

    ranks: tuple[int, int] = (0, 0)
    """The ranks in the tensor-parallel and the sharded-data-parallel gang that saved it."""
    stack: int = 0
    concat: int = 0
    rule: Rule | None = None
    """The rule of the tensor, if it does more than rename."""
    extent: int = 0
    """The indices that all rules together cut out of the tensor; -1 if one of them cuts up to the end."""

    @property
    def key(self) -> tuple[int, int, tuple[int, int]]:
        return self.stack, self.concat, self.ranks


_RANK_PART = re.compile(r"(.+)#([0-9]{1,4})(?:\.([0-9]{1,4}))?", re.DOTALL)


def _apply(names: Sequence[str], rules: Sequence[Rule]) -> Iterator[tuple[int, str | None, _Position | None]]:
    """Yield the index of each name, the name after the rules, and the position of the tensor in that target, ``None``
    if it is the whole target as it is. A name whose tensor is cut comes once for each part.
    """
    compiled = [(*_compile(rule), rule) for rule in rules]
    # Most names match no rule: one expression for all rules rejects these at once.
    extents: dict[str, int] = {}
    for rule in rules:
        if rule.cut is not None:
            _, start, size = rule.cut
            extent = extents.get(rule.source, 0)
            extents[rule.source] = -1 if size is None or extent < 0 else max(extent, start + size)
    any_rule = re.compile("|".join(f"(?:{_GROUP_NAME.sub('(?:', pattern.pattern)})" for pattern, _, _ in compiled))

    for i, name in enumerate(names):
        ranks = None
        if "#" in name and (part := _RANK_PART.fullmatch(name)):
            name, ranks = part[1], (int(part[2]), int(part[3] or 0))
        place = None if ranks is None else _Position(ranks)

        if not rules or any_rule.fullmatch(name) is None:
            yield i, name, place
            continue
        matched: Rule | None = None
        for pattern, target, rule in compiled:
            if matched is not None and (rule.cut is None or rule.source != matched.source):
                continue
            if match := pattern.fullmatch(name):
                if target is None or rule.arranges:
                    stack = int(match[rule.stack]) if rule.stack else 0
                    concat = rule.concat[1] if rule.concat else 0
                    place = _Position(ranks or (0, 0), stack, concat, rule, extents.get(rule.source, 0))
                yield i, (None if target is None else target.format(**match.groupdict())), place
                if rule.cut is None:
                    break
                matched = rule


def _clash(places: Sequence[tuple[int, _Position | None]]) -> list[int]:
    """Return the tensors that claim the same part of a target, or all tensors if one claims the whole target."""
    if len(places) == 1:
        return []

    by_key: dict[object, list[int]] = {}
    for tensor, place in places:
        by_key.setdefault(None if place is None else place.key, []).append(tensor)
    if None in by_key:
        return [tensor for tensor, _ in places]

    return next((tensors for tensors in by_key.values() if len(tensors) > 1), [])


def _compose(
    places: Sequence[tuple[int, _Position | None]], shapes: Sequence[tuple[int, ...]], target_shape: tuple[int, ...]
) -> Source:
    """Compose a source from the tensors at ``places``.

    :raises ValueError: the tensors do not make a source.
    """
    cells: dict[int, dict[int, list[tuple[int, _Position]]]] = {}
    for tensor, place in places:
        if place is None:
            raise InternalError("a tensor that is a whole target is composed with others")
        cells.setdefault(place.stack, {}).setdefault(place.concat, []).append((tensor, place))
    ways = {
        (rule and rule.stack is not None, rule and rule.concat and rule.concat[0]) for rule in _distinct_rules(places)
    }
    if len(ways) != 1:
        raise InternalError(f"rules that do not agree on how tensors make one target: {_distinct_rules(places)}")
    _require_complete("stacked tensors", cells)
    for row in cells.values():
        _require_complete("concatenated tensors", row)

    # The checkpoint does not record how the ranks split a tensor, but only one split gives the target's shape.
    ranks = [place.ranks for _, place in places if place is not None]
    tp, sdp = (max(column) + 1 for column in zip(*ranks, strict=True))
    error: ValueError | None = None
    found: Source | None = None
    for sdp_dim in (0, None) if sdp > 1 else (0,):
        for tp_dim in (*range(len(target_shape)), None) if tp > 1 else (None,):
            try:
                source = _build(cells, shapes, tp_dim, sdp_dim)
                if shape_of(source, shapes) == target_shape:
                    return source
            except ValueError as failure:
                error = error or failure
            else:
                found = source

    # A cut up to the end succeeds at any extent, so a composition of another shape says less than the failure.
    is_open = any(place is not None and place.extent < 0 for _, place in places)
    if found is None or (is_open and error is not None):
        raise error or InternalError("no composition of a target was tried")

    return found  # its shape differs from the target's: the caller reports it with all other mismatches


def _distinct_rules(places: Sequence[tuple[int, _Position | None]]) -> list[Rule | None]:
    return list(dict.fromkeys(None if place is None else place.rule for _, place in places))


def _build(
    cells: Mapping[int, Mapping[int, Sequence[tuple[int, _Position]]]],
    shapes: Sequence[tuple[int, ...]],
    tp_dim: int | None,
    sdp_dim: int | None,
) -> Source:
    stacked: list[Source] = []
    rule: Rule | None = None
    for i in range(len(cells)):
        joined: list[Source] = []
        for j in range(len(cells[i])):
            rule = cells[i][j][0][1].rule
            source = _join_ranks(cells[i][j], shapes, tp_dim, sdp_dim)
            if rule is not None and rule.order is not None and rule.cut is None:
                source = Reordered(rule.order, source)
            joined.append(source)
        concat = None if rule is None else rule.concat
        stacked.append(joined[0] if concat is None else Joined(concat[0], tuple(joined)))

    return stacked[0] if rule is None or rule.stack is None else Stacked(tuple(stacked))


def _join_ranks(
    parts: Sequence[tuple[int, _Position]], shapes: Sequence[tuple[int, ...]], tp_dim: int | None, sdp_dim: int | None
) -> Source:
    rows: dict[int, dict[int, int]] = {}
    for tensor, place in parts:
        rows.setdefault(place.ranks[0], {})[place.ranks[1]] = tensor
    _require_complete("tensor-parallel parts", rows)

    whole: list[Source] = []
    for tp in range(len(rows)):
        # Ranks without a row of an uneven tensor may have saved nothing, or an empty tensor of any shape.
        _require_complete("sharded parts", rows[tp])
        all_parts = [rows[tp][sdp] for sdp in range(len(rows[tp]))]
        row = tuple(part for part in all_parts if 0 not in shapes[part]) or (all_parts[0],)
        source = row[0] if sdp_dim is None or len(row) == 1 else Joined(sdp_dim, row)
        whole.append(_arrange(source, shapes, parts[0][1], tp_dim, ranks=len(rows)))

    return whole[0] if tp_dim is None or len(whole) == 1 else Joined(tp_dim, tuple(whole))


def _arrange(
    source: Source, shapes: Sequence[tuple[int, ...]], place: _Position, tp_dim: int | None, *, ranks: int
) -> Source:
    """Do with the part of one of ``ranks`` tensor-parallel ranks what has to precede the joining of all parts.

    :raises ValueError: the ranks do not hold equal shares of the targets into which the tensor is cut.
    """
    rule = place.rule
    if rule is None:
        return source
    if rule.unfold is not None:
        source = Unfolded(rule.unfold, source)
    if rule.transpose:
        source = Transposed(source)
    if rule.cut is not None:
        dim, start, size = rule.cut
        shape = shape_of(source, shapes)
        held = shape[dim] if dim < len(shape) else 0
        if size is None:
            size = max(0, held - start)  # of a tensor that ends before, a slice that does not exist
        if dim == tp_dim and ranks > 1:
            if place.extent < 0:
                raise ValueError("parts that ranks saved cannot be cut by a rule without a size")
            if start % ranks or size % ranks or held * ranks != place.extent:
                raise ValueError(f"{ranks} ranks with {held} indices each hold no equal shares of {place.extent}")
        else:
            ranks = 1
        source = source if rule.order is None else Reordered(rule.order, source)
        source = Sliced(dim, start // ranks, size // ranks, source)

    return source


def _require_complete(what: str, numbered: Mapping[int, object]) -> None:
    if max(numbered) >= len(numbered):
        missing = next(i for i in range(len(numbered)) if i not in numbered)
        raise ValueError(f"of {max(numbered) + 1} {what}, number {missing} is missing (the first is number 0)")


_GROUP_NAME = re.compile(r"\(\?P<[a-z]+>")
_PLACEHOLDER = re.compile(r"\{([a-z]+)(\*?)\}")


@lru_cache(maxsize=1024)
def _pattern(text: str) -> tuple[re.Pattern[str], list[str]]:
    """Compile the text of a rule to a regular expression; return its placeholders, too."""
    pattern, at = "", 0
    known: list[str] = []
    for match in _PLACEHOLDER.finditer(text):
        pattern += re.escape(text[at : match.start()])
        pattern += f"(?P<{match[1]}>{'.+' if match[2] else '[0-9]{1,9}'})"
        known.append(match[1])
        at = match.end()

    return re.compile(pattern + re.escape(text[at:])), known


@lru_cache(maxsize=1024)
def _compile(rule: Rule) -> tuple[re.Pattern[str], str | None]:
    """Compile the rule to a regular expression and a format string."""
    pattern, known = _pattern(rule.source)
    wanted = {m[1] for m in _PLACEHOLDER.finditer(rule.target or "")} | ({rule.stack} if rule.stack else set())
    if unknown := wanted - set(known):
        raise InternalError(f"the target of {rule} uses placeholders that its source does not have: {unknown}")

    return pattern, None if rule.target is None else _PLACEHOLDER.sub(r"{\1}", rule.target)
