"""Tensors that ranks saved in pieces are read, and hashed, as if each were one."""

from __future__ import annotations

import itertools
import math
import tempfile
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lading.formats.manifest import Manifest, Piece, Shard
from lading.planning.box import Box
from lading.planning.composition import Joined, Regroup, Reordered, Sliced, Source
from lading.planning.plan import Wanted, plan
from lading.system.filesystem import FileStat
from lading.transfer import compare
from lading.transfer.compare import Files, compare_tensors
from lading.transfer.dtypes import DTYPE_NAMES, TORCH_DTYPES
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.hashing import hash_checkpoint


@st.composite
def saved(draw: st.DrawFn) -> list[tuple[Tensor, list[Box]]]:
    """Tensors, and boxes that make each: a grid, such as a mesh of ranks has."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(1, 9), max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
        cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
        grid = itertools.product(*(itertools.pairwise(cut) for cut in cuts))
        boxes = [Box(tuple(a for a, _ in each), tuple(b - a for a, b in each)) for each in grid]
        values = (torch.arange(math.prod(shape)) + 10 * number) % 100  # exact in every dtype
        found.append((values.to(dtype).reshape(shape), draw(st.permutations(boxes))))
    return found


def write(folder: Path, tensors: list[tuple[Tensor, list[Box]]], shards: int) -> tuple[Manifest, list[ShardFile]]:
    """The pieces in turn in so many files, at any offset."""
    data = [bytearray(b"?" * (3 * i)) for i in range(shards)]
    rows = []
    for i, (tensor, boxes) in enumerate(tensors):
        pieces = []
        for n, box in enumerate(boxes):
            part = tensor[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))]
            shard = (i + n) % shards
            pieces.append(Piece(box.starts, box.sizes, shard, len(data[shard])))
            data[shard] += part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        pieces.sort(key=lambda piece: piece[2:])
        rows.append((pieces[0].shard, pieces[0].offset, i, tuple(pieces)))
    rows.sort()
    files = []
    for i, content in enumerate(data):
        path = folder / f"__{i}_0.distcp"
        path.write_bytes(content)
        files.append(ShardFile(path=path, stat=FileStat.from_stat(path.stat())))
    manifest = Manifest(
        format="torch",
        shards=tuple(Shard(name=f.path.name, size=f.stat.size) for f in files),
        names=[f"t{i}" for _, _, i, _ in rows],
        dtypes=[DTYPE_NAMES[tensors[i][0].dtype] for _, _, i, _ in rows],
        shapes=[tuple(tensors[i][0].shape) for _, _, i, _ in rows],
        shard_ids=array("I", [row[0] for row in rows]),
        offsets=array("q", [row[1] for row in rows]),
        pieces={at: pieces for at, (*_, pieces) in enumerate(rows) if len(pieces) > 1},
    )
    return manifest, files


def whole(manifest: Manifest, tensors: list[tuple[Tensor, list[Box]]]) -> list[Tensor]:
    return [tensors[int(name[1:])][0] for name in manifest.names]


@given(saved(), st.integers(1, 3), st.booleans(), st.data())
def test_boxes_of_tensors_in_pieces(
    tensors: list[tuple[Tensor, list[Box]]], shards: int, mapped: bool, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest, files = write(Path(folder), tensors, shards)
        values = whole(manifest, tensors)
        boxes, dtypes = [], []
        for value in values:
            starts = tuple(data.draw(st.integers(0, n)) for n in value.shape)
            sizes = tuple(data.draw(st.integers(0, n - s)) for n, s in zip(value.shape, starts, strict=True))
            boxes.append(Box(starts, sizes))
            dtypes.append(data.draw(st.sampled_from([DTYPE_NAMES[value.dtype], "F64"])))
        wanted = Wanted(tensors=range(len(values)), boxes=boxes, dtypes=dtypes)
        planned = plan(manifest, wanted, mapped=mapped)
        found = execute(planned, files, [(b.sizes, d) for b, d in zip(boxes, dtypes, strict=True)], threads=2)
        for value, box, dtype, tensor in zip(values, boxes, dtypes, found, strict=True):
            part = value[tuple(slice(a, b) for a, b in zip(box.starts, box.ends, strict=True))]
            assert torch.equal(tensor, part.to(TORCH_DTYPES[dtype]))


@given(saved(), st.integers(1, 3), st.data())
def test_compositions_of_tensors_in_pieces(
    tensors: list[tuple[Tensor, list[Box]]], shards: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest, files = write(Path(folder), tensors, shards)
        values = whole(manifest, tensors)
        i = data.draw(st.sampled_from(range(len(values))))
        value = values[i]
        if not value.dim():
            return
        dim = data.draw(st.integers(0, value.dim() - 1))
        size = value.shape[dim]
        group = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
        rows = data.draw(st.sampled_from([n for n in range(1, group + 1) if group % n == 0]))
        start = data.draw(st.integers(0, size - 1))
        order = Regroup(dim, rows, group // rows)
        source: Source = Joined(dim, (Reordered(order, i), Sliced(dim, start, size - start, i)))
        turned = value.movedim(dim, 0).reshape(-1, rows, group // rows, *value.movedim(dim, 0).shape[1:])
        reordered = turned.transpose(1, 2).reshape(value.movedim(dim, 0).shape).movedim(0, dim)
        expected = torch.cat([reordered, value.narrow(dim, start, size - start)], dim)

        wanted = Wanted(
            tensors=[i], boxes=[Box.whole(expected.shape)], dtypes=[manifest.dtypes[i]], composed={0: source}
        )
        (found,) = execute(plan(manifest, wanted), files, [(tuple(expected.shape), manifest.dtypes[i])], threads=1)
        assert torch.equal(found, expected)


@given(saved(), st.integers(1, 3), st.data())
def test_digests_are_those_of_whole_tensors(
    tensors: list[tuple[Tensor, list[Box]]], shards: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest, files = write(Path(folder), tensors, shards)
        (Path(folder) / "whole").mkdir()
        one, its = write(Path(folder) / "whole", [(t, [Box.whole(tuple(t.shape))]) for t, _ in tensors], 1)
        dims = {
            name: data.draw(st.integers(0, max(0, len(s) - 1))) for name, s in zip(one.names, one.shapes, strict=True)
        }

        def roots(manifest: Manifest, files: list[ShardFile]) -> dict[str, str]:
            digests = hash_checkpoint(manifest, files, [dims[name] for name in manifest.names], threads=1)
            return {name: d.root for name, d in zip(manifest.names, digests.iter(manifest), strict=True) if d}

        assert roots(manifest, files) == roots(one, its)
        assert len(roots(manifest, files)) == len(tensors)


@given(saved(), st.integers(1, 3), st.sampled_from([8, 24, 1 << 20]), st.data())
def test_values_are_compared_with_those_of_whole_tensors(
    tensors: list[tuple[Tensor, list[Box]]], shards: int, step: int, data: st.DataObject
) -> None:
    changed = [tensor.clone() for tensor, _ in tensors]
    expected = [0] * len(changed)
    for i, tensor in enumerate(changed):
        for at in data.draw(st.sets(st.integers(0, tensor.numel() - 1), max_size=4)):
            tensor.view(-1)[at] += 1
            expected[i] += 1
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_STEP", step)
        (Path(folder) / "whole").mkdir()
        a = Files(*write(Path(folder), tensors, shards))
        b = Files(*write(Path(folder) / "whole", [(t, [Box.whole(tuple(t.shape))]) for t in changed], 1))
        pairs = [(i, b.manifest.names.index(name)) for i, name in enumerate(a.manifest.names)]
        found = compare_tensors(a, b, pairs, threads=1)
        assert [each.changed for each in found] == [expected[int(name[1:])] for name in a.manifest.names]
