"""What is forecast of all ranks at once is what each rank plans by itself, with torch's own placements."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from lading.checkpoints.checkpoint import Checkpoint
from lading.families import bert, llama, mistral, mixtral, qwen
from lading.formats.manifest import BITS, Manifest
from lading.formats.manifest import Shard as File
from lading.gangs import simulate_gangs
from lading.gangs.world import AXES
from lading.models.construct import build_on_meta, split
from lading.models.dtype import resolve_dtypes
from lading.models.family import Family
from lading.models.fit import match
from lading.models.targets import targets_of
from lading.operations import plan_reads as forecasting
from lading.operations.plan import LoadPlan, RankPlan, plan_checkpoint
from lading.operations.plan_reads import Layout, forecast, lay_out
from lading.planning import plan as plans
from lading.planning.plan import Wanted, plan
from lading.transfer.dtypes import TORCH_DTYPES

SMALL = {"model_dim": 24, "vocab_size": 37, "num_layers": 2, "num_attn_heads": 4, "ffn_inner_dim": 40}
CONFIGS: dict[str, tuple[Family[Any, Any], Any]] = {
    "qwen": (
        qwen.FAMILY,
        qwen.QwenConfig(**SMALL, num_key_value_heads=2, q_norm=True, k_norm=True, tied_embeddings=True),
    ),
    "llama": (llama.FAMILY, llama.LLaMAConfig(**SMALL, num_key_value_heads=1, qkv_proj_bias=True, ffn_bias=True)),
    "mistral": (mistral.FAMILY, mistral.MistralConfig(**SMALL, num_key_value_heads=4)),
    "mixtral": (mixtral.FAMILY, mixtral.MixtralConfig(**SMALL, num_key_value_heads=2)),
    "bert": (bert.FAMILY, bert.BertConfig(**SMALL)),
}
DTYPES = ["BF16", "F32", "F16"]


@st.composite
def checkpoints(draw: st.DrawFn, family: Family[Any, Any], config: Any) -> Checkpoint:
    """A manifest of all that a model needs, in files, an order and dtypes of any kind."""
    targets = targets_of(build_on_meta(family, config), dtype=None)
    order = draw(st.permutations(range(len(targets.names)))) if draw(st.booleans()) else range(len(targets.names))
    common = draw(st.sampled_from(DTYPES))
    mixed, gaps = draw(st.booleans()), draw(st.booleans())
    start = draw(st.sampled_from([0, 8, 104, 4096, 4099]))
    files = draw(st.integers(1, 3))
    names, dtypes, shapes = [], [], []
    shard_ids, offsets = array("I"), array("q")
    shards = []
    cuts = [len(order) * n // files for n in range(files + 1)]
    for shard in range(files):
        at = start
        for i in order[cuts[shard] : cuts[shard + 1]]:
            dtype = targets.dtypes[i] or (draw(st.sampled_from(DTYPES)) if mixed else common)
            at += draw(st.sampled_from([0, 0, 64])) if gaps else 0
            names.append(targets.names[i])
            dtypes.append(dtype)
            shapes.append(targets.shapes[i])
            shard_ids.append(shard)
            offsets.append(at)
            at += int(np.prod(targets.shapes[i])) * BITS[dtype] // 8
        shards.append(File(name=f"{shard}.safetensors", size=at))
    manifest = Manifest(
        format="safetensors", shards=tuple(shards), names=names, dtypes=dtypes, shapes=shapes, shard_ids=shard_ids,
        offsets=offsets,
    )  # fmt: skip

    return Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)


def by_itself(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, rank: int, sizes: dict[str, int], dtype: Any
) -> RankPlan:
    """What one rank plans, as a load does it."""
    manifest = checkpoint.manifest
    module = build_on_meta(family, config)
    with simulate_gangs(rank, **sizes) as gangs:
        targets = split(module, family, config, gangs, dtype=dtype)
        found = match(manifest, targets, family, config)
        routed = found.routed
        boxes = [targets.boxes[i] for i in routed.targets]
        dtypes = resolve_dtypes(found, sdp=gangs.sdp.size)
        planned = plan(manifest, Wanted(tensors=routed.tensors, boxes=boxes, dtypes=dtypes, composed=routed.composed))
        memory: Counter[str] = Counter()
        for box, own in zip(boxes, dtypes, strict=True):
            memory[str(TORCH_DTYPES[own]).removeprefix("torch.")] += box.numel * BITS[own] // 8
        return RankPlan(
            rank=rank,
            pp=gangs.pp.rank,
            rdp=gangs.rdp.rank,
            sdp=gangs.sdp.rank,
            ep=gangs.ep.rank,
            tp=gangs.tp.rank,
            bytes_read=planned.read_bytes,
            reads=planned.num_reads,
            files=len({*planned.shards, *planned.rows.shards}),
            memory=dict(memory),
        )


def forecast_of(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, sizes: dict[str, int], dtype: Any
) -> LoadPlan:
    return plan_checkpoint(checkpoint, family, config, sizes=sizes, dtype=dtype, ranks=None)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=5)
@given(data=st.data())
def test_every_rank_reads_what_the_forecast_states(name: str, data: st.DataObject) -> None:
    family, config = CONFIGS[name]
    checkpoint = data.draw(checkpoints(family, config))
    sizes = data.draw(
        st.sampled_from(
            [
                (1, 1, 1, 1, 1),
                (1, 1, 1, 1, 2),
                (1, 1, 1, 1, 4),
                (1, 1, 3, 1, 1),
                (1, 1, 2, 1, 2),
                (1, 2, 2, 1, 1),
                (2, 1, 1, 1, 1),
                (2, 1, 1, 1, 2),
                (2, 2, 2, 1, 1),
                (1, 1, 4, 1, 4),
                (1, 1, 1, 4, 1),
                (1, 1, 2, 2, 2),
                (2, 1, 3, 2, 1),
            ]
        )
    )
    named = dict(zip(AXES, sizes, strict=True))
    dtype = data.draw(st.sampled_from([None, None, torch.float32, torch.bfloat16]))
    rank = data.draw(st.integers(0, int(np.prod(sizes)) - 1))

    found = forecast_of(checkpoint, family, config, named, dtype)

    assert len(found.ranks) == found.world_size == np.prod(sizes)
    assert found.ranks[rank] == by_itself(checkpoint, family, config, rank, named, dtype)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Manifest, Layout]:
    """Tensors of any shapes, placed in any way that this project places them, some of them not wanted."""
    sdp, tp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    aligned, step = draw(st.booleans()), draw(st.sampled_from([0, 0, 8]))
    names, dtypes, shapes, shard_ids, offsets = [], [], [], array("I"), array("q")
    shards = []
    for shard in range(draw(st.integers(1, 2))):
        at = draw(st.sampled_from([0, 8, 3]))
        for _ in range(draw(st.integers(0, 8))):
            if draw(st.integers(0, 4)) == 0:
                rows, columns = (draw(st.sampled_from([1, 30, 70])) * 2 * tp * sdp for _ in range(2))
                at = -(-at // 4) * 4 if aligned else at
                for name, dtype, shape in (
                    (f"t{len(names)}", "F8_E4M3", (rows, columns)),
                    (f"t{len(names)}_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))),
                ):
                    names.append(name)
                    dtypes.append(dtype)
                    shapes.append(shape)
                    shard_ids.append(shard)
                    offsets.append(at)
                    at += math.prod(shape) * BITS[dtype] // 8
                continue
            dtype = draw(st.sampled_from([*DTYPES, "U8"]))
            shape = tuple(
                n * draw(st.sampled_from([1, 2 * tp * sdp])) for n in draw(st.lists(st.integers(0, 4), max_size=3))
            )
            at = -(-at // 4) * 4 if aligned else at
            names.append(f"t{len(names)}")
            dtypes.append(dtype)
            shapes.append(shape)
            shard_ids.append(shard)
            offsets.append(at)
            at += math.prod(shape) * BITS[dtype] // 8 + step
        shards.append(File(name=f"{shard}", size=at))
    manifest = Manifest(
        format="safetensors", shards=tuple(shards), names=names, dtypes=dtypes, shapes=shapes, shard_ids=shard_ids,
        offsets=offsets,
    )  # fmt: skip
    wanted = [i for i in range(len(manifest)) if draw(st.integers(0, 5)) and not names[i].endswith("_scale_inv")]
    placed: list[tuple[Placement, Placement]] = []
    memory = []
    for i in wanted:
        shape = shapes[i]
        of_tp = draw(st.sampled_from([Replicate(), *map(Shard, range(len(shape)))]))
        even = not shape or shape[0] % (sdp * tp) == 0
        strided = of_tp == Shard(0) and tp > 1
        of_sdp: Placement = Replicate()
        if shape and (even or not strided) and draw(st.booleans()):
            of_sdp = _StridedShard(0, split_factor=tp) if strided else Shard(0)
        placed.append((of_sdp, of_tp))
        memory.append(dtypes[i] if dtypes[i] == "U8" else draw(st.sampled_from([dtypes[i], "F32"])))
    layout = lay_out(manifest, wanted, [shapes[i] for i in wanted], memory, placed, (1, sdp, tp), {})

    return manifest, layout


@given(case=layouts(), long_run=st.sampled_from([0, 8, 1 << 18]), gap=st.sampled_from([0, 12, 1 << 15]))
def test_columns_give_what_plans_one_by_one_give(case: tuple[Manifest, Layout], long_run: int, gap: int) -> None:
    manifest, layout = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "LONG_RUN", long_run)
        patch.setattr(forecasting, "LONG_RUN", long_run)
        patch.setattr(plans, "GAP", gap)
        found = forecast(manifest, layout)
        for rank in range(layout.ranks):
            planned = plan(manifest, layout.wanted(manifest, rank))
            assert (found.bytes_read[rank], found.reads[rank]) == (planned.read_bytes, planned.num_reads)
            assert set(np.flatnonzero(found.files[:, rank])) == {*planned.shards, *planned.rows.shards}


def test_a_usual_checkpoint_is_not_planned_rank_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasting, "plan", None)
    family, config = CONFIGS["qwen"]
    targets = targets_of(build_on_meta(family, config), dtype=None)
    sizes = [2 * math.prod(shape) for shape in targets.shapes]
    manifest = Manifest(
        format="safetensors",
        shards=(File(name="x", size=8 + sum(sizes)),),
        names=targets.names,
        dtypes=["BF16"] * len(sizes),
        shapes=targets.shapes,
        shard_ids=array("I", [0] * len(sizes)),
        offsets=array("q", (8 + sum(sizes[:i]) for i in range(len(sizes)))),
    )
    checkpoint = Checkpoint(name="x", uri="file:///x", where="/x", manifest=manifest, files=None)

    found = forecast_of(checkpoint, family, config, {"pp": 1, "rdp": 250, "sdp": 1, "ep": 1, "tp": 4}, None)

    assert len(found.ranks) == 1000
    assert {rank.bytes_read for rank in found.ranks[::4]} == {found.ranks[0].bytes_read}
    assert [(r.rdp, r.tp) for r in found.ranks[5:7]] == [(1, 1), (1, 2)]
