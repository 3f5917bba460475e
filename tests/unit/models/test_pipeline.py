"""Stages of a pipeline, one rank at a time: any rank of any world is simulated in this process."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lading.catalog.store import get_asset_store
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.families import bert, deepseek, gemma3, llama, llama4, mistral, olmo, qwen
from lading.families.nn.cache import KeyValueCache
from lading.families.nn.decoder_lm import DecoderLM
from lading.gangs import create_fake_gangs, simulate_gangs
from lading.models.construct import build_on_meta, create_model, split
from lading.models.family import Family
from lading.models.hf_config import family_of_folder
from lading.models.hub import ModelHub, load_model, load_with_report
from lading.models.parallel_plan import ParallelPlan, Stages, matches
from lading.models.parallelize import parallelize
from lading.models.pipeline import holders
from lading.models.targets import targets_of
from tests.helpers.make_checkpoint import make

SMALL = {"model_dim": 32, "vocab_size": 40, "num_layers": 3, "num_attn_heads": 4, "ffn_inner_dim": 48}
CONFIGS: dict[str, tuple[Family[Any, Any], Any]] = {
    "llama": (llama.FAMILY, llama.LLaMAConfig(**SMALL, num_key_value_heads=2)),
    "llama4": (llama4.FAMILY, llama4.Llama4Config(**SMALL, num_key_value_heads=2, nope_layer_interval=2)),
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
}
each_family = pytest.mark.parametrize("name", CONFIGS)


# --- plans as values


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [
        (8, 1, [8]),
        (8, 2, [4, 4]),
        (3, 2, [2, 1]),
        (10, 4, [2, 3, 3, 2]),
        (9, 4, [2, 3, 2, 2]),
        (11, 4, [3, 3, 3, 2]),
        (8, 3, [3, 3, 2]),
        (7, 3, [2, 3, 2]),
        (4, 4, [1, 1, 1, 1]),
    ],
)
def test_how_layers_are_cut(layers: int, pp: int, sizes: list[int]) -> None:
    cut = Stages(layers="l.*", num_layers=layers).cut(pp)
    assert [len(own) for own in cut] == sizes
    assert [i for own in cut for i in own] == list(range(layers))


def test_more_stages_than_layers() -> None:
    with pytest.raises(NotSupportedError, match="pipeline of 4 stages needs as many layers, but the model has 3"):
        Stages(layers="l.*", num_layers=3).cut(4)


def test_where_modules_and_tensors_are() -> None:
    stages = Stages(layers="l.*", num_layers=4, first=("embed",), last=("norm", "head"))
    assert stages.places(3) == {"embed": 0, "l.0": 0, "l.1": 1, "l.2": 1, "l.3": 2, "norm": 2, "head": 2}
    assert set(stages.places(1).values()) == {0}

    names = ["embed.weight", "l.1.up.weight", "norm.weight", "other.weight", "bare"]
    found = holders(stages, names, {"head.weight": "embed.weight"}, 3)
    assert found == [{0, 2}, {1}, {2}, None, None]


@each_family
def test_a_plan_places_every_parameter_and_names_nothing_else(name: str) -> None:
    family, config = CONFIGS[name]
    stages = family.parallel_plan(config).stages
    assert stages is not None
    module = build_on_meta(family, config)
    patterns = [stages.layers, *stages.first, *stages.last]

    assert all(any(matches(pattern, path) for path, _ in module.named_modules()) for pattern in patterns)
    for parameter in module.state_dict():
        assert sum(matches(f"{p}.*", ".".join(parameter.split(".")[: p.count(".") + 2])) for p in patterns) == 1


# --- what a stage holds


def test_names_stay_those_of_the_whole_model() -> None:
    family, config = CONFIGS["llama"]
    names = []
    for rank in range(2):
        module = build_on_meta(family, config)
        with simulate_gangs(rank, pp=2) as gangs:
            parallelize(module, family, config, gangs)
        names.append({name.split(".self_attn")[0].split(".mlp")[0] for name in module.state_dict()})
        assert "None" in repr(module)
        assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()

    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layers = [{f"model.layers.{i}", *(f"model.layers.{i}.{norm}" for norm in norms)} for i in range(3)]
    assert names[0] == {"model.embed_tokens.weight"} | layers[0] | layers[1]
    assert names[1] == {"model.norm.weight", "lm_head.weight"} | layers[2]


@pytest.mark.few(8)
@pytest.mark.parametrize("sizes", [{"pp": 2}, {"pp": 3}, {"pp": 2, "tp": 2}, {"pp": 3, "sdp": 2}])
@each_family
def test_the_stages_together_own_everything(name: str, sizes: dict[str, int]) -> None:
    family, config = CONFIGS[name]
    whole = targets_of(build_on_meta(family, config), dtype=torch.float32)
    owned = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in zip(whole.names, whole.shapes, strict=True)}
    for rank in range(sizes["pp"] * sizes.get("tp", 1) * sizes.get("sdp", 1)):
        with simulate_gangs(rank, **sizes) as gangs:
            targets = split(build_on_meta(family, config), family, config, gangs, dtype=torch.float32)
        assert (targets.names, targets.shapes, targets.aliases) == (whole.names, whole.shapes, whole.aliases)
        for parameter, box in zip(targets.names, targets.boxes, strict=True):
            owned[parameter][tuple(map(slice, box.starts, box.ends))] += 1

    # The ranks of a tp gang hold copies of what it does not split; a tied table is in two stages.
    most = 2 * sizes.get("tp", 1)
    assert all(count.min() >= 1 and count.max() <= most for count in owned.values())
    tied = owned["model.embed_tokens.weight"]
    assert tied.min() == tied.max() == (2 if whole.aliases else 1)
    if "tp" not in sizes:
        assert {int(owned[parameter].max()) for parameter in whole.parameters - {"model.embed_tokens.weight"}} == {1}


def test_a_copy_of_a_tied_table_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    family, config = CONFIGS["qwen"]
    family = replace(family, name="qwen-of-this-test")
    with caplog.at_level(logging.WARNING, "lading"):
        for rank in (0, 1, 2, 0):
            with simulate_gangs(rank, pp=3) as gangs:
                parallelize(build_on_meta(family, config), family, config, gangs)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "a copy of model.embed_tokens.weight, which is tied to lm_head.weight of another stage" in said[0]
    assert "a copy of lm_head.weight, which is tied to model.embed_tokens.weight" in said[1]


def test_a_family_without_stages_ignores_the_axis(caplog: pytest.LogCaptureFixture) -> None:
    config = bert.BertConfig(**SMALL)
    family = replace(bert.FAMILY, name="bert-of-this-test")
    module = build_on_meta(family, config)
    names = list(module.state_dict())
    with caplog.at_level(logging.WARNING, "lading"), simulate_gangs(1, pp=2) as gangs:
        parallelize(module, family, config, gangs)
    assert list(module.state_dict()) == names
    assert "no plan for the axis pp" in caplog.text


class Counting(nn.Module):
    """Layers that hold a scalar each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(2) for _ in range(3))


