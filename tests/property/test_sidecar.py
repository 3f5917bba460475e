"""Executing with a sidecar equals loading whole, then slicing; and what is forecast of it is what each rank plans."""

from __future__ import annotations

import math
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.sidecar import Sidecar, blocks_of, sidecar_uri, substituted
from lading.families import bert, llama, qwen
from lading.formats.digests import default_dims
from lading.formats.digests import joined as digests_joined
from lading.formats.manifest import BITS, Manifest, Shard
from lading.gangs import simulate_gangs
from lading.models.construct import build_on_meta, resolve_dtypes, split
from lading.models.family import Family
from lading.models.targets import targets_of
from lading.operations.plan import plan_checkpoint
from lading.planning.box import Box
from lading.planning.plan import Wanted, plan
from lading.planning.rules import route
from lading.system.filesystem import FileStat
from lading.transfer.dtypes import TORCH_DTYPES
from lading.transfer.execute import execute, hash_checkpoint
from lading.transfer.files import ShardFile
from lading.transfer.hashing import Hasher

SIZES = st.sampled_from([1, 2, 3, 4, 8])


@st.composite
def manifests(draw: st.DrawFn, tp: int) -> Manifest:
    """Matrices whose columns divide by ``tp``, and others, in one file or two."""
    names, dtypes, shapes, shard_ids, offsets, shards = [], [], [], array("I"), array("q"), []
    for shard in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from([0, 8, 64]))
        for _ in range(draw(st.integers(1, 5))):
            dtype = draw(st.sampled_from(["BF16", "F32", "U8"]))
            shape = (draw(SIZES), draw(SIZES) * draw(st.sampled_from([1, tp, tp])))
            names.append(f"t{len(names)}")
            dtypes.append(dtype)
            shapes.append(shape)
            shard_ids.append(shard)
            offsets.append(at)
            at += math.prod(shape) * BITS[dtype] // 8
        shards.append(Shard(name=f"{shard}.safetensors", size=at))

    return Manifest(
        format="safetensors", shards=tuple(shards), names=names, dtypes=dtypes, shapes=shapes, shard_ids=shard_ids,
        offsets=offsets,
    )  # fmt: skip


def sidecar_of(manifest: Manifest, tensors: array[int], tp: int, path: Path, stat: FileStat, start: int) -> Sidecar:
    """The sidecar whose tensors begin at ``start`` of its file."""
    names, dtypes, shapes = map(list, zip(*blocks_of(manifest, tensors, tp), strict=True))
    offsets = array("q")
    at = start
    for dtype, shape in zip(dtypes, shapes, strict=True):
        offsets.append(at)
        at += math.prod(shape) * BITS[dtype] // 8
    blocks = Manifest(
        format="safetensors", shards=(Shard(name=path.name, size=at),), names=names, dtypes=dtypes, shapes=shapes,
        shard_ids=array("I", [0]) * len(names), offsets=offsets,
    )  # fmt: skip

    return Sidecar(
        uri=sidecar_uri("file:///x", tp), tp=tp, manifest=blocks, file=ShardFile(path=path, stat=stat), tensors=tensors
    )


def tensor_in(manifest: Manifest, i: int, contents: list[bytes]) -> Tensor:
    begin = manifest.offsets[i]
    data = contents[manifest.shard_ids[i]][begin : begin + manifest.nbytes(i)]
    return torch.frombuffer(bytearray(data), dtype=TORCH_DTYPES[manifest.dtypes[i]]).view(manifest.shapes[i])


@settings(max_examples=80, deadline=None)
@given(data=st.data(), tp=st.sampled_from([2, 3, 4]), mapped=st.booleans(), hashed=st.booleans())
def test_executing_equals_load_whole_then_slice(data: st.DataObject, tp: int, mapped: bool, hashed: bool) -> None:
    manifest = data.draw(manifests(tp))
    cut = [i for i, (_, cols) in enumerate(manifest.shapes) if cols % tp == 0 and data.draw(st.booleans())]
    chosen = data.draw(st.lists(st.integers(0, len(manifest) - 1), max_size=8))
    boxes = []
    for i in chosen:
        rows, cols = manifest.shapes[i]
        first, last = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
        if cols % tp == 0 and data.draw(st.booleans()):
            width = cols // tp
            boxes.append(Box((first, data.draw(st.integers(0, tp - 1)) * width), (last - first, width)))
        else:
            start = data.draw(st.integers(0, cols))
            boxes.append(Box((first, start), (last - first, data.draw(st.integers(0, cols - start)))))
    wanted = Wanted(tensors=chosen, boxes=boxes, dtypes=[manifest.dtypes[i] for i in chosen])
    random = data.draw(st.randoms(use_true_random=False))

    with tempfile.TemporaryDirectory() as folder:
        contents = [random.randbytes(shard.size) for shard in manifest.shards]
        expected = [
            tensor_in(manifest, i, contents)[tuple(map(slice, box.starts, box.ends))]
            for i, box in zip(chosen, boxes, strict=True)
        ]
        files = []
        for shard, content in zip(manifest.shards, contents, strict=True):
            (path := Path(folder, shard.name)).write_bytes(content)
            files.append(ShardFile(path=path, stat=FileStat.from_stat(path.stat())))

        sidecar = None
        if cut:
            start = data.draw(st.sampled_from([0, 8, 64]))
            blocks = [tensor_in(manifest, i, contents).chunk(tp, 1)[k] for k in range(tp) for i in cut]
            content = bytes(start) + b"".join(
                block.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for block in blocks
            )
            (path := Path(folder, "sidecar.safetensors")).write_bytes(content)
            sidecar = sidecar_of(manifest, array("I", cut), tp, path, FileStat.from_stat(path.stat()), start)
            for file in files:
                # What is cut can be had from the sidecar alone.
                assert file.path.exists()
        source, found = substituted(manifest, wanted, sidecar)
        if sidecar is not None:
            files.append(sidecar.file)
        planned = plan(source, found, mapped=mapped)
        hasher = Hasher(source, default_dims(source), planned, found) if hashed else None
        shapes = [(box.sizes, dtype) for box, dtype in zip(found.boxes, found.dtypes, strict=True)]
        tensors = execute(planned, files, shapes, threads=2, hasher=hasher)
        if hasher is not None and sidecar is not None:
            parts = hash_checkpoint(manifest, files[:-1]), hash_checkpoint(sidecar.manifest, files[-1:])
            whole, seen = digests_joined(*parts), hasher.digests()
            assert whole == hash_checkpoint(source, files)
            for i in range(len(source)):
                for block in range(whole.starts[i + 1] - whole.starts[i]):
                    at = (whole.starts[i] + block) * 32
                    if seen.known[i] >> block & 1:
                        assert seen.blocks[at : at + 32] == whole.blocks[at : at + 32]

    for tensor, want in zip(tensors, expected, strict=True):
        assert tensor.view(torch.uint8).numpy().tobytes() == want.contiguous().view(torch.uint8).numpy().tobytes()


