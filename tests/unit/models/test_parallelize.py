"""Plans applied, one rank at a time: any rank of any world is simulated in this process."""

from __future__ import annotations

import logging
import math
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.torch_version import TorchVersion

from lading.catalog.store import get_asset_store
from lading.errors import InternalError, ModelCheckpointMismatchError, NotSupportedError
from lading.families import bert, deepseek, gemma3, gemma3n, llama, llama4, mistral, mixtral, olmo, qwen, qwen3_moe
from lading.formats.manifest import Manifest, Shard
from lading.gangs import Gang, create_fake_gangs, simulate_gangs
from lading.models.construct import assign, build_on_meta, create_model
from lading.models.dtype import resolve_dtypes
from lading.models.family import Family
from lading.models.fit import match
from lading.models.hf_config import family_of_folder
from lading.models.hub import ModelHub, load_model, load_with_report
from lading.models.parallel_plan import ParallelPlan, Split, matches
from lading.models.parallelize import mesh_of, parallelize
from lading.models.targets import Targets, targets_of
from lading.planning.box import Box
from tests.helpers.make_checkpoint import make

SMALL = {"model_dim": 32, "vocab_size": 40, "num_layers": 2, "num_attn_heads": 4, "ffn_inner_dim": 48}
CONFIGS: dict[str, tuple[Family[Any, Any], Any]] = {
    "llama": (
        llama.FAMILY,
        llama.LLaMAConfig(
            **SMALL,
            num_key_value_heads=2,
            qkv_proj_bias=True,
            output_proj_bias=True,
            ffn_bias=True,
            ffn_inner_dim_scale=1.0,
            ffn_inner_dim_multiple_of=1,
        ),
    ),
    "llama4": (
        llama4.FAMILY,
        llama4.Llama4Config(
            **SMALL,
            num_key_value_heads=2,
            nope_layer_interval=2,
            experts=llama4.Llama4ExpertsConfig(interleave_moe_layer_step=2),
        ),
    ),
    "qwen": (
        qwen.FAMILY,
        qwen.QwenConfig(**SMALL, num_key_value_heads=2, q_norm=True, k_norm=True, tied_embeddings=True),
    ),
    "mistral": (mistral.FAMILY, mistral.MistralConfig(**SMALL, num_key_value_heads=2)),
    "olmo": (olmo.FAMILY, olmo.OLMOConfig(**SMALL, num_key_value_heads=2, pad_idx=0)),
    "gemma3": (gemma3.FAMILY, gemma3.Gemma3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "deepseek": (
        deepseek.FAMILY,
        deepseek.DeepSeekConfig(
            **SMALL,
            num_key_value_heads=4,
            query_rank=12,
            key_value_rank=8,
            num_dense_layers=1,
            num_experts=8,
            num_groups=4,
            top_k_groups=2,
            top_k=3,
            expert_inner_dim=16,
        ),
    ),
    "mixtral": (mixtral.FAMILY, mixtral.MixtralConfig(**SMALL, num_key_value_heads=2)),
    "qwen3_moe": (
        qwen3_moe.FAMILY,
        qwen3_moe.Qwen3MoEConfig(
            **SMALL, num_key_value_heads=2, num_experts=8, top_k=2, expert_inner_dim=24, dense_layers=[0], head_dim=8
        ),
    ),
    "gemma3n": (
        gemma3n.FAMILY,
        gemma3n.Gemma3nConfig(
            **SMALL | {"num_layers": 4},
            altup_hidden_dim=48,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"] * 2,
            activation_sparsity_pattern=[0.9, 0.0, 0.0, 0.0],
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=36,
            hidden_size_per_layer_input=6,
        ),
    ),
    "bert": (bert.FAMILY, bert.BertConfig(**SMALL)),
}
each_family = pytest.mark.parametrize("name", CONFIGS)


# --- plans as values


@each_family
def test_a_plan_names_every_module_with_parameters(name: str) -> None:
    family, config = CONFIGS[name]
    plan = family.parallel_plan(config)
    module = build_on_meta(family, config)
    assert plan.tensor is not None

    for path, part in module.named_modules():
        if isinstance(part, nn.Identity):
            continue  # a place at which ranks add up gradients
        has_parameters = next(part.parameters(recurse=False), None) is not None
        is_split = plan.split_of(path) not in (None, Split.FEATURES)  # which is of modules without parameters
        assert is_split == has_parameters, path


def test_no_pattern_is_idle() -> None:
    # No decoder has all that the shared one can have, but together they do.
    names = {path for family, config in CONFIGS.values() for path, _ in build_on_meta(family, config).named_modules()}
    for family, config in CONFIGS.values():
        plan = family.parallel_plan(config)
        for pattern in [*(plan.tensor or {}), *(plan.units or ())]:
            assert any(matches(pattern, path) for path in names), f"{family.name}: {pattern}"


@pytest.mark.parametrize(
    ("parameter", "dim"),
    [
        ("model.embed_tokens.weight", 0),
        ("model.layers.11.self_attn.q_proj.weight", 0),
        ("model.layers.11.self_attn.q_proj.bias", 0),
        ("model.layers.11.self_attn.o_proj.weight", 1),
        ("model.layers.11.self_attn.o_proj.bias", 0),
        ("model.layers.11.mlp.down_proj.weight", 1),
        ("model.norm.weight", 0),
        ("lm_head.weight", 0),
        ("anything.else", 0),
    ],
)
def test_the_dim_along_which_ranks_cut(parameter: str, dim: int) -> None:
    family, config = CONFIGS["qwen"]
    assert family.parallel_plan(config).shard_dim(parameter) == dim


def test_patterns() -> None:
    assert matches("layers.*.mlp", "layers.12.mlp")
    assert not matches("layers.*.mlp", "layers.12.mlp.up_proj")
    assert not matches("layers.*.mlp", "layers.mlp")
    assert not matches("layers.1", "layers.12")


@pytest.mark.parametrize("tp", [1, 2, 4])
@each_family
def test_what_divides_is_fine(name: str, tp: int) -> None:
    family, config = CONFIGS[name]
    family.parallel_plan(config).check(tp)


def test_what_does_not_divide_is_named_with_its_size() -> None:
    family, config = CONFIGS["qwen"]
    with pytest.raises(NotSupportedError) as error:
        family.parallel_plan(
            replace(config, num_attn_heads=6, ffn_inner_dim=50, num_key_value_heads=6, head_dim=8)
        ).check(4)

    message = str(error.value)
    assert "over 4 ranks" in message
    assert "`num_attn_heads` is 6" in message
    assert "`ffn_inner_dim` is 50" in message
    assert "`num_key_value_heads` is 6" in message
    assert "vocab_size" not in message


def test_ranks_that_do_not_divide_the_experts_are_named() -> None:
    family, config = CONFIGS["mixtral"]
    plan = family.parallel_plan(config)
    plan.check(2, 4)
    for tp, ep in ((1, 3), (2, 8)):
        with pytest.raises(NotSupportedError, match=rf"`num_experts` is 8, which {ep * tp} \(ep {ep} × tp {tp}\)"):
            plan.check(tp, ep)
    qwen.FAMILY.parallel_plan(CONFIGS["qwen"][1]).check(1, 3)


def test_ranks_neither_divide_the_heads_nor_are_divided_by_them() -> None:
    with pytest.raises(NotSupportedError, match="`num_key_value_heads` is 3, which does not divide 4 either"):
        ParallelPlan(tensor={"k": Split.KEY_VALUE}, num_key_value_heads=3).check(4)
    ParallelPlan(tensor={"q": Split.COLUMN}, num_key_value_heads=3).check(4)


# --- what a rank owns


def boxes(targets: Targets) -> dict[str, Box]:
    return dict(zip(targets.names, targets.boxes, strict=True))


def targets_on(name: str, rank: int, config: Any = None, **sizes: int) -> Targets:
    family, default = CONFIGS[name]
    module = build_on_meta(family, config or default)
    with simulate_gangs(rank, **sizes) as gangs:
        parallelize(module, family, config or default, gangs)
        return targets_of(module, dtype=torch.float32)


def test_boxes_under_tensor_parallelism() -> None:
    targets = targets_on("qwen", rank=1, tp=2)
    own = boxes(targets)

    assert own["model.embed_tokens.weight"] == Box((20, 0), (20, 32))
    assert own["model.layers.0.self_attn.q_proj.weight"] == Box((16, 0), (16, 32))
    assert own["model.layers.0.self_attn.q_proj.bias"] == Box((16,), (16,))
    assert own["model.layers.0.self_attn.k_proj.weight"] == Box((8, 0), (8, 32))
    assert own["model.layers.0.self_attn.o_proj.weight"] == Box((0, 16), (32, 16))
    assert own["model.layers.0.self_attn.q_norm.weight"] == Box.whole((8,))
    assert own["model.layers.0.mlp.down_proj.weight"] == Box((0, 24), (32, 24))
    assert own["model.norm.weight"] == Box.whole((32,))
    assert targets.aliases == {"lm_head.weight": "model.embed_tokens.weight"}


def test_more_ranks_than_heads_hold_all_keys_and_values() -> None:
    own = boxes(targets_on("qwen", rank=3, tp=4))
    assert own["model.layers.0.self_attn.q_proj.weight"] == Box((24, 0), (8, 32))
    assert own["model.layers.0.self_attn.k_proj.weight"] == Box.whole((16, 32))
    assert own["model.layers.0.self_attn.v_proj.bias"] == Box.whole((16,))


def test_boxes_under_both() -> None:
    own = boxes(targets_on("qwen", rank=3, tp=2, sdp=4))  # tp 1, sdp 1
    assert own["model.embed_tokens.weight"] == Box((25, 0), (5, 32))
    assert own["model.layers.1.mlp.down_proj.weight"] == Box((8, 24), (8, 24))
    assert own["model.norm.weight"] == Box((8,), (8,))


def test_experts_are_sharded_along_the_first_other_dim_that_divides_evenly() -> None:
    own = boxes(targets_on("mixtral", rank=1, sdp=3))  # 8 experts between 32 and 48 features

    assert {box for name, box in own.items() if name.endswith("experts.down_proj")} == {Box((0, 0, 16), (8, 32, 16))}


def test_experts_over_three_axes_with_a_torch_that_shards_over_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0"))
    with pytest.raises(NotSupportedError, match="`sdp`, `ep` and `tp` together need a newer torch"):
        targets_on("mixtral", rank=0, ep=2, tp=2, sdp=2)
    for sizes in ({"ep": 2, "sdp": 2}, {"tp": 2, "sdp": 2}):
        targets_on("mixtral", rank=0, **sizes)


@pytest.mark.few(8)
@pytest.mark.parametrize(
    "sizes",
    [
        {"sdp": 3},
        {"tp": 4},
        {"tp": 2, "sdp": 3},
        {"rdp": 2, "sdp": 2},
        {"rdp": 2},
        {"ep": 4},
        {"ep": 2, "tp": 2, "sdp": 2},
    ],
)
@each_family
def test_the_ranks_together_own_everything_alike(name: str, sizes: dict[str, int]) -> None:
    world = math.prod(sizes.values())
    owned: dict[str, torch.Tensor] = {}
    for rank in range(world):
        targets = targets_on(name, rank, **sizes)
        for parameter, shape, box in zip(targets.names, targets.shapes, targets.boxes, strict=True):
            count = owned.setdefault(parameter, torch.zeros(shape, dtype=torch.int64))
            count[tuple(map(slice, box.starts, box.ends))] += 1

    for parameter, count in owned.items():
        assert count.min() == count.max() >= 1, parameter


def test_an_uneven_cut_that_has_no_box_is_refused() -> None:
    config = replace(CONFIGS["qwen"][1], vocab_size=9)
    with pytest.raises(NotSupportedError, match=r"\[9, 32\].*not a contiguous box"):
        targets_on("qwen", rank=0, config=config, tp=2, sdp=4)


# --- a load of one rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "qwen", shards=2)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(("rank", "sizes"), [(1, {"tp": 2}), (2, {"sdp": 3}), (5, {"tp": 2, "sdp": 3, "rdp": 2})])
def test_a_rank_has_its_part_of_the_model(folder: Path, rank: int, sizes: dict[str, int], mmap: bool) -> None:
    alone = load_model(folder, device="cpu", dtype=torch.bfloat16, progress=False)
    with simulate_gangs(rank, **sizes) as gangs:
        model = load_model(folder, gangs=gangs, dtype=torch.bfloat16, mmap=mmap, progress=False)

    own = boxes(targets_of(model, dtype=None))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        box = own[name]
        expected = alone.get_parameter(name)[tuple(map(slice, box.starts, box.ends))]
        assert torch.equal(parameter.to_local(), expected), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, alone.get_buffer(name)), name


