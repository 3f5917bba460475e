"""The differences of two checkpoints or two architectures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lading.cards.card import Architecture, AssetCard
from lading.cards.config import architecture_config
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.manifest import Manifest
from lading.models.construct import build_on_meta
from lading.models.family import get_family
from lading.models.resolve import resolve_checkpoint
from lading.models.targets import targets_of
from lading.system.display import counted, representation
from lading.transfer.compare import Files, ValueDifference, compare_tensors

Kind = Literal["config", "only in A", "only in B", "renamed", "shape", "dtype", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of a comparison: its tensors, in columns of equal length, and its configuration."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[str | None]
    """The dtypes; ``None`` matches any dtype, as an architecture states none for its weights."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """The known digests of tensors, by name."""
    config: Mapping[str, object] = field(default_factory=dict)
    """The fields of the configuration and their values, which may be mappings."""
    has_values: bool = True
    """True if its tensors have values; those of an architecture have none."""

    @classmethod
    def of_manifest(cls, manifest: Manifest, digests: Mapping[str, str] | None = None) -> Side:
        """Return the side of a checkpoint."""
        return cls(names=manifest.names, shapes=manifest.shapes, dtypes=manifest.dtypes, digests=digests or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference of two sides."""

    name: str
    """The name of the tensor, or the dotted name of the configuration field."""
    kind: Kind
    a: object
    """The value of A: ``{"dtype": …, "shape": …}`` for a tensor that only A has, the name for a renamed one, else the
    shape, dtype, digest or field. ``None`` if A has none, and for values that were read."""
    b: object


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """The differences of the tensors of one layer, or of those of no layer."""

    name: str
    """The name of the layer, such as ``model.layers.20``; empty for the tensors of no layer."""
    tensors: int
    """The number of tensors of both sides."""
    differ: int
    """The number of tensors that differ in anything, or that one side lacks."""
    not_compared: int
    """The number of tensors whose values were not compared."""
    values: tuple[ValueDifference, ...] = ()
    """The differences of values that were read."""


