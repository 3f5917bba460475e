"""The match of the tensors of LoRA adapters with the parameters of a model, without torch and without a file.

The names in an adapter are those of transformers' modules. If the checkpoint of the base has a tensor of that name
that is only a part of a parameter, the change goes the way of that tensor; all others go through the rules of the
family, as the tensors of a checkpoint do.

Source: PEFT 0.21 (``peft/tuners/lora/layer.py``) for the names of tensors and the order of the operations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lading.checkpoints.adapter import Adapter
from lading.formats.manifest import FLOATS, Manifest
from lading.models.family import Family
from lading.models.targets import Targets
from lading.planning.composition import Source, shape_of, tensors_of
from lading.planning.rules import Route, Rule, rename, route


class Factors(NamedTuple):
    """The two matrices of a weight."""

    a: int
    """The position of A, of the shape [rank, inputs …], in the manifest of the adapter."""
    b: int
    """That of B, of the shape [outputs, rank …]."""
    scale: float
    transposed: bool
    """``True`` if the weight has the inputs as its first dim, as in an embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that an adapter makes to a target, or to parts of it."""

    adapter: int
    """The number of the adapter, from 0 on."""
    source: Source
    """The way in which tensors make the target."""
    shapes: Sequence[tuple[int, ...]]
    """The shapes of these tensors, by position."""
    parts: Mapping[int, Factors | int]
    """The factors to add to these tensors, or the tensor of the adapter to replace them by, by position."""

    @property
    def replaces(self) -> bool:
        """``True`` if nothing of the base remains."""
        return all(isinstance(self.parts.get(tensor), int) for tensor in tensors_of(self.source))


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """The changes that the adapters of a model make to its targets."""

    changes: Mapping[int, Sequence[Change]]
    """The changes of each target, in order, by the position of the target."""
    problems: Sequence[str]
    """The problems of adapters that do not fit, a line each."""
    replaced: Mapping[int, str]
    """The names of the targets that take nothing from the base, by position."""


NO_MERGE = Merge(changes={}, problems=(), replaced={})


def match_adapters(
    adapters: Sequence[Adapter],
    manifest: Manifest,
    targets: Targets,
    routed: Route,
    *,
    family: Family[Any, Any],
    config: Any,
) -> Merge:
    """Match the tensors of adapters with the parameters of a model.

    :param manifest: that of the base.
    :param routed: the tensors of the base that make the targets.
    """
    transposed = frozenset() if family.transposed is None else family.transposed(config)
    changes: dict[int, list[Change]] = {}
    problems: list[str] = []
    replaced: dict[int, str] = {}
    parts = _parts_of_targets(manifest, routed)
    for number, adapter in enumerate(adapters):
        matching = _Matching(number, adapter, targets)
        names = [*dict.fromkeys(matching.names())]
        matching.read_names(names, family.rules_for(config, names), transposed)
        matching.follow(parts, manifest)
        matching.route()
        for target, change in matching.changes:
            if change.replaces and any(other.adapter != number for other in changes.get(target, ())):
                matching.problems.append(f"in conflict: another adapter changes {targets.names[target]}, too")
            changes.setdefault(target, []).append(change)
        if not matching.changes and not matching.problems:
            matching.problems.append("empty: it changes no weight of the model")
        replaced |= {target: targets.names[target] for target, change in matching.changes if change.replaces}
        problems += (f"adapter {adapter.checkpoint.where}: {problem}" for problem in matching.problems)

    # The factors of an adapter, if any, are added to the weight that it trained whole.
    ordered = {target: sorted(all_, key=lambda change: not change.replaces) for target, all_ in changes.items()}

    return Merge(changes=ordered, problems=problems, replaced=replaced)


_Parts = Mapping[str, Sequence[tuple[int, Source, int]]]
"""(target, source, tensor) by the names of tensors of the base that are parts of targets."""


def _parts_of_targets(manifest: Manifest, routed: Route) -> _Parts:
    parts: dict[str, list[tuple[int, Source, int]]] = {}
    for target, source in (*routed.sources(), *routed.duplicates):
        if not isinstance(source, int):
            for tensor in tensors_of(source):
                parts.setdefault(manifest.names[tensor], []).append((target, source, tensor))

    return parts


_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))", re.DOTALL)


class _Entry(NamedTuple):
    """A weight that an adapter changes, as if it were a tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    part: Factors | int