def test_a_copy_of_a_tied_parameter_is_compared_part_by_part(tmp_path: Path) -> None:
    folder = make(tmp_path / "qwen")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    with simulate_gangs(rank=3, tp=2, sdp=2) as gangs:
        load_model(folder, gangs=gangs, dtype=torch.bfloat16, progress=False)

    state["lm_head.weight"][-1, -1] += 1
    save_file(state, folder / "model.safetensors")
    with (
        simulate_gangs(rank=3, tp=2, sdp=2) as gangs,
        pytest.raises(ModelCheckpointMismatchError, match="different values"),
    ):
        load_model(folder, gangs=gangs, dtype=torch.bfloat16, progress=False)


def test_a_checkpoint_is_read_part_by_part(folder: Path) -> None:
    family, config = family_of_folder(folder)
    hub = ModelHub(family, get_asset_store())
    alone = dict(hub.iter_checkpoint(folder, config))
    with simulate_gangs(rank=3, tp=2, sdp=2) as gangs:
        parts = dict(hub.iter_checkpoint(folder, config, gangs=gangs))
        own = boxes(targets_of(load_model(folder, gangs=gangs, progress=False), dtype=None))

        assert parts.keys() == alone.keys() == own.keys()
        for name, part in parts.items():
            assert torch.equal(part, alone[name][tuple(map(slice, own[name].starts, own[name].ends))]), name

        with pytest.raises(ModelCheckpointMismatchError, match=r"embed_tokens.weight is expected to be \(104, 32\)"):
            dict(hub.iter_checkpoint(folder, replace(config, vocab_size=104), gangs=gangs))


