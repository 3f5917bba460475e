"""The differences of two checkpoints or two architectures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lading.cards.card import Architecture, AssetCard
from lading.cards.config import architecture_config
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.manifest import Manifest, by_layer
from lading.models.family import get_family
from lading.models.resolve import resolve_checkpoint
from lading.models.shapes import targets_of_config
from lading.system.display import counted, representation
from lading.system.filesystem import path_exists
from lading.system.needs import needs_torch
from lading.transfer.hashing import hash_checkpoint

if TYPE_CHECKING:
    from lading.transfer.compare import Files, ValueDifference

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

    def prefix_changes(self) -> dict[tuple[str, str], list[str]]:
        """Return the names in A of tensors that are renamed by a change of their prefix alone, by old and new prefix.

        A prefix ends in a dot or is empty. This leaves out changes of the prefix of a single tensor.
        """
        found: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            if change.kind == "renamed" and (prefixes := _prefix_change(str(change.a), str(change.b))) is not None:
                found.setdefault(prefixes, []).append(change.name)

        return {prefixes: names for prefixes, names in found.items() if len(names) > 1}

    def layers(self) -> list[LayerDifference]:
        """Return the differences by layer: each stack of layers in order, and last those of no layer."""
        of_layer = {layer: [self.names[i] for i in places] for layer, places in by_layer(self.names).items()}
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
            for layer, names in of_layer.items()
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
    and digest. If several are equal, only a prefix that other tensors changed, too, tells which is which.

    :param values: the differences of values that were read, by the names of tensors.
    """
    changes = [Change(name=name, kind="config", a=x, b=y) for name, x, y in _fields(a.config, b.config)]
    positions = {name: i for i, name in enumerate(b.names)}
    values = values or {}
    renamed = _renamed(a, b)
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

    # If the shape or the dtype differs, different bytes are not another change.
    if not same:
        return
    digests = a.digests.get(name), b.digests.get(name)
    if values is not None:
        if not values.equal:
            yield Change(name=name, kind="values", a=None, b=None)
    elif None not in digests and digests[0] != digests[1]:
        yield Change(name=name, kind="values", a=digests[0], b=digests[1])


def _renamed(a: Side, b: Side) -> dict[str, str]:
    """Return the names that only B has of tensors under names that only A has."""
    old, new = _by_content(a, b), _by_content(b, a)
    renamed = {
        names[0]: new[content][0] for content, names in old.items() if len(names) == len(new.get(content, ())) == 1
    }

    # Norms and biases often equal one another. Their order says nothing, but prefixes that others changed do.
    prefixes: defaultdict[str, set[str]] = defaultdict(set)
    for change in (_prefix_change(*pair) for pair in renamed.items()):
        if change is not None:
            prefixes[change[0]].add(change[1])
    for content, names in old.items():
        others = set(new.get(content, ()))
        if len(names) == len(others) == 1:
            continue
        pairs = {
            (name, other)
            for name in names
            for end in (0, *(at + 1 for at, sign in enumerate(name) if sign == "."))
            for after in prefixes.get(name[:end], ())
            if (other := after + name[end:]) in others
        }
        forth, back = Counter(name for name, _ in pairs), Counter(other for _, other in pairs)
        renamed |= {name: other for name, other in pairs if forth[name] == back[other] == 1}

    return renamed


def _by_content(side: Side, other: Side) -> dict[object, list[str]]:
    """Return the names that ``other`` lacks, by what their tensors are known to hold."""
    theirs = set(other.names)
    found: defaultdict[object, list[str]] = defaultdict(list)
    for name, shape, dtype in zip(side.names, side.shapes, side.dtypes, strict=True):
        if name not in theirs and name in side.digests:
            found[side.digests[name], shape, dtype].append(name)

    return found


