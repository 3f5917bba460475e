"""Plans of all ranks, from Python, and as a picture."""

from __future__ import annotations

import pickle
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

import lading
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.models.hub import load_with_report
from lading.operations.plan import LoadPlan
from lading.operations.plan_svg import picture
from lading.system.display import human_bytes
from tests.helpers.make_checkpoint import make, tensors


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make(tmp_path_factory.mktemp("planning") / "tiny", shards=3)

    return folder


def test_every_rank_loads_what_its_plan_says(tiny: Path) -> None:
    found = lading.plan_load(tiny, tp=2, sdp=2, dtype=torch.float32)

    assert found.world_size == 4
    assert (found.family, found.files, found.checkpoint_bytes) == ("qwen", 3, 43_648)
    for rank in found.ranks:
        with lading.simulate_gangs(rank.rank, tp=2, sdp=2) as gangs:
            model, report = load_with_report(tiny, gangs=gangs, dtype=torch.float32, progress=False)
        assert (report.bytes_read, report.reads) == (rank.bytes_read, rank.reads)
        assert sum(p.to_local().nbytes for p in model.parameters() if isinstance(p, DTensor)) == rank.memory_bytes
        assert rank.memory == {"float32": rank.memory_bytes}
        assert (gangs.sdp.rank, gangs.tp.rank) == (rank.sdp, rank.tp)


def test_one_rank_reads_all_in_one_go(tiny: Path) -> None:
    (alone,) = lading.plan_load(tiny).ranks

    assert (alone.bytes_read, alone.reads, alone.files) == (43_648, 3, 3)
    assert alone.memory == {"bfloat16": 43_648}


def test_axes_that_hold_copies(tiny: Path) -> None:
    ranks = lading.plan_load(tiny, tp=2, rdp=2, pp=2).ranks

    assert [(r.pp, r.rdp, r.tp) for r in ranks] == [(p, r, t) for p in (0, 1) for r in (0, 1) for t in (0, 1)]
    assert [r.bytes_read for r in ranks[:2]] == [r.bytes_read for r in ranks[2:4]]


def test_every_stage_loads_what_its_plan_says(tiny: Path) -> None:
    found = lading.plan_load(tiny, pp=2, tp=2)
    for rank in found.ranks:
        with lading.simulate_gangs(rank.rank, pp=2, tp=2) as gangs:
            _, report = load_with_report(tiny, gangs=gangs, dtype="auto", progress=False)
        assert (report.bytes_read, report.reads) == (rank.bytes_read, rank.reads)
        assert report.parameters * 2 == rank.memory_bytes < 43_648 * 0.6
        assert (gangs.pp.rank, gangs.tp.rank) == (rank.pp, rank.tp)

    with pytest.raises(NotSupportedError, match="as many layers, but the model has 2"):
        lading.plan_load(tiny, pp=3)


def test_stages_in_a_picture_and_their_copies(tiny: Path) -> None:
    drawn = picture(lading.plan_load(tiny, pp=2, rdp=2))
    assert ">ranks 0, 1 <" in drawn
    assert ">ranks 2, 3 <" in drawn
    assert ">ranks 16, 24 <" in picture(lading.plan_load(tiny, pp=2, rdp=2, sdp=8))
    many = picture(lading.plan_load(tiny, pp=2, rdp=2, sdp=32))
    assert ">ranks 0–1 and copies<" in many
    assert ">ranks 64–65 and copies<" in many


def test_some_ranks_only(tiny: Path) -> None:
    everybody = lading.plan_load(tiny, tp=4).ranks
    assert lading.plan_load(tiny, tp=4, ranks=[3, 1]).ranks == (everybody[3], everybody[1])