def test_what_is_padded_is_in_the_report(folder: Path) -> None:
    copied = []
    for rank in range(3):
        with simulate_gangs(rank, sdp=3) as gangs:
            _, report = load_with_report(folder, gangs=gangs, dtype=torch.bfloat16, progress=False)
        copied.append(report.bytes_copied)
    # No dim 0 of this model divides by three: the last rank has less of each parameter than the others.
    assert copied == [0, 0, report.bytes_read]
    assert report.model_class == "Qwen"


def test_a_rank_reads_what_it_owns_and_the_gaps_between_rows(folder: Path) -> None:
    _, whole = load_with_report(folder, device="cpu", dtype="auto", progress=False)
    with simulate_gangs(rank=3, sdp=4) as gangs:
        _, sharded = load_with_report(folder, gangs=gangs, dtype="auto", progress=False)
    with simulate_gangs(rank=1, tp=2) as gangs:
        _, split = load_with_report(folder, gangs=gangs, dtype="auto", progress=False)

    assert sharded.bytes_read == whole.bytes_read // 4
    # Of the two row-wise linears in each layer, 32 rows of 64 and 128 bytes, all but half a row is read.
    columns = 2 * (32 * 64 - 32 + 32 * 128 - 64)
    norms = 32 * 2 * 5 + 8 * 2 * 4
    rows = whole.bytes_read - norms - 2 * (32 * 64 + 32 * 128)
    assert split.bytes_read == rows // 2 + norms + columns
    assert split.parameters < whole.parameters * 0.51 + norms


