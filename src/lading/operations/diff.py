"""In what two checkpoints, or two architectures, differ. Pure: no I/O, no torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lading.cards.card import Architecture, AssetCard
from lading.cards.config import architecture_config
from lading.catalog.store import AssetStore, get_asset_store
from lading.checkpoints.checkpoint import Checkpoint, path_checkpoint
from lading.checkpoints.locate import card_checkpoint
from lading.errors import NotSupportedError
from lading.formats.manifest import Manifest
from lading.models.construct import build_on_meta
from lading.models.family import get_family
from lading.models.targets import targets_of

Kind = Literal["config", "only in A", "only in B", "renamed", "shape", "dtype", "values"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two things to compare: its tensors, in columns of equal length, and its configuration."""

    names: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[str | None]
    """``None`` where none is stated, which differs from nothing: an architecture states none for its weights."""
    digests: Mapping[str, str] = field(default_factory=dict)
    """Of the bytes of tensors, by their names, where they are known."""
    config: Mapping[str, object] = field(default_factory=dict)
    """Fields and their values, which may be mappings themselves."""
    has_values: bool = True
    """True if its tensors have values; those of an architecture have none."""

    @classmethod
    def of_manifest(cls, manifest: Manifest, digests: Mapping[str, str] | None = None) -> Side:
        """The side of a checkpoint."""
        return cls(names=manifest.names, shapes=manifest.shapes, dtypes=manifest.dtypes, digests=digests or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One thing in which two sides differ."""

    name: str
    """Of the tensor, or of the field of the configuration, dotted."""
    kind: Kind
    a: object
    """What A has: of a tensor that only A has, ``{"dtype": …, "shape": …}``; of a renamed one its name; else the
    shape, dtype, digest or value. ``None`` where A has none."""
    b: object


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffReport:
    """In what A and B differ, and how far they agree."""

    changes: tuple[Change, ...]
    """Fields of the configuration first, then tensors, in the order of A and then that of B."""
    same: int
    """Tensors of the same name, shape and dtype."""
    equal: int
    """Tensors among these whose values are known to be equal."""
    not_compared: tuple[str, ...]
    """The names of those among these whose values were not compared, as a digest is not known, in the order of A."""

    @property
    def unknown(self) -> int:
        """The number of tensors whose values were not compared."""
        return len(self.not_compared)


def diff(a: Side, b: Side) -> DiffReport:
    """Compare two sides.

    Tensors are compared by name. One that only A has and one that only B has are told as one that was renamed if they
    have the same shape, dtype and digest; where several are equal, they are paired in their order.
    """
    changes = [Change(name=name, kind="config", a=x, b=y) for name, x, y in _fields(a.config, b.config)]
    positions = {name: i for i, name in enumerate(b.names)}
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

        found = list(_tensor_changes(a, i, b, j))
        changes += found
        if any(change.kind != "values" for change in found):
            continue
        same += 1
        if not found and name in a.digests and name in b.digests:
            equal += 1
        elif not found and a.has_values and b.has_values:
            not_compared.append(name)

    ours, new_names = set(a.names), set(renamed.values())
    changes += [
        Change(name=name, kind="only in B", a=None, b=_tensor(b, j))
        for j, name in enumerate(b.names)
        if name not in ours and name not in new_names
    ]

    return DiffReport(changes=tuple(changes), same=same, equal=equal, not_compared=tuple(not_compared))


def _tensor_changes(a: Side, i: int, b: Side, j: int) -> Iterator[Change]:
    name = a.names[i]
    same = True
    if a.shapes[i] != b.shapes[j]:
        same = False
        yield Change(name=name, kind="shape", a=a.shapes[i], b=b.shapes[j])
    if None not in (a.dtypes[i], b.dtypes[j]) and a.dtypes[i] != b.dtypes[j]:
        same = False
        yield Change(name=name, kind="dtype", a=a.dtypes[i], b=b.dtypes[j])

    # Bytes of another shape or dtype are others anyway.
    digests = a.digests.get(name), b.digests.get(name)
    if same and None not in digests and digests[0] != digests[1]:
        yield Change(name=name, kind="values", a=digests[0], b=digests[1])


def _renamed(a: Side, b: Side, positions: Mapping[str, int]) -> dict[str, str]:
    """Names that only A has → names that only B has, for the same tensor."""
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
    """The fields that differ, by their dotted path."""
    for name in [*a, *(name for name in b if name not in a)]:
        x, y = a.get(name), b.get(name)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from _fields(x, y, f"{prefix}{name}.")
        elif x != y:
            yield f"{prefix}{name}", x, y


def diff_models(
    a: AssetCard | str | Path, b: AssetCard | str | Path, *, restrict: bool = True, store: AssetStore | None = None
) -> DiffReport:
    """In what two checkpoints, or two architectures, differ.

    Of checkpoints, the tensors are compared: names, shapes, dtypes, and values where the catalog knows the digests of
    both. Of architectures, the fields of their configurations, and names and shapes of the parameters.

    :param a: a card, the name of one, the path of a checkpoint, or an architecture as ``"family/architecture"``.
    :param b: likewise; an architecture if ``a`` is one.
    :param restrict: as :func:`lading.formats.index` takes it; for a path.

    :raises AssetNotFoundError: no card has that name.
    :raises ModelFamilyNotKnownError: the family of an architecture is not registered.
    :raises ModelArchitectureNotKnownError: the family has no such architecture.
    :raises NotSupportedError: a checkpoint and an architecture.

    Otherwise what :func:`check_model` does of checkpoints.
    """
    store = store or get_asset_store()
    things = [_retrieve(target, store) for target in (a, b)]
    if len({isinstance(thing, Architecture) for thing in things}) > 1:
        raise NotSupportedError(
            "Expected two checkpoints or two architectures to compare, but found one of each. `lading check NAME` says "
            "whether the checkpoint of a model fits its architecture."
        )

    return diff(*(_side(thing, store, restrict=restrict) for thing in things))


def _retrieve(target: AssetCard | str | Path, store: AssetStore) -> AssetCard | Architecture | Path:
    if not isinstance(target, str):
        return target

    family, slash, arch = target.partition("/")
    if slash and store.maybe_retrieve_card(target) is None:
        return store.architecture(arch, family)

    return store.retrieve_card(target)


def _side(thing: AssetCard | Architecture | Path, store: AssetStore, *, restrict: bool) -> Side:
    if isinstance(thing, Architecture):
        return _architecture_side(thing)

    if isinstance(thing, Path):
        checkpoint = path_checkpoint(thing, restrict=restrict)
    else:
        checkpoint = card_checkpoint(thing, store)

    return Side.of_manifest(checkpoint.manifest, _digests(checkpoint, store))


def _architecture_side(architecture: Architecture) -> Side:
    family = get_family(architecture.family)
    config = architecture_config(architecture, family.config_kls)
    targets = targets_of(build_on_meta(family, config), dtype=None)

    return Side(
        names=targets.names, shapes=targets.shapes, dtypes=targets.dtypes, config=asdict(config), has_values=False
    )


def _digests(checkpoint: Checkpoint, store: AssetStore) -> Mapping[str, str]:
    """The digests of a checkpoint's tensors, if the catalog knows them and they are those of its files as they are."""
    # What a source publishes is pinned. Files that others look after are those that were verified while they look so.
    if checkpoint.ref is None and not checkpoint.trusted:
        stored = store.checkpoint(checkpoint.uri)
        copies = () if stored is None else stored.copies
        verified = {copy.path: copy.stat for copy in copies if copy.verified_at is not None}
        if any(verified.get(file.path.absolute()) != file.stat for file in checkpoint.here()):
            return {}

    return store.tensor_digests(checkpoint.uri)
