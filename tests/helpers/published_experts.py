"""The manifest of a mixture of experts as its publisher stores it: a tensor for each weight of each expert."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

from lading.formats.manifest import BITS, Manifest, Shard
from lading.models.family import Family

SHARD = 4 << 30
"""The bytes of a file, as on the hub."""


def separate_shapes(family: Family[Any, Any], config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a model's tensors, with ``gate_proj``, ``up_proj`` and ``down_proj`` per expert."""
    assert family.shapes is not None
    for name, shape in family.shapes(config).items():
        if isinstance(shape, str):
            continue
        experts, _, leaf = name.rpartition(".")
        if not experts.endswith(".experts"):
            yield name, shape
            continue
        count, rows, columns = shape
        for e in range(count):
            for part in ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,):
                cut = rows // 2 if leaf == "gate_up_proj" else rows
                yield f"{experts}.{e}.{part}.weight", (cut, columns)


def manifest_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Manifest:
    """Return the manifest of files that hold these tensors one after another, by name with dtype and shape."""
    shard_ids, offsets, ends = array("I"), array("q"), [1 << 20]
    for dtype, shape in tensors.values():
        size = math.prod(shape) * BITS[dtype] // 8
        if ends[-1] + size > SHARD and ends[-1] > 1 << 20:
            ends.append(1 << 20)
        shard_ids.append(len(ends) - 1)
        offsets.append(ends[-1])
        ends[-1] += size
    count = len(ends)

    return Manifest(
        format="safetensors",
        shards=tuple(Shard(name=f"model-{n + 1:05}-of-{count:06}.safetensors", size=end) for n, end in enumerate(ends)),
        names=tuple(tensors),
        dtypes=[dtype for dtype, _ in tensors.values()],
        shapes=tuple(shape for _, shape in tensors.values()),
        shard_ids=shard_ids,
        offsets=offsets,
    )