SMALL = {"model_dim": 24, "vocab_size": 37, "num_layers": 2, "num_attn_heads": 4, "ffn_inner_dim": 40}
CONFIGS: dict[str, tuple[Family[Any, Any], Any]] = {
    "qwen": (qwen.FAMILY, qwen.QwenConfig(**SMALL, num_key_value_heads=2, q_norm=True, tied_embeddings=True)),
    "llama": (llama.FAMILY, llama.LLaMAConfig(**SMALL, num_key_value_heads=1, qkv_proj_bias=True, ffn_bias=True)),
    "bert": (bert.FAMILY, bert.BertConfig(**SMALL)),
}


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_every_rank_reads_what_was_told(name: str, data: st.DataObject) -> None:
    family, config = CONFIGS[name]
    sizes = data.draw(st.sampled_from([(1, 1, 1, 2), (1, 1, 1, 4), (1, 1, 2, 2), (1, 2, 2, 2), (2, 1, 2, 2)]))
    named = dict(zip(("pp", "rdp", "sdp", "tp"), sizes, strict=True))
    tp = named["tp"]
    rank = data.draw(st.integers(0, int(np.prod(sizes)) - 1))
    dtype = data.draw(st.sampled_from([None, torch.float32]))

    whole = targets_of(build_on_meta(family, config), dtype=None)
    names, shapes = data.draw(st.permutations(list(zip(whole.names, whole.shapes, strict=True)))), array("q")
    at = 64
    for _, shape in names:
        shapes.append(at)
        at += math.prod(shape) * 2
    manifest = Manifest(
        format="safetensors", shards=(Shard(name="m.safetensors", size=at),), names=[n for n, _ in names],
        dtypes=["BF16"] * len(names), shapes=[s for _, s in names], shard_ids=array("I", [0]) * len(names),
        offsets=shapes,
    )  # fmt: skip
    by_columns = [i for i, (n, _) in enumerate(names) if family.parallel_plan(config).shard_dim(n) == 1]
    assert by_columns
    sidecar = sidecar_of(manifest, array("I", by_columns), tp, Path("/s.safetensors"), FileStat(0, 0, 0, 0), 128)
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)

    told = plan_checkpoint(replace(checkpoint, sidecar=sidecar), family, config, sizes=named, dtype=dtype, ranks=[rank])
    without = plan_checkpoint(checkpoint, family, config, sizes=named, dtype=dtype, ranks=[rank])

    module = build_on_meta(family, config)
    with simulate_gangs(rank, **named) as gangs:
        targets = split(module, family, config, gangs, dtype=dtype)
        routed = route(
            manifest.names, targets.names, family.rules_for(config, manifest.names), targets.aliases,
            shapes=manifest.shapes, target_shapes=targets.shapes,
        )  # fmt: skip
        wanted = Wanted(
            tensors=routed.tensors,
            boxes=[targets.boxes[i] for i in routed.targets],
            dtypes=resolve_dtypes(targets, routed, manifest, sdp=gangs.sdp.size),
            composed=routed.composed,
        )
        planned = plan(*substituted(manifest, wanted, sidecar))
    (found,) = told.ranks
    assert (found.bytes_read, found.reads) == (planned.read_bytes, planned.num_reads)
    assert found.files == len({*planned.shards, *planned.rows.shards})
    assert found.memory == without.ranks[0].memory
    assert not planned.rows.counts
    assert found.bytes_read == sum(box.numel for box in wanted.boxes) * 2
    assert (told.checkpoint_bytes, told.files) == (without.checkpoint_bytes, 1)