def test_scalars_of_other_stages_are_dropped(tmp_path: Path) -> None:
    family = Family(
        name="counting",
        kls=Counting,
        config_kls=dict,
        build=lambda config: Counting(),
        init=lambda module, config, name, tensor: tensor.zero_(),
        parallel_plan=lambda config: ParallelPlan(stages=Stages(layers="layers.*", num_layers=3)),
    )
    state = Counting().state_dict()
    state["layers.1.num_batches_tracked"].fill_(7)
    save_file(state, tmp_path / "model.safetensors")
    with simulate_gangs(1, pp=3) as gangs:
        hub = ModelHub(family, get_asset_store())
        model = hub.load_custom_model(tmp_path / "model.safetensors", {}, gangs=gangs, progress=False)

    assert sorted(model.state_dict()) == sorted(name for name in state if name.startswith("layers.1."))
    assert model.layers[1].num_batches_tracked == 7


# --- what a stage computes


def carried(stages: list[DecoderLM], x: torch.Tensor, **options: Any) -> torch.Tensor:
    for stage in stages:
        x = stage(x, **options)
    return x


def new_stages(name: str, pp: int) -> tuple[DecoderLM, list[DecoderLM]]:
    family, config = CONFIGS[name]
    torch.manual_seed(3)
    alone = create_model(family, config, gangs=create_fake_gangs("cpu"), dtype=torch.float64, meta=False).eval()
    stages = []
    for rank in range(pp):
        torch.manual_seed(3)
        with simulate_gangs(rank, pp=pp) as gangs:
            stages.append(create_model(family, config, gangs=gangs, dtype=torch.float64, meta=False).eval())
    return alone, stages  # type: ignore[return-value]