def _prefix_change(old: str, new: str) -> tuple[str, str] | None:
    """Return the prefixes that two names do not share, which end in a dot or are empty; ``None`` without a same end.

    That of ``layers.0.weight`` and ``model.layers.0.weight`` is an empty one and ``model.``.
    """
    before, after = old.split("."), new.split(".")
    same = 0
    while same < min(len(before), len(after)) and before[-1 - same] == after[-1 - same]:
        same += 1
    if not same:
        return None
    end = sum(map(len, before[len(before) - same :])) + same - 1

    return old[: len(old) - end], new[: len(new) - end]


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
    store: CardStore | None = None,
) -> DiffReport:
    """Compare two checkpoints or two architectures.

    Checkpoints are compared by their tensors: names, shapes, dtypes, and values if the catalog knows the digests of
    both. Architectures are compared by the fields of their configurations, and the names and shapes of parameters.

    :param a: as ``load_model`` takes it, or an architecture as ``"family/architecture"``.
    :param b: likewise; an architecture if ``a`` is one.
    :param values: read the tensors of the same name and shape, unless their digests are known to be equal, and measure
        how far their values are apart: ``values`` of the report. Tensors of different dtypes are compared in a wider
        one. Read those that only one side has, too, where the other may have them under another name. Takes a few MiB
        of memory for each core.
    :param restrict: see :func:`lading.formats.index`; for a path.
    :param progress: show a bar on stderr while values are read.

    :raises ModelNotKnownError: it is not a card, a path, an architecture or a repository of the hub.
    :raises ModelFamilyNotKnownError: the family of an architecture is not registered.
    :raises ModelArchitectureNotKnownError: the family has no such architecture.
    :raises NotSupportedError: one is a checkpoint and the other an architecture, which has no ``values`` either.
    :raises CheckpointNotFoundError: ``values``, and a checkpoint is not on this machine.
    :raises TorchNotFoundError: ``values``, and torch is not installed.

    For checkpoints, also raises what :func:`check_model` does.
    """
    store = open_store(store)
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
    if not values:
        return diff(side_a, side_b)

    read = _read_values(one, other, side_a, side_b, progress=progress)
    side_a, side_b = _with_moved(one, other, side_a, side_b, progress=progress)

    return diff(side_a, side_b, read)


def _read_values(
    a: Checkpoint, b: Checkpoint, side_a: Side, side_b: Side, *, progress: bool
) -> Mapping[str, ValueDifference]:
    """Return the differences of values that have to be read to know them, by the names of tensors."""
    with needs_torch("A comparison of values"):
        from lading.transfer.compare import compare_tensors

    positions = {name: j for j, name in enumerate(side_b.names)}
    pairs = [
        (i, positions[name])
        for i, name in enumerate(side_a.names)
        if name in positions and _must_be_read(side_a, i, side_b, positions[name])
    ]
    if not pairs:
        return {}

    files = _files(a), _files(b)
    pairs = [(i, j) for i, j in pairs if files[0].has_values(i) and files[1].has_values(j)]
    found = compare_tensors(*files, pairs, progress=progress)

    return {side_a.names[i]: difference for (i, _), difference in zip(pairs, found, strict=True)}


def _with_moved(a: Checkpoint, b: Checkpoint, side_a: Side, side_b: Side, *, progress: bool) -> list[Side]:
    """Return the sides with the digests of tensors that the other may have under another name, which are read."""
    changes = diff(side_a, side_b).changes
    only_a = {change.name: str(change.a) for change in changes if change.kind == "only in A"}
    only_b = {change.name: str(change.b) for change in changes if change.kind == "only in B"}
    both = {*only_a.values()} & {*only_b.values()}

    sides = []
    for checkpoint, side, only in ((a, side_a, only_a), (b, side_b, only_b)):
        manifest = checkpoint.manifest
        chosen = [i for i, name in enumerate(manifest.names) if only.get(name) in both]
        if chosen:
            part = manifest.take(chosen)
            found = hash_checkpoint(part, _files(checkpoint).files, progress=progress)
            roots = {name: each.root for name, each in zip(part.names, found.iter(part), strict=True) if each}
            side = replace(side, digests={**side.digests, **roots})
        sides.append(side)

    return sides


def _files(checkpoint: Checkpoint) -> Files:
    from lading.transfer.compare import Files

    if checkpoint.files is None:
        raise CheckpointNotFoundError(
            checkpoint.where,
            f"The values of {checkpoint.name!r} are to be read, but its checkpoint is at {checkpoint.where}, not on "
            f"this machine. `lading pull {checkpoint.name}` fetches it.",
        )

    return Files(checkpoint.manifest, checkpoint.files)


def _must_be_read(a: Side, i: int, b: Side, j: int) -> bool:
    if a.shapes[i] != b.shapes[j]:
        return False
    digests = a.digests.get(a.names[i]), b.digests.get(b.names[j])

    return None in digests or digests[0] != digests[1]


def _architecture(target: AssetCard | str | Path, store: AssetStore) -> Architecture | None:
    """Return the architecture that a target means; ``None`` if it means a checkpoint.

    :raises ModelArchitectureNotKnownError: it begins with a family that has no such architecture.
    """
    if not isinstance(target, str) or store.maybe_retrieve_card(target) is not None:
        return None
    family, slash, name = target.partition("/")
    if not slash or family not in {known.name for known in store.families()}:
        return None
    found = store.maybe_architecture(name, family)

    return found if found is not None or path_exists(target) else store.architecture(name, family)


def _architecture_side(architecture: Architecture) -> Side:
    family = get_family(architecture.family)
    config = architecture_config(architecture, family.config_kls)
    targets = targets_of_config(family, config)

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