def test_what_does_not_divide_is_an_error_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("lading.transfer.files.open_shard", lambda file: opened.append(file.path))
    with simulate_gangs(rank=0, tp=8) as gangs, pytest.raises(NotSupportedError, match="`num_attn_heads` is 4"):
        load_model(folder, gangs=gangs, progress=False)
    assert not opened


def test_what_is_padded_is_copied_and_counted() -> None:
    family, config = CONFIGS["bert"]
    config = replace(config, vocab_size=41)
    for rank, copied in ((0, 0), (3, 41 - 3 * 11)):
        module = build_on_meta(family, config)
        with simulate_gangs(rank, sdp=4) as gangs:
            parallelize(module, family, config, gangs)
            targets = targets_of(module, dtype=torch.float32)
            parts = {n: torch.zeros(box.sizes) for n, box in boxes(targets).items()}
            # The two token types are one each for two ranks; a rank without rows has nothing to copy.
            assert assign(module, parts, targets.aliases) == copied * 32 * 4
            same = [n for n, p in module.named_parameters() if p.to_local().data_ptr() == parts[n].data_ptr()]
            assert len(same) >= len(parts) - 2


# --- axes that a family does not serve


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))


def test_an_axis_without_a_plan_is_ignored_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    family = Family(
        name="plain", kls=Plain, config_kls=dict, build=lambda config: Plain(), init=lambda m, c, n, p: p.zero_()
    )
    with caplog.at_level(logging.WARNING, "lading"):
        for _ in range(2):
            with simulate_gangs(rank=0, tp=2, ep=2, sdp=2, pp=2) as gangs:
                module = build_on_meta(family, {})
                parallelize(module, family, {}, gangs)
                assert type(module.weight) is nn.Parameter
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 4
    assert all("plain family have no plan for the axis" in message for message in said)


