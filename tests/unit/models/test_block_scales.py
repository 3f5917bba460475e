"""Weights in float8 with a scale for each block: a load, and all else that reads them, sees plain values."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lading.catalog.import_cards import import_cards
from lading.errors import (
    CorruptModelCheckpointError,
    DigestMismatchError,
    LadingError,
    ModelCheckpointMismatchError,
    NotSupportedError,
)
from lading.families.hg import get_hg_model_hub
from lading.formats import index
from lading.formats.manifest import SCALE_SUFFIX
from lading.gangs import simulate_gangs
from lading.models.fit import problems_of_scales
from lading.models.hf_config import family_of_folder
from lading.models.hub import ModelHub, load_model, load_with_report
from lading.operations.check import check_model
from lading.operations.diff import diff_models
from lading.operations.export import convert_checkpoint
from lading.operations.plan import plan_load
from lading.planning.rules import Rule, route
from lading.system.filesystem import FileStat
from lading.transfer import compare
from lading.transfer.compare import Files, compare_tensors
from lading.transfer.files import ShardFile
from tests.helpers.block_scaled import quantize, quantize_folder
from tests.helpers.make_adapter import factors, write_adapter
from tests.helpers.make_checkpoint import CONFIG
from tests.helpers.published_experts import manifest_of
from tests.servers.hostile import serve

SIZES = {"hidden_size": 144, "intermediate_size": 296, "head_dim": 36, "num_attention_heads": 8}
"""Sizes that are not multiples of a block, and whose halves end inside one."""

CARD = {
    "model_dim": 144, "max_seq_len": 128, "vocab_size": 100, "tied_embeddings": True, "num_layers": 2,
    "num_attn_heads": 8, "num_key_value_heads": 2, "head_dim": 36, "qkv_proj_bias": False, "q_norm": True,
    "k_norm": True, "ffn_inner_dim": 296,
}  # fmt: skip

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    import transformers

    folder = tmp_path_factory.mktemp("scaled") / "model"
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**{**CONFIG, **SIZES})
    transformers.Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)

    return folder, quantize_folder(folder)


def held(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "keep", torch.float32, torch.float16])
def test_a_load_rounds_the_products_once(made: tuple[Path, dict[str, Tensor]], dtype: Any, mmap: bool) -> None:
    folder, plain = made
    model = load_model(folder, dtype=dtype, mmap=mmap, progress=False)

    expected = torch.bfloat16 if isinstance(dtype, str) else dtype
    for name, tensor in held(model).items():
        source = plain["model.embed_tokens.weight" if name == "lm_head.weight" else name]
        assert tensor.dtype == expected, name
        assert torch.equal(tensor, source.to(expected)), name


@pytest.mark.parametrize("axes", [{"tp": 2}, {"sdp": 2}])
def test_ranks_read_their_part_of_the_numbers_and_the_scales_that_it_needs(
    made: tuple[Path, dict[str, Tensor]], axes: dict[str, int]
) -> None:
    folder, plain = made
    forecast = plan_load(folder, **axes)
    for rank in range(2):
        with simulate_gangs(rank, **axes) as gangs:
            model, report = load_with_report(folder, gangs=gangs, dtype="auto", progress=False)
        assert (report.bytes_read, report.reads) == (forecast.ranks[rank].bytes_read, forecast.ranks[rank].reads)
        family, config = family_of_folder(folder)
        with simulate_gangs(rank, **axes) as gangs:
            parts = dict(ModelHub(family, None).iter_checkpoint(folder, config, gangs=gangs))  # type: ignore[arg-type]
        for name, tensor in held(model).items():
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            if name in parts:
                assert torch.equal(local, parts[name]), name
        dim, size = (1, 148) if "tp" in axes else (0, 72)
        assert torch.equal(parts[UP], plain[UP].bfloat16().narrow(0, rank * 148, 148))
        assert torch.equal(parts[DOWN], plain[DOWN].bfloat16().narrow(dim, rank * size, size))


def test_a_check_counts_scales_as_parts_of_their_weights(made: tuple[Path, dict[str, Tensor]]) -> None:
    report = check_model(made[0])

    assert (report.problems, report.quantized, report.dropped) == ((), {}, ())
    assert report.matched == report.tensors == len(load_file(made[0] / "model.safetensors"))


def test_a_conversion_writes_plain_tensors(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, plain = made
    convert_checkpoint(folder, tmp_path / "exact", dtype=torch.float32, progress=False)

    written = load_file(tmp_path / "exact" / "model.safetensors")
    assert written.keys() == plain.keys()
    assert all(torch.equal(written[name], plain[name]) for name in plain)
    assert "quantization_config" not in json.loads((tmp_path / "exact" / "config.json").read_text())

    convert_checkpoint(folder, tmp_path / "kept", progress=False)
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert all(torch.equal(kept[name], plain[name].bfloat16()) for name in plain)


@pytest.mark.parametrize("step", [4096, 4 << 20])
def test_a_comparison_is_of_values(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setattr(compare, "_STEP", step)
    folder, _ = made
    convert_checkpoint(folder, tmp_path / "exact", dtype=torch.float32, progress=False)

    report = diff_models(folder, tmp_path / "exact", values=True)
    assert report.values[UP].compared_as == "F32"
    assert all(found.equal for found in report.values.values())


def test_a_comparison_with_a_file_that_ends_within_the_scales(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = {
        "w": {"dtype": "F8_E4M3", "shape": [128, 128], "data_offsets": [0, 16384]},
        "w_scale_inv": {"dtype": "F32", "shape": [1, 1], "data_offsets": [16384, 16388]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16388))
    manifest = index(path)
    os.truncate(path, path.stat().st_size - 2)
    side = Files(manifest, [ShardFile(path=path, stat=FileStat.from_stat(path.stat()))])

    with pytest.raises(CorruptModelCheckpointError):
        compare_tensors(side, side, [(0, 0)])


def broken(folder: Path, to: Path, change: Any) -> Path:
    to.mkdir()
    (to / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, to / "model.safetensors")

    return to


SCALES = f"{UP}_scale_inv"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop(SCALES), f"missing: {SCALES} [3, 2]"),
        (lambda s: s.update({SCALES: s[SCALES][:2]}), f"mis-shaped: {SCALES} is expected to be [3, 2], but is [2, 2]"),
        (lambda s: s.update({SCALES: s[SCALES][0, 0]}), f"mis-shaped: {SCALES} is expected to be [3, 2], but is []"),
        (lambda s: s.update({SCALES: s[SCALES].half()}), f"of another dtype: {SCALES} is expected to be F32"),
        (lambda s: s.update({UP: s[UP].bfloat16()}), f"unexpected: {SCALES}"),
        (lambda s: s.update({"x.weight_scale_inv": s[SCALES].clone()}), "unexpected: x.weight_scale_inv"),
    ],
    ids=["missing", "shape", "scalar", "dtype", "plain weight", "of nothing"],
)
def test_scales_that_do_not_fit(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path, change: Any, problem: str
) -> None:
    folder = broken(made[0], tmp_path / "x", change)

    assert any(problem in each for each in check_model(folder).problems)
    with pytest.raises(ModelCheckpointMismatchError) as raised:
        load_model(folder, progress=False)
    assert problem in str(raised.value)

    family, config = family_of_folder(folder)
    with pytest.raises(ModelCheckpointMismatchError) as raised:
        list(ModelHub(family, None).iter_checkpoint(folder, config))  # type: ignore[arg-type]
    assert problem in str(raised.value)


def test_a_tensor_that_is_cut_lacks_its_scales_once() -> None:
    float8, scale = ("F8_E4M3", (6, 3)), ("F32", (1, 1))
    manifest = manifest_of({"qkv": float8, "x": float8, f"x{SCALE_SUFFIX}": scale})
    rules = [Rule("qkv", "q", cut=(0, 0, 4)), Rule("qkv", "k", cut=(0, 4, 2))]
    routed = route(manifest.names, ["q", "k"], rules, shapes=manifest.shapes, target_shapes=[(4, 3), (2, 3)])

    assert problems_of_scales(manifest, routed) == ["missing: qkv_scale_inv [1, 1]"]


@pytest.mark.parametrize("factor", [1, 2])
def test_copies_of_a_tied_parameter_in_the_same_bytes_have_the_values_of_their_scales(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path, factor: int
) -> None:
    (tmp_path / "config.json").write_text((made[0] / "config.json").read_text())
    state = load_file(made[0] / "model.safetensors")
    numbers, scales = quantize(state["model.embed_tokens.weight"])
    for name, own in (("model.embed_tokens", scales), ("lm_head", scales * factor)):
        state |= {f"{name}.weight": numbers, f"{name}.weight_scale_inv": own}
    torch.save(state, tmp_path / "pytorch_model.bin")

    if factor == 1:
        load_model(tmp_path, progress=False)
    else:
        with pytest.raises(ModelCheckpointMismatchError, match="lm_head"):
            load_model(tmp_path, progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_block_size": [64, 128]},
        {"weight_block_size": None},
        {"activation_scheme": "static"},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_other_schemes_are_refused_by_name(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path, changes: dict[str, object]
) -> None:
    folder = broken(made[0], tmp_path / "x", lambda state: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(NotSupportedError) as raised:
        load_model(folder, progress=False)
    assert repr(config["quantization_config"]["quant_method"]) in str(raised.value)
    assert isinstance(raised.value, LadingError)


# --- other ways to the bytes ------------------------------------------------------------------------------------------


def test_the_class_of_transformers_gets_plain_weights(made: tuple[Path, dict[str, Tensor]], home: Path) -> None:
    folder, plain = made
    model = get_hg_model_hub().load_model(folder, dtype=torch.float32, progress=False)

    assert all(torch.equal(held(model)[name], plain[name]) for name in plain)
    assert type(model).__name__ == "Qwen3ForCausalLM"


def test_scales_are_verified_as_all_other_bytes(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path, home: Path
) -> None:
    folder = broken(made[0], tmp_path / "x", lambda state: None)
    import_cards([{"name": "scaled", "model_family": "qwen", "checkpoint": str(folder)}])
    load_model("scaled", progress=False)
    _, again = load_with_report("scaled", verify="always", progress=False)
    assert again.verified is not False
    convert_checkpoint("scaled", tmp_path / "plain", verify="always", progress=False)
    written = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(written[name], tensor.bfloat16()) for name, tensor in made[1].items())

    manifest = index(folder)
    at = manifest.offsets[manifest.names.index(SCALES)]
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestMismatchError):
        load_model("scaled", verify="always", progress=False)
    with pytest.raises(DigestMismatchError):
        convert_checkpoint("scaled", tmp_path / "damaged", verify="always", progress=False)


def test_a_stream_reads_the_scales(
    made: tuple[Path, dict[str, Tensor]], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, plain = made
    monkeypatch.delenv("LADING_OFFLINE")
    with serve({f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}) as server:
        card = {"name": "far", "model_family": "qwen", "checkpoint": server.url("/m/model.safetensors")}
        import_cards([card | {"model_config": CARD}])
        model, report = load_with_report("far", stream=True, dtype="bf16", progress=False)

    assert report.streamed
    assert all(torch.equal(held(model)[name], plain[name].bfloat16()) for name in plain)


def test_adapters_are_added_to_the_products(made: tuple[Path, dict[str, Tensor]], tmp_path: Path, home: Path) -> None:
    folder, plain = made
    write_adapter(tmp_path / "adapter", factors("model.layers.1.mlp.up_proj", 296, 144))
    card = {"name": "tuned", "model_family": "qwen", "checkpoint": str(folder), "adapter": str(tmp_path / "adapter")}
    import_cards([card])

    a, b = factors("x", 296, 144).values()
    expected = plain[UP] + 2.0 * (b @ a)
    exact = held(load_model("tuned", dtype=torch.float32, progress=False))[UP]
    assert torch.allclose(exact, expected, rtol=1e-5, atol=1e-5)
    rounded = held(load_model("tuned", dtype=torch.bfloat16, progress=False))[UP]
    assert torch.equal(rounded, exact.bfloat16())
