"""In which dtype a model is loaded: what a call says, what config.json states, what the checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lading import convert_checkpoint, load_model, plan_load
from lading.families.hg import get_hg_model_hub
from lading.families.qwen import get_qwen_model_hub
from tests.helpers.make_checkpoint import make, qwen_config

HUBS = pytest.mark.parametrize("hub", [get_qwen_model_hub, get_hg_model_hub], ids=["qwen", "hg"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16, but for its norms."""
    path = make(tmp_path / "tiny", architectures=["Qwen3ForCausalLM"])
    file = path / "model.safetensors"
    state = {name: t.float() if "norm" in name else t for name, t in load_file(file).items()}
    save_file(state, file, {"format": "pt"})

    return path


def state_dtype(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    (folder / "config.json").write_text(json.dumps(config | keys))


def dtypes(model: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.few(5)
@HUBS
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"dtype": "float16", "torch_dtype": "float32"}, torch.float16),
        ({}, torch.bfloat16),  # the most common one
        ({"dtype": None}, torch.bfloat16),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
    ],
)
def test_auto_is_what_config_json_states(
    folder: Path, catalog: Path, hub: Any, keys: dict[str, object], expected: torch.dtype
) -> None:
    state_dtype(folder, **keys)
    model = hub().load_model(folder, dtype="auto", progress=False)

    assert dtypes(model) == {expected}
    with torch.no_grad():
        model.eval()(torch.arange(5)[None])


@pytest.mark.parametrize("stated", ["nonsense", ["float16"], 16])
def test_what_states_no_dtype(folder: Path, catalog: Path, stated: object) -> None:
    state_dtype(folder, dtype=stated)

    assert dtypes(load_model(folder, dtype="auto", progress=False)) == {torch.bfloat16}


@HUBS
@pytest.mark.parametrize("mmap", [False, True])
def test_keep_is_tensor_by_tensor(folder: Path, catalog: Path, hub: Any, mmap: bool) -> None:
    state_dtype(folder, dtype="float16")

    model = hub().load_model(folder, dtype="keep", mmap=mmap, progress=False)

    stored = load_file(folder / "model.safetensors")
    found = dict(model.named_parameters())
    assert found
    assert all(found[name].dtype == tensor.dtype for name, tensor in stored.items())
    assert dtypes(model) == {torch.bfloat16, torch.float32}


def test_plans_and_conversions_say_the_same(folder: Path, catalog: Path, tmp_path: Path) -> None:
    state_dtype(folder, dtype="float16")

    assert set(plan_load(folder).ranks[0].memory) == {"float16"}
    assert set(plan_load(folder, dtype="keep").ranks[0].memory) == {"bfloat16", "float32"}
    assert set(convert_checkpoint(folder, tmp_path / "a", dtype="auto", progress=False).dtypes) == {"float16"}
    assert set(convert_checkpoint(folder, tmp_path / "b", progress=False).dtypes) == {"bfloat16", "float32"}


@pytest.mark.parametrize("dtype", ["kept", 16])
def test_other_words_are_refused(folder: Path, catalog: Path, dtype: Any) -> None:
    for refused in (load_model, plan_load, lambda path, dtype: convert_checkpoint(path, path / "new", dtype=dtype)):
        with pytest.raises(TypeError, match='"keep", "float64", "float32", "bfloat16"'):
            refused(folder, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        ("fp16", torch.float16),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("float64", torch.float64),
        ("torch.float64", torch.float64),
    ],
)
def test_a_dtype_by_its_name(folder: Path, catalog: Path, name: str, expected: torch.dtype) -> None:
    assert dtypes(load_model(folder, dtype=name, progress=False)) == {expected}
    assert dtypes(get_qwen_model_hub().create_new_model(qwen_config(), dtype=name)) == {expected}
    assert set(plan_load(folder, dtype=name).ranks[0].memory) == {str(expected).removeprefix("torch.")}


@pytest.mark.parametrize("dtype", ["auto", "keep"])
def test_a_new_model_has_no_checkpoint_to_ask(catalog: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="no checkpoint"):
        get_qwen_model_hub().create_new_model(qwen_config(), dtype=dtype)
