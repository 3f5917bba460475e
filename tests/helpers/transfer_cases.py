"""Manifests of any kind, and parts of them that a rank may want."""

from __future__ import annotations

from array import array

from hypothesis import strategies as st

from lading.formats.manifest import BITS, Manifest, Shard
from lading.planning.box import Box
from lading.planning.plan import Wanted

FLOATS = ["BF16", "F16", "F32", "F64"]


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    shards = []
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    shard_ids, offsets = array("I"), array("q")
    for shard in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, 40))  # not every writer aligns the data
        for _ in range(draw(st.integers(0, 6))):
            dtype = draw(st.sampled_from([*FLOATS, "I64", "U8"]))
            shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
            names.append(f"t{len(names)}")
            dtypes.append(dtype)
            shapes.append(shape)
            shard_ids.append(shard)
            offsets.append(at)
            at += Box.whole(shape).numel * BITS[dtype] // 8
        shards.append(Shard(name=f"{shard}.safetensors", size=at + draw(st.integers(0, 9))))
    return Manifest(
        format="safetensors",
        shards=tuple(shards),
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
    )


@st.composite
def wanted_of(draw: st.DrawFn, manifest: Manifest) -> Wanted:
    chosen = draw(st.permutations(range(len(manifest))))
    chosen = chosen[: draw(st.integers(0, len(chosen)))]
    boxes, dtypes = [], []
    for i in chosen:
        shape = manifest.shapes[i]
        if draw(st.booleans()):
            boxes.append(Box.whole(shape))
        else:
            starts = tuple(draw(st.integers(0, n)) for n in shape)
            boxes.append(Box(starts, tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, starts, strict=True))))
        stored = manifest.dtypes[i]
        dtypes.append(draw(st.sampled_from(FLOATS)) if stored in FLOATS else stored)
    return Wanted(tensors=chosen, boxes=boxes, dtypes=dtypes)
