"""Families of mixtures of experts: the layouts of their checkpoints, and new models."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

from lading import check_model, convert_checkpoint, export_model, import_cards, load_model
from lading.errors import ModelCheckpointMismatchError
from lading.families.mixtral import MixtralConfig
from lading.families.qwen3_moe import Qwen3MoEConfig
from lading.gangs import create_fake_gangs
from lading.models.construct import create_model
from lading.models.family import get_family
from tests.helpers.expert_layouts import NAMES, separate
from tests.helpers.make_adapter import factors, within_one_ulp, write_adapter

SMALL: dict[str, Any] = {
    "model_dim": 32, "vocab_size": 40, "num_layers": 3, "num_attn_heads": 4, "num_key_value_heads": 2,
    "ffn_inner_dim": 24, "num_experts": 11, "top_k": 3, "max_seq_len": 64,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "mixtral": MixtralConfig(**SMALL),
    "qwen3_moe": Qwen3MoEConfig(**SMALL, expert_inner_dim=16, head_dim=8, dense_layers=[1]),
}
each_family = pytest.mark.parametrize("name", CONFIGS)


def new(name: str) -> Module:
    torch.manual_seed(0)
    family, gangs = get_family(name), create_fake_gangs("cpu")
    return create_model(family, CONFIGS[name], gangs=gangs, dtype=torch.float32, meta=False).eval()


def save(folder: Path, name: str, state: dict[str, Tensor], *, consolidated: bool = False) -> Path:
    folder.mkdir()
    if consolidated:
        torch.save(state, folder / "consolidated.00.pth")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(get_family(name).to_hf(CONFIGS[name])))
    return folder


def same(found: Module, expected: Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@each_family
def test_stacked_and_separate_experts_make_the_same_model(home: Path, tmp_path: Path, name: str) -> None:
    model = new(name)
    stacked = save(tmp_path / "stacked", name, model.state_dict())
    apart = save(tmp_path / "separate", name, separate(model.state_dict(), name))
    bare = {key.removeprefix("model."): value for key, value in separate(model.state_dict(), name).items()}

    for folder in (stacked, apart, save(tmp_path / "bare", name, bare)):
        assert check_model(folder).fits
        same(load_model(folder), model)


@pytest.mark.parametrize("below_one_another", [False, True])
def test_the_names_of_mistral(home: Path, tmp_path: Path, below_one_another: bool) -> None:
    """Queries and keys have neighboring channels where the model has halves, and the first release joined experts."""
    model = new("mixtral")
    names = {
        "model.embed_tokens": "tok_embeddings", "lm_head": "output", "model.": "", "self_attn": "attention",
        "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    module = "block_sparse_moe" if below_one_another else "feed_forward"
    state: dict[str, Tensor] = {}
    for name, tensor in separate(model.state_dict(), "mixtral").items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".wq." in name or ".wk." in name:
            tensor = tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(tensor.shape).clone()
        state[name.replace("block_sparse_moe", module)] = tensor
    for layer in range(3) if below_one_another else ():
        for weight in ("w1", "w2", "w3"):
            keys = [f"layers.{layer}.{module}.experts.{e}.{weight}.weight" for e in range(11)]
            parts = [state.pop(key) for key in keys]
            joined = torch.cat([part.T if weight == "w2" else part for part in parts])
            state[f"layers.{layer}.{module}.{weight}"] = joined

    same(load_model(save(tmp_path / "model", "mixtral", state, consolidated=True)), model)


@each_family
def test_an_export_has_the_layout_of_published_checkpoints_or_stacks(home: Path, tmp_path: Path, name: str) -> None:
    model = new(name)
    expected = separate(model.state_dict(), name)
    export_model(model, name, CONFIGS[name], tmp_path / "exported", shard_size=10_000)
    save(tmp_path / "stacked", name, model.state_dict())
    convert_checkpoint(tmp_path / "stacked", tmp_path / "from-stacked", progress=False)
    convert_checkpoint(tmp_path / "exported", tmp_path / "again", shard_size=20_000, progress=False)

    export_model(model, name, CONFIGS[name], tmp_path / "exported-stacked", stacked=True)
    convert_checkpoint(tmp_path / "again", tmp_path / "stacked-again", stacked=True, progress=False)

    for folder in ("exported-stacked", "stacked-again"):
        assert load_file(tmp_path / folder / "model.safetensors").keys() == model.state_dict().keys()
        same(load_model(tmp_path / folder), model)
    for folder in ("exported", "from-stacked", "again"):
        files = sorted((tmp_path / folder).glob("*.safetensors"))
        found = {key: value for file in files for key, value in load_file(file).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        same(load_model(tmp_path / folder), model)


@each_family
def test_an_adapter_of_one_expert_is_exported_with_it(home: Path, tmp_path: Path, name: str) -> None:
    state = separate(new(name).state_dict(), name)
    save(tmp_path / "checkpoint", name, state)
    weights = [key for key, value in state.items() if ".experts.3." in key and key.startswith("model.layers.2.")]
    expected = dict(state)
    adapter: dict[str, Tensor] = {}
    for key in (*weights, "model.layers.0.self_attn.q_proj.weight"):
        adapter |= factors(key.removesuffix(".weight"), *state[key].shape, seed=len(adapter))
        a, b = list(adapter.values())[-2:]
        expected[key] = state[key] + b @ a * 2.0
    write_adapter(tmp_path / "adapter", adapter)
    card = {"name": "tuned", "model_family": name, "model_config": asdict(CONFIGS[name])}
    import_cards([card | {key: str(tmp_path / key) for key in ("checkpoint", "adapter")}])
    convert_checkpoint("tuned", tmp_path / "out", shard_size=20_000, progress=False)

    files = sorted((tmp_path / "out").glob("*.safetensors"))
    found = {key: value for file in files for key, value in load_file(file).items()}
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not within_one_ulp(found[key], value)] == []
    same(load_model("tuned"), load_model(tmp_path / "out"))


@each_family
def test_an_expert_that_is_missing_is_named(home: Path, tmp_path: Path, name: str) -> None:
    state = separate(new(name).state_dict(), name)
    module, gate, *_ = NAMES[name]
    del state[f"model.layers.2.{module}.experts.4.{gate}.weight"]

    with pytest.raises(ModelCheckpointMismatchError, match="number 0 is missing"):
        load_model(save(tmp_path / "model", name, state))


@pytest.mark.parametrize("number", ["11", "007", "9" * 400, "-1", "²"], ids=lambda number: number[:3])
@each_family
def test_an_expert_with_a_number_of_none(home: Path, tmp_path: Path, name: str, number: str) -> None:
    state = separate(new(name).state_dict(), name)
    module, gate, *_ = NAMES[name]
    layer = f"model.layers.2.{module}.experts."
    state[f"{layer}{number}.{gate}.weight"] = state.pop(f"{layer}7.{gate}.weight")
    folder = save(tmp_path / "model", name, state)

    if number == "007":  # a number all the same
        assert check_model(folder).fits
        return
    with pytest.raises(ModelCheckpointMismatchError):
        load_model(folder)


@each_family
def test_fewer_experts_than_the_configuration_states(home: Path, tmp_path: Path, name: str) -> None:
    state = {key: value for key, value in separate(new(name).state_dict(), name).items() if ".experts.10." not in key}

    with pytest.raises(ModelCheckpointMismatchError, match=r"\[10, "):
        load_model(save(tmp_path / "model", name, state))


@each_family
def test_a_new_model_learns(name: str) -> None:
    """Every expert that a token chooses gets a gradient, and so does the router."""
    model = new(name).train()
    ids = torch.arange(40).view(2, 20)
    model(ids).logsumexp(-1).sum().backward()

    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key
    stacked = [p for key, p in model.named_parameters() if "gate_up_proj" in key]
    assert all(0.5 < float(p.detach().std()) * (2 * 4 * 32) ** 0.5 < 1.5 for p in stacked)