def layer_of(name: str) -> str:
    """Return the name of the layer that a tensor belongs to: its own up to the first number; empty if it has none."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isascii() and part.isdecimal() and len(part) < 10:
            return ".".join(parts[: i + 1])

    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """The differences of A and B, and the number of equal tensors."""

    changes: tuple[Change, ...]
    """The differences: configuration fields, then tensors in the order of A, then those of B."""
    same: int
    """The number of tensors with the same name, shape and dtype."""
    equal: int
    """The number of tensors among these whose values are known to be equal."""
    not_compared: tuple[str, ...]
    """The names of the tensors among these whose values were not compared, in the order of A."""
    values: Mapping[str, ValueDifference] = field(default_factory=dict)
    """The differences of values that were read, by the name of the tensor; those of different dtypes, too."""
    names: tuple[str, ...] = ()
    """The names of all tensors: those of A, then those that only B has; a renamed one has its name in A."""

    @property
    def unknown(self) -> int:
        """The number of tensors whose values were not compared."""
        return len(self.not_compared)

    def layers(self) -> list[LayerDifference]:
        """Return the differences by layer, in the order of their first tensors, those of no layer last."""
        of_layer: dict[str, list[str]] = {}
        for name in self.names:
            of_layer.setdefault(layer_of(name), []).append(name)
        outside = of_layer.pop("", None)
        differ = {change.name for change in self.changes if change.kind not in ("config", "renamed")}
        unknown = set(self.not_compared)

        return [
            LayerDifference(
                name=layer,
                tensors=len(names),
                differ=len(differ.intersection(names)),
                not_compared=len(unknown.intersection(names)),
                values=tuple(self.values[name] for name in names if name in self.values),
            )
            for layer, names in [*of_layer.items(), *([] if outside is None else [("", outside)])]
        ]

    def __repr__(self) -> str:
        return representation(
            self,
            counted(len(self.changes), "difference"),
            f"{counted(self.same, 'tensor')} of the same shape and dtype",
            f"{self.equal} of equal values",
            f"{self.unknown} not compared",
        )


def diff(a: Side, b: Side, values: Mapping[str, ValueDifference] | None = None) -> DiffReport:
    """Compare two sides.

    Values are equal or not as ``values`` says; those of other tensors, as the digests of both say. Tensors are compared
    by name. A tensor that only A has and one that only B has are reported as renamed if they have the same shape, dtype
    and digest; if several are equal, they are paired in order.

    :param values: the differences of values that were read, by the names of tensors.
    """
    changes = [Change(name=name, kind="config", a=x, b=y) for name, x, y in _fields(a.config, b.config)]
    positions = {name: i for i, name in enumerate(b.names)}
    values = values or {}
    renamed = _renamed(a, b, positions)
    same = equal = 0
    not_compared: list[str] = []

    for i, name in enumerate(a.names):
        j = positions.get(name)
        if j is None:
            new = renamed.get(name)
            if new is None:
                changes.append(Change(name=name, kind="only in A", a=_tensor(a, i), b=None))
            else:
                changes.append(Change(name=name, kind="renamed", a=name, b=new))
            continue

        found = list(_tensor_changes(a, i, b, j, values.get(name)))
        changes += found
        if any(change.kind != "values" for change in found):
            continue
        same += 1
        if not found and (name in values or (name in a.digests and name in b.digests)):
            equal += 1
        elif not found and a.has_values and b.has_values:
            not_compared.append(name)

    ours, new_names = set(a.names), set(renamed.values())
    changes += [
        Change(name=name, kind="only in B", a=None, b=_tensor(b, j))
        for j, name in enumerate(b.names)
        if name not in ours and name not in new_names
    ]

    return DiffReport(
        changes=tuple(changes),
        same=same,
        equal=equal,
        not_compared=tuple(not_compared),
        values=values,
        names=(*a.names, *(name for name in b.names if name not in ours and name not in new_names)),
    )


def _tensor_changes(a: Side, i: int, b: Side, j: int, values: ValueDifference | None) -> Iterator[Change]:
    name = a.names[i]
    same = True
    if a.shapes[i] != b.shapes[j]:
        same = False
        yield Change(name=name, kind="shape", a=a.shapes[i], b=b.shapes[j])
    if None not in (a.dtypes[i], b.dtypes[j]) and a.dtypes[i] != b.dtypes[j]:
        same = False
        yield Change(name=name, kind="dtype", a=a.dtypes[i], b=b.dtypes[j])

    # If the shape or the dtype differs, different bytes are no further change.
    if not same:
        return
    digests = a.digests.get(name), b.digests.get(name)
    if values is not None:
        if not values.equal:
            yield Change(name=name, kind="values", a=None, b=None)
    elif None not in digests and digests[0] != digests[1]:
        yield Change(name=name, kind="values", a=digests[0], b=digests[1])


def _renamed(a: Side, b: Side, positions: Mapping[str, int]) -> dict[str, str]:
    """Return the names that only B has of tensors under names that only A has."""
    ours = set(a.names)
    free: defaultdict[object, list[str]] = defaultdict(list)
    for j in reversed(range(len(b.names))):
        if b.names[j] not in ours and b.names[j] in b.digests:
            free[b.digests[b.names[j]], b.shapes[j], b.dtypes[j]].append(b.names[j])

    renamed: dict[str, str] = {}
    for i, name in enumerate(a.names):
        if name not in positions and name in a.digests:
            equals = free.get((a.digests[name], a.shapes[i], a.dtypes[i]))
            if equals:
                renamed[name] = equals.pop()

    return renamed


def _tensor(side: Side, i: int) -> dict[str, object]:
    return {"dtype": side.dtypes[i], "shape": side.shapes[i]}


def _fields(a: Mapping[str, object], b: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """Yield the fields that differ, with their dotted paths."""
    for name in [*a, *(name for name in b if name not in a)]:
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from _fields(x, y, f"{prefix}{name}.")
        elif x != y:
            yield f"{prefix}{name}", x, y


def diff_models(
    a: AssetCard | str | Path,
    b: AssetCard | str | Path,
    *,
    values: bool = False,
    restrict: bool = True,
    progress: bool = False,
    store: AssetStore | None = None,
) -> DiffReport:
    """Compare two checkpoints or two architectures.

    Checkpoints are compared by their tensors: names, shapes, dtypes, and values if the catalog knows the digests of
    both. Architectures are compared by the fields of their configurations, and the names and shapes of parameters.

    :param a: a card, the name of one, the path of a checkpoint, or an architecture as ``"family/architecture"``.
    :param b: likewise; an architecture if ``a`` is one.
    :param values: read the tensors of the same name and shape, unless their digests are known to be equal, and measure
        how far their values are apart: ``values`` of the report. Tensors of different dtypes are compared in a wider
        one. Takes a few MiB of memory for each core.
    :param restrict: see :func:`lading.formats.index`; for a path.
    :param progress: show a bar on stderr while values are read.

    :raises AssetNotFoundError: no card has that name.
    :raises ModelFamilyNotKnownError: the family of an architecture is not registered.
    :raises ModelArchitectureNotKnownError: the family has no such architecture.
    :raises NotSupportedError: one is a checkpoint and the other an architecture, which has no ``values`` either.
    :raises CheckpointNotFoundError: ``values``, and a checkpoint is not on this machine.

    For checkpoints, also raises what :func:`check_model` does.
    """
    store = store or get_asset_store()
    of_a, of_b = _architecture(a, store), _architecture(b, store)
    if (of_a is None) != (of_b is None):
        raise NotSupportedError(
            "Expected two checkpoints or two architectures to compare, but found one of each. Run `lading check NAME` "
            "to check that the checkpoint of a model fits its architecture."
        )
    if of_a is not None and of_b is not None:
        if values:
            raise NotSupportedError(
                f"Expected two checkpoints whose values can be read, but {a} and {b} are architectures, whose "
                "parameters have no values. Run `lading diff` without `--values`."
            )
        return diff(_architecture_side(of_a), _architecture_side(of_b))

    one, other = (resolve_checkpoint(target, store, restrict=restrict) for target in (a, b))
    side_a, side_b = (Side.of_manifest(each.manifest, _digests(each, store)) for each in (one, other))
    read = _read_values(one, other, side_a, side_b, progress=progress) if values else None

    return diff(side_a, side_b, read)


def _read_values(
    a: Checkpoint, b: Checkpoint, side_a: Side, side_b: Side, *, progress: bool
) -> Mapping[str, ValueDifference]:
    """Return the differences of values that have to be read to know them, by the names of tensors."""
    positions = {name: j for j, name in enumerate(side_b.names)}
    pairs = [
        (i, positions[name])
        for i, name in enumerate(side_a.names)
        if name in positions and _must_be_read(side_a, i, side_b, positions[name])
    ]
    if not pairs:
        return {}

    for each in (a, b):
        if each.files is None:
            raise CheckpointNotFoundError(
                each.where,
                f"The values of {each.name!r} are to be read, but its checkpoint is at {each.where}, not on this "
                f"machine. `lading pull {each.name}` fetches it.",
            )
    files = Files(a.manifest, a.here()), Files(b.manifest, b.here())
    pairs = [(i, j) for i, j in pairs if files[0].has_values(i) and files[1].has_values(j)]
    found = compare_tensors(*files, pairs, progress=progress)

    return {side_a.names[i]: difference for (i, _), difference in zip(pairs, found, strict=True)}


def _must_be_read(a: Side, i: int, b: Side, j: int) -> bool:
    if a.shapes[i] != b.shapes[j]:
        return False
    digests = a.digests.get(a.names[i]), b.digests.get(b.names[j])

    return None in digests or digests[0] != digests[1]


def _architecture(target: AssetCard | str | Path, store: AssetStore) -> Architecture | None:
    """Return the architecture that a target means; ``None`` if it means a checkpoint."""
    if not isinstance(target, str) or "/" not in target or store.maybe_retrieve_card(target) is not None:
        return None
    family, _, name = target.partition("/")

    return store.architecture(name, family)


def _architecture_side(architecture: Architecture) -> Side:
    family = get_family(architecture.family)
    config = architecture_config(architecture, family.config_kls)
    targets = targets_of(build_on_meta(family, config), dtype=None)

    return Side(
        names=targets.names, shapes=targets.shapes, dtypes=targets.dtypes, config=asdict(config), has_values=False
    )


def _digests(checkpoint: Checkpoint, store: AssetStore) -> Mapping[str, str]:
    """Return the known digests of a checkpoint's tensors, if they are those of its current files."""
    # Published files are pinned. Other files must be in the state in which they were verified.
    if checkpoint.ref is None and not checkpoint.trusted:
        stored = store.checkpoint(checkpoint.uri)
        copies = () if stored is None else stored.copies
        verified = {copy.path: copy.stat for copy in copies if copy.verified_at is not None}
        if any(verified.get(file.path.absolute()) != file.stat for file in checkpoint.here()):
            return {}

    return store.tensor_digests(checkpoint.uri)
