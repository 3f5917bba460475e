"""Whether a checkpoint fits a model: all that does not, found from the manifest alone. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from lading.formats.manifest import Manifest
from lading.models.targets import Targets
from lading.planning.composition import Source, shape_of, tensors_of
from lading.planning.rules import Route
from lading.transfer.dtypes import FLOATS

_WIDER: Mapping[str, frozenset[str]] = {
    "I8": frozenset({"I16", "I32", "I64"}),
    "I16": frozenset({"I32", "I64"}),
    "I32": frozenset({"I64"}),
    "U8": frozenset({"I16", "I32", "I64"}),
}
"""The dtypes of integers that hold all numbers of another: counters are stored as narrower ones."""


def quantised(manifest: Manifest, targets: Targets, routed: Route) -> list[int]:
    """The tensors that weights would be made of although their numbers mean nothing without scales beside them."""
    return [
        tensor
        for target, source in _sources(routed)
        for tensor in tensors_of(source)
        if _is_float(targets, target) and manifest.dtypes[tensor] not in FLOATS
    ]


def problems(manifest: Manifest, targets: Targets, routed: Route) -> list[str]:
    """Everything that is missing, unexpected, claimed twice, mis-shaped or of another dtype, one line each."""
    shapes = dict(zip(targets.names, targets.shapes, strict=True))
    found = [f"missing: {name} {list(shapes[name])}" for name in routed.missing]
    found += [f"unexpected: {name}" for name in routed.unexpected]
    found += [f"claimed by {len(names)} tensors: {target} by {', '.join(names)}" for target, names in routed.clashes]

    found += [f"incomplete: {name}: {why}" for name, why in routed.incomplete]

    for target, source in [*_sources(routed), *routed.duplicates]:
        name, shape = name_of(source, manifest), shape_of(source, manifest.shapes)
        wanted = targets.dtypes[target]
        stored = next((d for d in _dtypes(source, manifest) if d != wanted and wanted not in _WIDER.get(d, ())), None)
        if shape != targets.shapes[target]:
            expected, is_ = list(targets.shapes[target]), list(shape)
            found.append(f"mis-shaped: {name} is expected to be {expected}, but is {is_}")
        elif not _is_float(targets, target) and stored is not None:
            found.append(f"of another dtype: {name} is expected to be {wanted}, but is {stored}")

    return found


def name_of(source: Source, manifest: Manifest) -> str:
    """What ``source`` is called in a message: its tensor, or the first one and how many more there are."""
    first, *others = tensors_of(source)

    return manifest.names[first] + (f" with {len(others)} more" if others else "")


def _dtypes(source: Source, manifest: Manifest) -> list[str]:
    return [manifest.dtypes[tensor] for tensor in tensors_of(source)]


def _sources(routed: Route) -> list[tuple[int, Source]]:
    """(target, what it is made of)."""
    return [
        (target, routed.composed.get(i, tensor))
        for i, (target, tensor) in enumerate(zip(routed.targets, routed.tensors, strict=True))
    ]


def _is_float(targets: Targets, target: int) -> bool:
    dtype = targets.dtypes[target]

    return dtype is None or dtype in FLOATS
