"""JEPA against fairseq2; ``dump_fairseq2_jepa.py`` wrote its tiny random models beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lading import check_model, load_model
from lading.families.jepa import JepaConfig, get_jepa_model_hub
from lading.families.jepa_classifier import JepaClassifierConfig, get_jepa_classifier_model_hub
from tests.helpers.configs import structured
from tests.helpers.parity_tools import relative_difference

TOLERANCE = 1e-5
FILES = {path.stem: path for path in sorted(Path(__file__).with_name("fairseq2_jepa").glob("*.safetensors"))}
ENCODERS = [name for name in FILES if not name.startswith("classifier")]
ENCODER: Any = (JepaConfig, get_jepa_model_hub)
CLASSIFIER: Any = (JepaClassifierConfig, get_jepa_classifier_model_hub)


class Dumped:
    def __init__(self, name: str) -> None:
        kls, hub = ENCODER if name in ENCODERS else CLASSIFIER
        self.hub: Any = hub()
        with safe_open(FILES[name], "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config = structured(kls, config)
        self.state = {key: value for key, value in tensors.items() if not key.startswith("test.")}
        self.inputs = [value for key, value in tensors.items() if key.startswith("test.input")]
        self.outputs = [value for key, value in tensors.items() if key.startswith("test.output")]

    def load(self, path: Path, **options: Any) -> Any:
        return self.hub.load_custom_model(path, self.config, progress=False, **options).eval()

    def compare(self, model: Any) -> None:
        for x, expected in zip(self.inputs, self.outputs, strict=True):
            assert relative_difference(model(x), expected) <= TOLERANCE


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_outputs(name: str, tmp_path: Path, home: Path) -> None:
    """Also those for inputs of other sizes than the configuration's."""
    dumped = Dumped(name)
    save_file(dumped.state, tmp_path / "model.safetensors")

    dumped.compare(dumped.load(tmp_path / "model.safetensors"))


FAIRSEQ2_TO_META = {
    "encoder_frontend.patch_feature_extractor.conv": "patch_embed.proj",
    "encoder.layer_norm": "norm",
    "encoder.layers.": "blocks.",
    "self_attn.output_proj": "attn.proj",
    "self_attn_layer_norm": "norm1",
    "ffn.inner_proj": "mlp.fc1",
    "ffn.output_proj": "mlp.fc2",
    "ffn_layer_norm": "norm2",
}


def as_meta_saves(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state with Meta's names, and its projections of queries, keys and values."""
    found = {}
    for name, tensor in state.items():
        if "self_attn.q_proj" in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            name, tensor = name.replace("self_attn.q_proj", "attn.qkv"), torch.cat(parts)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        for theirs, meta in FAIRSEQ2_TO_META.items():
            name = name.replace(theirs, meta)
        found[prefix + name] = tensor

    return found


@pytest.mark.parametrize("name", ["videos", "videos-by-depth"])
@torch.no_grad()
def test_a_checkpoint_of_meta(name: str, tmp_path: Path, home: Path) -> None:
    """With all that a training of V-JEPA saves; a card says which of its models is meant."""
    from lading import import_cards

    dumped = Dumped(name)
    target = as_meta_saves(dumped.state, "module.backbone.")
    other = {key: torch.zeros_like(value) for key, value in target.items()}
    target["module.backbone.pos_embed"] = torch.zeros(1, 24, 20)
    saved = {
        "encoder": other,
        "predictor": {"module.backbone.predictor_embed.weight": torch.zeros(3, 3)},
        "target_encoder": target,
        "epoch": 300,
        "lr": 0.1,
    }
    torch.save(saved, tmp_path / "latest.pth.tar")

    dumped.compare(dumped.load(tmp_path / "latest.pth.tar", state_dict="target_encoder"))

    card = {
        "name": "tiny_jepa",
        "base": "jepa_vitl16",
        "model_config": json.loads(json.dumps({"encoder_config": vars(dumped.config.encoder_config)})),
        "checkpoint": "./latest.pth.tar",
    }
    (tmp_path / "cards.yaml").write_text(json.dumps(card))
    import_cards(tmp_path / "cards.yaml")

    assert check_model("tiny_jepa").fits
    dumped.compare(load_model("tiny_jepa", progress=False).eval())


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@torch.no_grad()
def test_other_prefixes_of_meta(prefix: str, tmp_path: Path, home: Path) -> None:
    """The model alone, or wrapped once, as a training of I-JEPA saves it."""
    dumped = Dumped("images")
    save_file(as_meta_saves(dumped.state, prefix), tmp_path / "model.safetensors")

    dumped.compare(dumped.load(tmp_path / "model.safetensors"))


@torch.no_grad()
def test_the_names_that_fairseq2_gives_to_a_checkpoint_of_meta(tmp_path: Path, home: Path) -> None:
    dumped = Dumped("images")
    state = {key.replace("patch_feature_extractor", "feature_extractor"): value for key, value in dumped.state.items()}
    save_file(state, tmp_path / "model.safetensors")

    dumped.compare(dumped.load(tmp_path / "model.safetensors"))
