"""Models from what ``torch.save`` wrote, through the same loader as any other checkpoint."""

from __future__ import annotations

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from lading import PolicyError, load_model
from lading.families.qwen import Qwen, get_qwen_model_hub
from lading.models.hub import load_with_report
from tests.helpers.make_checkpoint import make, qwen_config
from tests.helpers.torch_files import save_shards

CONFIG = qwen_config()


@pytest.fixture
def model(catalog: Path) -> Qwen:
    model = get_qwen_model_hub().create_new_model(CONFIG, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def _check(loaded: torch.nn.Module, model: torch.nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value.to(dtype)), name


SAVED: dict[str, Callable[[torch.nn.Module], Any]] = {
    "a state dict": lambda model: model.state_dict(),
    "fairseq2": lambda model: {"fs2": True, "model": model.state_dict()},
    "a training script": lambda model: {"epoch": 3, "model_state_dict": dict(model.state_dict()), "rng": b"x"},
    "parameters": lambda model: dict(model.named_parameters()),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_module(tmp_path: Path, model: Qwen, kind: str, legacy: bool, mmap: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(SAVED[kind](model), path, _use_new_zipfile_serialization=not legacy)

    _check(get_qwen_model_hub().load_custom_model(path, CONFIG, dtype="auto", mmap=mmap), model)


@pytest.mark.few(1)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_strided_tensors_beside_other_objects(tmp_path: Path, model: Qwen, legacy: bool) -> None:
    """As a fairseq checkpoint may be: it takes an argument of the call, and a file in the cache."""
    strided = _strided(model)
    value = {"model": strided, "args": argparse.Namespace(lr=0.1)}
    path = tmp_path / "model.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    hub = get_qwen_model_hub()

    with pytest.raises(PolicyError, match=r"argparse\.Namespace"):
        hub.load_custom_model(path, CONFIG)
    for _ in range(2):
        _check(hub.load_custom_model(path, CONFIG, dtype="auto", restrict=False), model)
    found = dict(hub.iter_checkpoint(path, CONFIG, restrict=False))
    assert all(torch.equal(found[name], value) for name, value in strided.items())


@pytest.mark.parametrize("mmap", [False, True])
def test_a_member_of_an_archive(tmp_path: Path, model: Qwen, mmap: bool) -> None:
    path = _archive(tmp_path, model)
    _check(get_qwen_model_hub().load_custom_model(path / "m" / "model.pt", CONFIG, dtype="auto", mmap=mmap), model)


def test_a_card_of_a_member_of_an_archive(cards: Path, cli: Callable[..., Result], tmp_path: Path, model: Qwen) -> None:
    path = _archive(tmp_path, model)
    card = tmp_path / "tar.yaml"
    card.write_text(f"name: tiny_tar\nbase: tiny\ncheckpoint: {path}\ncheckpoint_path: m/model.pt\n")
    cli("import", card)

    for verify in ("auto", "always"):
        _check(load_with_report("tiny_tar", dtype="auto", verify=verify)[0], model)


def _archive(folder: Path, model: Qwen) -> Path:
    torch.save(model.state_dict(), folder / "model.pt")
    path = folder / "model.tar"
    with tarfile.open(path, "w") as file:
        file.add(folder / "model.pt", "m/model.pt")
    return path


def _strided(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its state, in which no matrix lies row after row."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in state.items()}


def test_a_card_of_strided_tensors(cards: Path, cli: Callable[..., Result], tmp_path: Path, model: Qwen) -> None:
    path = tmp_path / "cards" / "strided.pt"
    torch.save(_strided(model), path)
    card = tmp_path / "pt.yaml"
    card.write_text(f"name: tiny_strided\nbase: tiny\ncheckpoint: {path}\n")
    cli("import", card)
    cli("index", "tiny_strided")

    for _ in range(2):
        _check(load_with_report("tiny_strided", dtype="auto", mmap=True)[0], model)


@pytest.mark.few(1)
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "strided"])
def test_a_folder_of_several_files(cards: Path, cli: Callable[..., Result], tmp_path: Path, strided: bool) -> None:
    folder = tmp_path / "cards" / "m"
    expected = load_model(make(folder), dtype="auto")
    (folder / "model.safetensors").unlink()
    save_shards(folder, _strided(expected) if strided else dict(expected.state_dict()))
    (tmp_path / "pt.yaml").write_text(f"name: tiny_bin\nbase: tiny\ncheckpoint: {folder}\n")
    cli("import", tmp_path / "pt.yaml")

    for _ in range(2):
        _check(load_model(folder, dtype="auto"), expected)
        _check(load_with_report("tiny_bin", dtype="auto", mmap=True)[0], expected)


def test_strided_tensors_with_a_family_that_reads_the_file_beside_them(
    cards: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    folder = tmp_path / "cards" / "m"
    expected = load_model(make(folder), dtype="auto")
    (folder / "model.safetensors").unlink()
    torch.save(_strided(expected), folder / "pytorch_model.bin")
    (tmp_path / "pt.yaml").write_text(f"name: tiny_hg\nmodel_family: hg\nmodel_arch: causal_lm\ncheckpoint: {folder}\n")
    cli("import", tmp_path / "pt.yaml")

    for _ in range(2):
        found = load_with_report("tiny_hg", dtype="auto")[0].state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_a_saved_module_is_cast(tmp_path: Path, model: Qwen) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")

    loaded = get_qwen_model_hub().load_custom_model(tmp_path / "model.pt", CONFIG, dtype=torch.float32)
    _check(loaded, model, torch.float32)


def test_a_hugging_face_folder_of_before_safetensors(catalog: Path, tmp_path: Path) -> None:
    expected = load_model(make(tmp_path / "m"), dtype="auto")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(expected.state_dict(), tmp_path / "m" / "pytorch_model.bin")

    _check(load_model(tmp_path / "m", dtype="auto"), expected)


def test_a_card_whose_manifest_the_catalog_keeps(
    cards: Path, cli: Callable[..., Result], tmp_path: Path, model: Qwen
) -> None:
    path = tmp_path / "cards" / "tiny.pt"
    torch.save(model.state_dict(), path)
    card = tmp_path / "pt.yaml"
    card.write_text(f"name: tiny_pt\nbase: tiny\ncheckpoint: {path}\n")
    cli("import", card)

    for _ in range(2):
        loaded, report = load_with_report("tiny_pt", dtype="auto", mmap=True)
        _check(loaded, model)
        assert report.bytes_read == 0
    assert "torch" in cli("show", "tiny_pt").output


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_parameters_that_share_bytes_of_the_file_stay_apart(
    tmp_path: Path, model: Qwen, legacy: bool, mmap: bool
) -> None:
    """torch writes one storage for them; only what the model ties is one parameter."""
    state = dict(model.state_dict())
    first, second, *_ = [name for name in state if name.endswith("q_proj.weight")]
    state[second] = state[first]
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)

    loaded = get_qwen_model_hub().load_custom_model(tmp_path / "model.pt", CONFIG, dtype="keep", mmap=mmap)
    loaded.get_parameter(first).detach().zero_()

    assert torch.equal(loaded.get_parameter(second), state[second])
