"""Models from what ``torch.save`` wrote, through the same loader as any other checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from lading import load_model
from lading.families.qwen import Qwen, QwenConfig, get_qwen_model_hub
from lading.hub import load_with_report
from make_checkpoint import make

CONFIG = QwenConfig(
    model_dim=32,
    max_seq_len=128,
    vocab_size=100,
    tied_embeddings=True,
    num_layers=2,
    num_attn_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_proj_bias=False,
    q_norm=True,
    k_norm=True,
    ffn_inner_dim=64,
    rope_theta=1_000_000.0,
)


@pytest.fixture
def model(home: Path) -> Qwen:
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


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", SAVED)
def test_a_saved_module(tmp_path: Path, model: Qwen, kind: str, legacy: bool, mmap: bool) -> None:
    path = tmp_path / "model.pt"
    torch.save(SAVED[kind](model), path, _use_new_zipfile_serialization=not legacy)

    _check(get_qwen_model_hub().load_custom_model(path, CONFIG, dtype="auto", mmap=mmap), model)


def test_a_saved_module_is_cast(tmp_path: Path, model: Qwen) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")

    loaded = get_qwen_model_hub().load_custom_model(tmp_path / "model.pt", CONFIG, dtype=torch.float32)
    _check(loaded, model, torch.float32)


def test_a_hugging_face_folder_of_before_safetensors(home: Path, tmp_path: Path) -> None:
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
