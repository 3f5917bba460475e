"""I-JEPA against transformers: the same random weights must give the same hidden states.

The relative difference of two tensors is ``max |a - b| / max |b|`` over all of their elements.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lading import load_model
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.families.jepa import FAMILY, get_jepa_model_hub
from lading.models.family import family_of_model_type
from tests.helpers.parity_tools import randomise, relative_difference

TOLERANCE = 1e-5

CASES: dict[str, dict[str, Any]] = {
    "base": {},
    "one-head-and-eps": {"num_attention_heads": 1, "layer_norm_eps": 1e-3},
    "without-biases": {"qkv_bias": False, "intermediate_size": 83},
    "wide-images": {"image_size": [16, 24], "patch_size": [4, 8], "num_channels": 1},
}

by_case = pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())


def saved(folder: Path, config: dict[str, Any], name: str = "IJepaModel", **options: Any) -> Any:
    """A random model of transformers, which is also in ``folder``."""
    import transformers

    torch.manual_seed(len(config))
    values = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
        **config,
    }
    theirs = (
        getattr(transformers, name)._from_config(transformers.IJepaConfig(**values), attn_implementation="eager").eval()
    )
    randomise(theirs)
    theirs.save_pretrained(folder, **options)

    return theirs


def images(theirs: nn.Module, *size: int) -> Tensor:
    shape = theirs.embeddings.patch_embeddings
    generator = torch.Generator().manual_seed(7)

    return torch.randn(2, shape.num_channels, *(size or shape.image_size), generator=generator)


@by_case
@torch.no_grad()
def test_hidden_states(config: dict[str, Any], tmp_path: Path, home: Path) -> None:
    theirs = saved(tmp_path, config)

    ours = load_model(tmp_path, progress=False).eval()

    x = images(theirs)
    assert relative_difference(ours(x), theirs(x).last_hidden_state) <= TOLERANCE


@torch.no_grad()
def test_images_of_another_size(tmp_path: Path, home: Path) -> None:
    theirs = saved(tmp_path, {})
    x = images(theirs, 24, 12)

    found = load_model(tmp_path, progress=False).eval()(x)

    assert relative_difference(found, theirs(x, interpolate_pos_encoding=True).last_hidden_state) <= TOLERANCE


def test_gradients(tmp_path: Path, home: Path) -> None:
    theirs = saved(tmp_path, {})
    ours = load_model(tmp_path, progress=False)
    x = images(theirs)

    ours(x).square().mean().backward()
    theirs.train()
    theirs(x).last_hidden_state.square().mean().backward()

    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    pairs = [("embeddings.position_embeddings",) * 2, ("layernorm.weight",) * 2]
    pairs += [
        (f"encoder.layer.{i}.attention.attention.query.weight", f"layers.{i}.attention.q_proj.weight") for i in range(3)
    ]
    pairs += [(f"encoder.layer.{i}.output.dense.weight", f"layers.{i}.mlp.fc2.weight") for i in range(3)]
    expected = dict(theirs.named_parameters())
    assert len(found) == len(expected)
    for ours_name, name in pairs:
        assert float((found[ours_name] - expected[name].grad).abs().max()) <= 10 * TOLERANCE * largest, name


@torch.no_grad()
def test_the_names_of_modules_of_transformers_5(tmp_path: Path, home: Path) -> None:
    theirs = saved(tmp_path, {})
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")

    x = images(theirs)
    found = load_model(tmp_path, progress=False).eval()(x)

    assert relative_difference(found, theirs(x).last_hidden_state) <= TOLERANCE


@torch.no_grad()
def test_the_encoder_of_a_classifier(tmp_path: Path, home: Path) -> None:
    """The whole classifier is a model of transformers; its encoder is loaded if its family is named."""
    theirs = saved(tmp_path, {}, "IJepaForImageClassification")
    config = FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert family_of_model_type("ijepa", ["IJepaForImageClassification"]).name == "hg"

    found = get_jepa_model_hub().load_custom_model(tmp_path / "model.safetensors", config, progress=False).eval()

    x = images(theirs.ijepa)
    assert relative_difference(found(x), theirs.ijepa(x).last_hidden_state) <= TOLERANCE


def test_names_are_those_of_files(tmp_path: Path) -> None:
    saved(tmp_path, {})
    config = FAMILY.from_hf(json.loads((tmp_path / "config.json").read_text()))

    assert {
        key: tuple(value.shape) for key, value in load_file(tmp_path / "model.safetensors").items()
    } == FAMILY.shapes(config)


def test_a_sparse_file_means_what_the_full_one_does(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import IJepaConfig

    full = json.loads(IJepaConfig().to_json_string(use_diff=False))

    assert FAMILY.from_hf({"model_type": "ijepa"}) == FAMILY.from_hf(full)
    assert not caplog.records, "a key that the family does not know"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image_size": [16]}, ModelCheckpointMismatchError, "image_size is expected to be a positive integer, or two"),
        ({"image_size": [16, 16, 16]}, ModelCheckpointMismatchError, "image_size"),
        ({"patch_size": "16"}, ModelCheckpointMismatchError, "patch_size"),
        ({"patch_size": 300}, ModelCheckpointMismatchError, "at least one patch"),
        ({"image_size": 2**40}, ModelCheckpointMismatchError, "at most"),
        ({"image_size": 2**20, "patch_size": 1}, ModelCheckpointMismatchError, "number of patches"),
        ({"num_attention_heads": 7}, ModelCheckpointMismatchError, "multiple"),
        ({"hidden_act": "relu"}, NotSupportedError, "hidden_act is 'relu'"),
        ({"head_dim": 16}, NotSupportedError, "head_dim is 16"),
    ],
    ids=str,
)
def test_other_files_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FAMILY.from_hf({"model_type": "ijepa"} | changes)
