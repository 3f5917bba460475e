"""Sidecars as values: their names, what they are of, and what is taken from them."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest

from lading.checkpoints.sidecar import (
    Sidecar,
    base_uri,
    blocks_of,
    identity_of,
    joined,
    matrices_of,
    sidecar_uri,
    substituted,
)
from lading.formats.manifest import Manifest, Shard
from lading.planning.box import Box
from lading.planning.composition import Joined
from lading.planning.plan import Wanted
from lading.system.filesystem import FileStat
from lading.transfer.files import ShardFile


def manifest_of(*tensors: tuple[str, str, tuple[int, ...]], file: str = "model.safetensors") -> Manifest:
    """Tensors of 2 bytes an element, one behind the other."""
    offsets, at = array("q"), 64
    for _, _, shape in tensors:
        offsets.append(at)
        size = 2
        for n in shape:
            size *= n
        at += size
    return Manifest(
        format="safetensors",
        shards=(Shard(name=file, size=at),),
        names=[name for name, _, _ in tensors],
        dtypes=[dtype for _, dtype, _ in tensors],
        shapes=[shape for _, _, shape in tensors],
        shard_ids=array("I", [0]) * len(tensors),
        offsets=offsets,
    )


BASE = manifest_of(("norm", "BF16", (8,)), ("up", "BF16", (16, 8)), ("down", "BF16", (8, 16)), ("out.0", "F16", (4, 8)))
TENSORS = array("I", [2, 3])


def sidecar_of(base: Manifest, tensors: array[int], tp: int) -> Sidecar:
    manifest = manifest_of(*blocks_of(base, tensors, tp), file="x.safetensors")
    file = ShardFile(path=Path("/cache/x.safetensors"), stat=FileStat(1, 2, 3, 4))
    return Sidecar(uri="repack+tp=2:file:///x", tp=tp, manifest=manifest, file=file, tensors=tensors)


@pytest.mark.parametrize("uri", ["file:///a/b", "hg://org/name@main", "https://x.org/a:b\n?c=1"])
def test_a_uri_names_its_checkpoint(uri: str) -> None:
    assert base_uri(sidecar_uri(uri, 16)) == uri
    assert base_uri(uri) is None
    assert base_uri(f"x{sidecar_uri(uri, 2)}") is None


def test_blocks_of_one_rank_lie_side_by_side() -> None:
    assert list(blocks_of(BASE, TENSORS, 2)) == [
        ("down.0", "BF16", (8, 8)),
        ("out.0.0", "F16", (4, 4)),
        ("down.1", "BF16", (8, 8)),
        ("out.0.1", "F16", (4, 4)),
    ]


def test_what_a_sidecar_is_of() -> None:
    blocks = manifest_of(*blocks_of(BASE, TENSORS, 4))
    assert matrices_of(BASE, blocks, 4) == TENSORS
    assert matrices_of(BASE, blocks, 2) is None
    assert matrices_of(BASE, BASE, 4) is None
    assert matrices_of(BASE, blocks.take([]), 4) is None
    assert matrices_of(BASE, blocks.take(range(7)), 4) is None
    assert matrices_of(BASE, replace(blocks, dtypes=["F16"] * 8), 4) is None
    assert matrices_of(BASE.take([0, 1, 2]), blocks, 4) is None
    wider = manifest_of(("down", "BF16", (8, 32)), ("out.0", "F16", (4, 8)))
    assert matrices_of(wider, blocks, 4) is None


def test_identity_is_of_names_and_bytes() -> None:
    roots = {"down": "aa", "out.0": "bb", "up": "cc"}
    found = identity_of(BASE, TENSORS, roots)

    assert found == identity_of(BASE, TENSORS, roots | {"up": "dd"})
    assert found != identity_of(BASE, TENSORS, roots | {"down": "ab"})
    assert found != identity_of(BASE, array("I", [3, 2]), roots)
    assert identity_of(BASE, TENSORS, {"down": "aa"}) is None
    moved = replace(BASE, offsets=array("q", [n + 8 for n in BASE.offsets]))
    assert found == identity_of(moved, TENSORS, roots)


def test_only_just_the_columns_are_taken() -> None:
    sidecar = sidecar_of(BASE, TENSORS, 2)
    boxes = {
        "the second block": (2, Box((0, 8), (8, 8))),
        "rows of the first": (2, Box((4, 0), (4, 8))),
        "whole": (2, Box((0, 0), (8, 16))),
        "half a block": (2, Box((0, 8), (8, 4))),
        "across blocks": (2, Box((0, 4), (8, 8))),
        "nothing": (2, Box((0, 0), (0, 0))),
        "of another": (1, Box((0, 0), (16, 8))),
        "composed": (3, Box((0, 0), (4, 4))),
        "the last": (3, Box((0, 4), (4, 4))),
    }
    wanted = Wanted(
        tensors=[tensor for tensor, _ in boxes.values()],
        boxes=[box for _, box in boxes.values()],
        dtypes=["BF16"] * len(boxes),
        composed={7: Joined(dim=0, parts=(3,))},
    )

    manifest, found = substituted(BASE, wanted, sidecar)

    assert manifest == joined(BASE, sidecar)
    assert [manifest.names[i] for i in found.tensors] == [
        "down.1", "down.0", "down", "down", "down", "down", "up", "out.0", "out.0.1",
    ]  # fmt: skip
    taken = {0: Box((0, 0), (8, 8)), 1: Box((4, 0), (4, 8)), 8: Box((0, 0), (4, 4))}
    assert found.boxes == [taken.get(i, box) for i, box in enumerate(wanted.boxes)]
    assert (found.dtypes, found.composed) == (wanted.dtypes, wanted.composed)
    assert manifest.shards[manifest.shard_ids[found.tensors[0]]].name == "x.safetensors"


def test_without_a_sidecar_all_stays() -> None:
    wanted = Wanted(tensors=[2], boxes=[Box((0, 8), (8, 8))], dtypes=["BF16"])
    manifest, found = substituted(BASE, wanted, None)
    assert manifest is BASE
    assert found is wanted