def test_arguments(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sdp` must be at least 1, but is 0"):
        lading.plan_load(tiny, sdp=0)
    with pytest.raises(ValueError, match="size of the world, 4, but is 4"):
        lading.plan_load(tiny, tp=4, ranks=[4])
    with pytest.raises(NotSupportedError, match="`num_attn_heads` is 4"):
        lading.plan_load(tiny, tp=3)
    make(tmp_path / "other", vocab_size=101)
    with pytest.raises(ModelCheckpointMismatchError, match="mis-shaped"):
        lading.plan_load(tmp_path / "other")


def test_a_plan_travels(tiny: Path) -> None:
    found = lading.plan_load(tiny, tp=2)
    again = pickle.loads(pickle.dumps(found))

    assert again == found
    assert picture(again) == picture(found)


def test_it_needs_no_process_group(tiny: Path) -> None:
    lading.plan_load(tiny, tp=2, sdp=2)
    with lading.simulate_gangs(0, tp=2) as gangs:  # and disturbs none
        lading.plan_load(tiny, tp=4)
        assert gangs.tp.mesh is not None
        assert torch.distributed.get_world_size() == 2


# --- the picture

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(each.itertext()) for each in ET.fromstring(svg).iter(f"{SVG}text")]


def titles(svg: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(svg).iter(f"{SVG}title")]


def areas(svg: str) -> dict[str, float]:
    """The area of each fill."""
    found: dict[str, float] = {}
    for path in ET.fromstring(svg).findall(f"{SVG}path[@fill]"):
        cells = re.findall(r"h([0-9.]+)v([0-9.]+)h-", path.get("d", ""))
        found[path.get("fill", "")] = sum(float(width) * float(height) for width, height in cells)

    return found


def test_what_is_drawn(tiny: Path) -> None:
    found = lading.plan_load(tiny, tp=2)
    svg = picture(found)

    written = texts(svg)
    legend = {f"rank {rank.rank} {human_bytes(rank.memory_bytes)}" for rank in found.ranks}
    assert any("on 2 ranks" in text for text in written)
    assert any(text.startswith("model-00001-of-00003.safetensors") for text in written)
    assert legend | {"every rank", "not needed"} <= set(written)
    assert "model.embed_tokens.weight BF16 [100, 32]\n6.4 kB, 3.2 kB per rank" in titles(svg)
    assert svg == picture(lading.plan_load(tiny, tp=2))


def test_ranks_have_as_much_ink_as_they_own(tiny: Path) -> None:
    found = lading.plan_load(tiny, tp=2)
    by_fill = areas(picture(found))

    everybody = by_fill.pop("#c9ced6")
    by_fill.pop("#fff")
    by_fill.pop("none")
    one, other = by_fill.values()
    assert one == pytest.approx(other, rel=0.01)
    assert (one + everybody) / (one + other + everybody) == pytest.approx(
        found.ranks[0].memory_bytes / found.checkpoint_bytes, rel=0.01
    )


def test_copies_share_a_color(tiny: Path) -> None:
    written = texts(picture(lading.plan_load(tiny, tp=2, rdp=2)))
    assert [text.partition(" each")[1] for text in written if text.startswith(("ranks 0, 2 ", "ranks 1, 3 "))] == [
        " each",
        " each",
    ]


def test_ranks_that_own_the_same_part_are_stripes(tiny: Path) -> None:
    svg = picture(lading.plan_load(tiny, tp=2, sdp=2))
    assert "<pattern " in svg  # norms are sharded, and replicated over tp


def test_names_of_strangers_are_text(tmp_path: Path, tiny: Path) -> None:
    found = lading.plan_load(tiny, tp=2)
    names = ["<script>alert(1)</script>\x00\ud800", *found.manifest.names[1:]]
    shards = tuple(replace(shard, name='"><&]]>') for shard in found.manifest.shards)
    evil = replace(found, name="</title>\x1b", manifest=replace(found.manifest, names=names, shards=shards))

    svg = picture(evil)

    root = ET.fromstring(svg)
    assert root.find(f".//{SVG}script") is None
    assert root.findtext(f"{SVG}title") == "</title>\ufffd on 2 ranks"
    svg.encode("utf-8")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 12 layers in one file."""
    return deep_model(tmp_path_factory.mktemp("deep") / "deep", layers=12)


def deep_model(folder: Path, *, layers: int) -> Path:
    state = {name: t for name, t in tensors().items() if "layers" not in name}
    state |= {
        name.replace(".0.", f".{n}."): t.clone()
        for n in range(layers)
        for name, t in tensors().items()
        if ".0." in name
    }
    make(folder, num_hidden_layers=layers)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return folder


def test_a_single_file_has_a_row_for_each_layer(deep: Path) -> None:
    found = lading.plan_load(deep, tp=2, sdp=2)
    svg = picture(found)

    rows = [text for text in texts(svg) if "layer" in text]
    layer = rows[0].partition(" ")[2]
    assert rows[:-1] == [f"model.layers.{n} {layer}" for n in range(12)]
    assert rows[-1].startswith("in no layer ")
    # A layer, and all of the model, by rank.
    assert layer == "18.6 kB, 4.69 kB per rank"
    assert {f"rank {r.rank} {human_bytes(r.memory_bytes)}" for r in found.ranks} <= set(texts(svg))
    # Every tensor is in the title of a piece, also those that are too small to be seen alone.
    named = "\n".join(titles(svg))
    assert all(f"{name} BF16" in named for name in found.manifest.names)


def test_ranks_that_own_less_of_a_layer(deep: Path) -> None:
    staged = texts(picture(lading.plan_load(deep, pp=2)))

    assert "model.layers.0 18.6 kB, 0 B to 18.6 kB per rank" in staged


def test_a_picture_for_one_rank_has_sizes_without_shares(deep: Path) -> None:
    svg = picture(lading.plan_load(deep))

    assert "model.layers.0 18.6 kB" in texts(svg)
    assert "per rank" not in svg


def test_an_embedding_does_not_shrink_the_layers(tmp_path: Path) -> None:
    make(tmp_path / "wide", vocab_size=2_000)
    state = tensors() | {"model.embed_tokens.weight": torch.zeros(2_000, 32, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "wide" / "model.safetensors", metadata={"format": "pt"})

    svg = picture(lading.plan_load(tmp_path / "wide"))

    assert any(text.startswith("in no layer") and text.endswith("drawn smaller") for text in texts(svg))
    outlines = re.findall(r"M([0-9.]+) ([0-9.]+)h([0-9.]+)v34h-", svg)
    ends: dict[str, float] = {}
    for x, y, width in outlines:
        ends[y] = max(ends.get(y, 0.0), float(x) + float(width))
    assert list(ends.values()) == pytest.approx([1024.0] * 3, abs=1)


def test_large_worlds_and_many_tensors_stay_small(tmp_path: Path) -> None:
    found = lading.plan_load(deep_model(tmp_path / "deep", layers=300), tp=4, sdp=250)

    assert isinstance(found, LoadPlan)
    assert len(found.ranks) == 1000
    assert len(picture(found)) < 300_000
