"""Whether a checkpoint fits a model: all that does not, found from the manifest alone. Pure."""

from __future__ import annotations

from lading.keymap import Route
from lading.manifest import Manifest
from lading.transfer.dtypes import FLOATS
from lading.transfer.targets import Targets


def quantised(manifest: Manifest, targets: Targets, routed: Route) -> list[int]:
    """The tensors that weights would be made of although their numbers mean nothing without scales beside them."""
    return [
        tensor
        for target, tensor in zip(routed.targets, routed.tensors, strict=True)
        if _is_float(targets, target) and manifest.dtypes[tensor] not in FLOATS
    ]


def problems(manifest: Manifest, targets: Targets, routed: Route) -> list[str]:
    """Everything that is missing, unexpected, claimed twice, mis-shaped or of another dtype, one line each."""
    shapes = dict(zip(targets.names, targets.shapes, strict=True))
    found = [f"missing: {name} {list(shapes[name])}" for name in routed.missing]
    found += [f"unexpected: {name}" for name in routed.unexpected]
    found += [f"claimed by {len(names)} tensors: {target} by {', '.join(names)}" for target, names in routed.clashes]

    for target, tensor in [*zip(routed.targets, routed.tensors, strict=True), *routed.duplicates]:
        name, stored = manifest.names[tensor], manifest.dtypes[tensor]
        if manifest.shapes[tensor] != targets.shapes[target]:
            expected, is_ = list(targets.shapes[target]), list(manifest.shapes[tensor])
            found.append(f"mis-shaped: {name} is expected to be {expected}, but is {is_}")
        elif not _is_float(targets, target) and stored != targets.dtypes[target]:
            found.append(f"of another dtype: {name} is expected to be {targets.dtypes[target]}, but is {stored}")

    return found


def _is_float(targets: Targets, target: int) -> bool:
    dtype = targets.dtypes[target]

    return dtype is None or dtype in FLOATS