class _Matching:
    """The match of one adapter."""

    def __init__(self, number: int, adapter: Adapter, targets: Targets) -> None:
        self.number = number
        self.adapter = adapter
        self.targets = targets
        self.manifest = adapter.checkpoint.manifest
        self.problems: list[str] = []
        self.changes: list[tuple[int, Change]] = []
        self._entries: list[_Entry] = []
        self._rules: Sequence[Rule] = ()

    def names(self) -> Iterator[str]:
        """Yield the names of the weights that the adapter changes, some twice."""
        for name in self.manifest.names:
            if name.startswith(_PREFIX):
                match = _FACTOR.fullmatch(name)
                yield _base_name(name) if match is None else _base_name(f"{match[1]}.weight")

    def read_names(self, names: Sequence[str], rules: Sequence[Rule], transposed: frozenset[str]) -> None:
        """Find the factors and the other tensors of each weight."""
        self._rules = rules
        factors: dict[str, dict[str, int]] = {}
        embeddings: set[str] = set()
        for i, name in enumerate(self.manifest.names):
            match = _FACTOR.fullmatch(name)
            if self.manifest.dtypes[i] not in FLOATS:
                self.problems.append(f"of another dtype: {name} is {self.manifest.dtypes[i]}")
            elif not name.startswith(_PREFIX) or (match is None and ".lora_" in name):
                self.problems.append(f"unexpected: {name}")
            elif match is None:
                self._entries.append(_Entry(_base_name(name), self.manifest.shapes[i], i))
            else:
                module = _base_name(match[1])
                factors.setdefault(module, {})[match[2] or match[3]] = i
                if match[3]:
                    embeddings.add(module)

        for module, pair in factors.items():
            if len(pair) < 2:
                (one,) = pair
                self.problems.append(f"incomplete: {module} has lora_{one}, but no lora_{'B' if one == 'A' else 'A'}")
                continue
            name = f"{module}.weight"
            turned = module in embeddings or (
                bool(transposed) and any(each in transposed for each in rename([name], self._rules))
            )
            self._add_factors(module, name, pair["A"], pair["B"], turned)

    def _add_factors(self, module: str, name: str, a: int, b: int, turned: bool) -> None:
        config, shape_a, shape_b = self.adapter.config, self.manifest.shapes[a], self.manifest.shapes[b]
        rank = shape_a[0] if shape_a else 0
        fits = rank > 0 and len(shape_a) == len(shape_b) >= 2 and shape_b[1] == rank and set(shape_b[2:]) <= {1}
        if not fits or (turned and len(shape_a) != 2):
            self.problems.append(
                f"mis-shaped: the factors of {module} are {list(shape_a)} and {list(shape_b)}, expected [rank, "
                "inputs] and [outputs, rank]"
            )
            return
        shape = (shape_b[0], *shape_a[1:])
        scale = config.scale(module, rank) * self.adapter.weight
        self._entries.append(_Entry(name, shape[::-1] if turned else shape, Factors(a, b, scale, turned)))

    def follow(self, parts: _Parts, manifest: Manifest) -> None:
        """Send weights the way of the tensors of the base with their names, where these are parts of a target."""
        rest = []
        for entry in self._entries:
            if entry.name not in parts:
                rest.append(entry)
                continue
            for target, source, tensor in parts[entry.name]:
                if self._require_shape(entry.name, manifest.shapes[tensor], entry.shape):
                    self._change(target, source, manifest.shapes, {tensor: entry.part})
        self._entries = rest

    def route(self) -> None:
        """Send the other weights through the rules of the family."""
        entries, targets = self._entries, self.targets
        shapes = [entry.shape for entry in entries]
        # A weight may have both a new value and factors, which are routed apart.
        for own in (
            [i for i, entry in enumerate(entries) if isinstance(entry.part, int)],
            [i for i, entry in enumerate(entries) if not isinstance(entry.part, int)],
        ):
            names, own_shapes = [entries[i].name for i in own], [shapes[i] for i in own]
            made = route(
                names,
                targets.names,
                self._rules,
                targets.aliases,
                shapes=own_shapes,
                target_shapes=targets.shapes,
            )
            self.problems += [f"unexpected: {name}: the model has no such parameter" for name in made.unexpected]
            self.problems += [f"claimed by {len(by)} tensors: {name} by {', '.join(by)}" for name, by in made.clashes]
            self.problems += [f"incomplete: {name}: {why}" for name, why in made.incomplete]
            found = [*made.sources(), *made.duplicates]
            for target, source in found:
                name = targets.names[target]
                if self._require_shape(name, targets.shapes[target], shape_of(source, own_shapes)):
                    self._change(target, source, own_shapes, {t: entries[own[t]].part for t in tensors_of(source)})
                    self._require_tied(target, [names[t] for t in tensors_of(source)], found)

    def _require_shape(self, name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
        if expected != found:
            self.problems.append(f"mis-shaped: {name} is expected to be {list(expected)}, but is {list(found)}")

        return expected == found

    def _require_tied(self, target: int, names: Sequence[str], found: Sequence[tuple[int, Source]]) -> None:
        """Require that a tied parameter that was trained whole stays tied: PEFT trains a copy for each name."""
        own = self.targets.names[target]
        tied = [own, *self.targets.aliases_of(own)]
        given = sum(1 for each, _ in found if each == target)
        saved = [f".{name}." in f".{full}" for full in names for name in self.adapter.config.saved]
        if any(saved) and given < len(tied):
            self.problems.append(
                f"tied: {names[0]} was trained apart from {' and '.join(tied)}, which the model ties to one parameter"
            )

    def _change(
        self,
        target: int,
        source: Source,
        shapes: Sequence[tuple[int, ...]],
        parts: Mapping[int, Factors | int],
    ) -> None:
        if self.adapter.weight != 1 and any(isinstance(part, int) for part in parts.values()):
            self.problems.append(
                f"of another weight: {self.targets.names[target]} was trained whole, and replaces that of the base "
                f"only with the weight 1, but has {self.adapter.weight}"
            )
        self.changes.append((target, Change(adapter=self.number, source=source, shapes=shapes, parts=parts)))


def _base_name(name: str) -> str:
    """Return the name in the base of a tensor or a module of PEFT's wrapped model."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")