def test_a_gang_without_a_mesh() -> None:
    with pytest.raises(InternalError, match="device mesh"):
        mesh_of(Gang(rank=0, size=2, device=torch.device("cpu")))


# --- dtypes


def settle(sdp: int, parameters: str = "abd") -> list[str]:
    targets = Targets(
        names=("a", "b", "c", "d"),
        shapes=((4,), (2,), (1,), (9,)),
        boxes=(Box.whole((4,)), Box.whole((2,)), Box.whole((1,)), Box.whole((9,))),
        dtypes=(None, None, "I64", "F64"),
        parameters=frozenset(parameters),
        aliases={},
    )
    manifest = Manifest(
        format="safetensors",
        shards=(Shard(name="s", size=0),),
        names=["a", "b", "c", "d"],
        dtypes=["BF16", "F32", "I64", "F16"],
        shapes=list(targets.shapes),
        shard_ids=array("I", [0] * 4),
        offsets=array("q", [0] * 4),
    )
    return resolve_dtypes(match(manifest, targets, *CONFIGS["qwen"]), sdp=sdp)


def test_parameters_that_are_sharded_are_of_one_dtype(caplog: pytest.LogCaptureFixture) -> None:
    assert settle(sdp=1) == ["BF16", "F32", "I64", "F64"]
    assert not caplog.records
    assert settle(sdp=2) == ["BF16", "BF16", "I64", "F64"]
    assert "all are loaded as BF16" in caplog.text


def test_buffers_are_not_sharded_and_keep_their_dtype(caplog: pytest.LogCaptureFixture) -> None:
    assert settle(sdp=2, parameters="ad") == ["BF16", "F32", "I64", "F64"]
    assert not caplog.records


# --- new models


@pytest.mark.few(8)
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"sdp": 3}, {"tp": 2, "sdp": 2}])
@each_family
def test_a_rank_of_a_new_model_has_its_part_of_the_same_numbers(name: str, sizes: dict[str, int]) -> None:
    family, config = CONFIGS[name]
    torch.manual_seed(3)
    alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float64, meta=False)
    torch.manual_seed(3)
    with simulate_gangs(rank=1, **sizes) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float64, meta=False)

    own = boxes(targets_of(model, dtype=None))
    for parameter, tensor in model.named_parameters():
        box = own[parameter]
        expected = alone.get_parameter(parameter)[tuple(map(slice, box.starts, box.ends))]
        assert torch.equal(tensor.to_local(), expected), parameter


def test_a_new_model_depends_on_the_seed_and_on_names_alone() -> None:
    family, config = CONFIGS["qwen"]

    def new(layers: int = 2, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        changed = replace(config, num_layers=layers, init_std=0.1)
        return create_model(family, changed, gangs=create_fake_gangs("cpu"), dtype=torch.float32, meta=False)

    first = new()
    assert torch.equal(new().model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert torch.equal(new(layers=3).model.embed_tokens.weight, first.model.embed_tokens.weight)
    up, gate = first.model.layers[0].mlp.up_proj.weight, first.model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(up, gate)

    assert not torch.equal(new(seed=1).model.embed_tokens.weight, first.model.embed_tokens.weight)


def test_a_new_model_on_the_meta_device_is_split_too() -> None:
    family, config = CONFIGS["bert"]
    with simulate_gangs(rank=0, tp=2) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float16, meta=True)
    weight = model.encoder.layer[0].intermediate.dense.weight
    assert weight.is_meta
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape == (24, 32)
    assert weight.dtype == torch.float16