@pytest.mark.parametrize("pp", [2, 3])
@each_family
def test_stages_of_a_new_model_are_the_model(name: str, pp: int) -> None:
    alone, stages = new_stages(name, pp)
    expected = dict(alone.named_parameters(remove_duplicate=False))
    found = [parameter for stage in stages for parameter, _ in stage.named_parameters(remove_duplicate=False)]
    assert sorted(found) == sorted(expected)
    for stage in stages:
        for parameter, tensor in stage.named_parameters():
            assert torch.equal(tensor, expected[parameter]), parameter

    ids = torch.randint(1, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for options in ({}, {"attention_mask": mask}, {"last_only": True}):
        assert torch.equal(carried(stages, ids, **options), alone(ids, **options))


def test_each_stage_has_a_cache_of_its_own() -> None:
    alone, stages = new_stages("qwen", 2)
    caches = [KeyValueCache() for _ in stages]
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        x = part
        for stage, cache in zip(stages, caches, strict=True):
            x = stage(x, cache=cache)
    torch.testing.assert_close(x, alone(ids)[:, 5:])


def test_a_stage_is_asked_for_the_wrong_thing() -> None:
    _, (first, last) = new_stages("llama", 2)
    with pytest.raises(ValueError, match=r"hidden states \(N, S, 32\) are expected.*\(2, 5\)"):
        last(torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token ids \(N, S\) are expected.*\(2, 5, 32\)"):
        first(torch.ones(2, 5, 32))
    for stage in (first, last):
        with pytest.raises(NotSupportedError, match="cannot generate by itself"):
            stage.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1)


def test_stages_move_as_models_do() -> None:
    for stage in new_stages("qwen", 2)[1]:
        assert {p.dtype for p in stage.to(torch.float32).parameters()} == {torch.float32}


# --- a load of one stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "qwen", shards=2)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_a_stage_reads_its_tensors_only(tmp_path: Path, tied: bool, mmap: bool) -> None:
    folder = make(tmp_path / "qwen", tie_word_embeddings=tied)
    if not tied:
        state = load_file(folder / "model.safetensors")
        save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    alone = load_model(folder, device="cpu", dtype="auto", progress=False)
    expected = dict(alone.named_parameters(remove_duplicate=False))

    for rank in range(2):
        with simulate_gangs(rank, pp=2) as gangs:
            model, report = load_with_report(folder, gangs=gangs, dtype="auto", mmap=mmap, progress=False)
        own = dict(model.named_parameters())
        assert all(torch.equal(tensor, expected[name]) for name, tensor in own.items())
        assert (report.bytes_mapped if mmap else report.bytes_read) == sum(p.nbytes for p in own.values())
        assert report.parameters == sum(p.numel() for p in own.values())
        assert report.tensors == len(own)
        assert ("model.layers.0.mlp.up_proj.weight" in own) == (rank == 0)
        assert ("lm_head.weight" in own) == (rank == 1)


def test_a_stage_of_ranks_that_split_it(folder: Path) -> None:
    alone = load_model(folder, device="cpu", dtype=torch.float32, progress=False)
    expected = dict(alone.named_parameters(remove_duplicate=False))
    for rank in range(8):
        with simulate_gangs(rank, pp=2, tp=2, sdp=2) as gangs:
            model = load_model(folder, gangs=gangs, dtype=torch.float32, progress=False)
            own = targets_of(model, dtype=None)
        boxes = dict(zip(own.names, own.boxes, strict=True))
        assert ("lm_head.weight" in boxes) == (rank >= 4)
        for name, parameter in model.named_parameters():
            part = expected[name][tuple(map(slice, boxes[name].starts, boxes[name].ends))]
            assert torch.equal(parameter.to_local(), part), name


def test_what_does_not_fit_is_found_on_every_stage(folder: Path) -> None:
    family, config = family_of_folder(folder)
    hub = ModelHub(family, get_asset_store())
    for rank in range(3):
        with (
            simulate_gangs(rank, pp=3) as gangs,
            pytest.raises(ModelCheckpointMismatchError, match=r"missing: model.layers.2.input_layernorm.weight"),
        ):
            hub.load_custom_model(folder, replace(config, num_layers=3), gangs=gangs, progress=False)


def test_copies_of_a_tied_table_are_compared(tmp_path: Path) -> None:
    folder = make(tmp_path / "qwen")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    with simulate_gangs(1, pp=2) as gangs:
        load_model(folder, gangs=gangs, dtype=torch.bfloat16, progress=False)

    state["lm_head.weight"][-1, -1] += 1
    save_file(state, folder / "model.safetensors")
    for rank in range(2):
        with (
            simulate_gangs(rank, pp=2) as gangs,
            pytest.raises(ModelCheckpointMismatchError, match="different values"),
        ):
            load_model(folder, gangs=gangs, dtype=torch.bfloat16, progress=False)


def test_more_stages_than_layers_is_an_error_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    monkeypatch.setattr("lading.transfer.files.open_shard", lambda file: opened.append(file.path))
    with simulate_gangs(0, pp=3) as gangs, pytest.raises(NotSupportedError, match="but the model has 2"):
        load_model(folder, gangs=gangs, progress=False)
    assert not opened


def test_a_checkpoint_is_read_stage_by_stage(folder: Path) -> None:
    family, config = family_of_folder(folder)
    hub = ModelHub(family, get_asset_store())
    alone = dict(hub.iter_checkpoint(folder, config))
    parts = []
    for rank in range(2):
        with simulate_gangs(rank, pp=2) as gangs:
            parts.append(dict(hub.iter_checkpoint(folder, config, gangs=gangs)))

    assert all(torch.equal(tensor, alone[name]) for part in parts for name, tensor in part.items())
    assert parts[0].keys() | parts[1].keys() == alone.keys()
    assert parts[0].keys() & parts[1].keys() == {"model.embed_tokens.weight"}


def test_a_stage_of_a_new_model_on_the_meta_device() -> None:
    family, config = CONFIGS["llama"]
    with simulate_gangs(1, pp=2) as gangs:
        model = create_model(family, config, gangs=gangs, dtype=torch.float16, meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sorted({name.split(".")[2] for name, _ in model.named_parameters() if ".layers." in name}) == ["2"]
