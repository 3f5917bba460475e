"""wav2vec 2.0 and w2v-BERT against fairseq2: ``dump_fairseq2_wav2vec2.py`` wrote tiny random models into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lading import load_model
from lading.families.w2vbert import get_w2vbert_model_hub
from lading.families.wav2vec2 import get_wav2vec2_model_hub
from lading.families.wav2vec2_asr import get_wav2vec2_asr_model_hub
from lading.models.family import get_family
from lading.planning.rules import rename
from tests.helpers.configs import structured
from tests.helpers.parity_tools import relative_difference

TOLERANCE = 1e-5
FILES = {path.stem: path for path in sorted(Path(__file__).with_name("fairseq2_wav2vec2").glob("*.safetensors"))}
ASR = [name for name in FILES if name.startswith("asr-")]
HUBS: dict[str, Any] = {
    "w2vbert": get_w2vbert_model_hub,
    "wav2vec2": get_wav2vec2_model_hub,
    "wav2vec2_asr": get_wav2vec2_asr_model_hub,
}


class Dumped:
    def __init__(self, name: str) -> None:
        self.family = get_family("wav2vec2_asr" if name in ASR else name if name in HUBS else "wav2vec2")
        with safe_open(FILES[name], "pt") as file:
            self.metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.config = structured(self.family.config_kls, json.loads(self.metadata["config"]))
        self.test = {key.removeprefix("test."): value for key, value in tensors.items() if key.startswith("test.")}
        self.state = {key: value for key, value in tensors.items() if not key.startswith("test.")}

    def load(self, folder: Path, **changes: str) -> Any:
        """This project's model, from a file with fairseq2's names, or those that ``changes`` has for them."""
        path = folder / "model.safetensors"
        save_file({changes.get(name, name): tensor for name, tensor in self.state.items()}, path)

        return HUBS[self.family.name]().load_custom_model(path, self.config, progress=False).eval()

    def input(self) -> tuple[Tensor, Tensor]:
        x = self.test["input_values"]

        return x, (torch.arange(x.size(1))[None] < self.test["lengths"][:, None]).long()


@pytest.mark.parametrize("name", ASR)
@torch.no_grad()
def test_logits_of_symbols(name: str, tmp_path: Path, home: Path) -> None:
    dumped = Dumped(name)

    found = dumped.load(tmp_path)(*dumped.input())

    assert torch.equal(found.num_frames, dumped.test["num_frames"])
    for i, n in enumerate(found.num_frames.tolist()):
        assert relative_difference(found.logits[i, :n], dumped.test["logits"][i, :n]) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in FILES if name not in ASR])
@torch.no_grad()
def test_pre_training(name: str, tmp_path: Path, home: Path) -> None:
    dumped = Dumped(name)
    expected = dumped.test

    model = dumped.load(tmp_path)
    found = model(*dumped.input(), temporal_mask=expected["temporal_mask"], distractors=expected["distractors"])
    if name == "w2vbert":
        assert relative_difference(found.logits.flatten(0, 1), expected["bert_logits"]) <= TOLERANCE
        assert torch.equal(found.targets.flatten(0, 1), expected["bert_targets"])
        model, found = model.w2v2_model, found.w2v2

    assert torch.equal(found.logits.isinf(), expected["logits"].isinf())
    finite = expected["logits"].isfinite()
    assert relative_difference(found.logits[finite], expected["logits"][finite]) <= TOLERANCE
    assert relative_difference(found.targets, expected["targets"]) <= TOLERANCE
    assert relative_difference(found.raw_features, expected["raw_features"]) <= TOLERANCE
    assert relative_difference(found.quantizer.code_perplexity, expected["code_perplexity"]) <= TOLERANCE
    assert relative_difference(found.quantizer.prob_perplexity, expected["prob_perplexity"]) <= TOLERANCE
    for i, n in enumerate(found.num_frames.tolist()):
        assert relative_difference(found.hidden[i, :n], expected["hidden"][i, :n]) <= TOLERANCE

    loss = model.loss(found)
    assert relative_difference(loss.contrastive, expected["contrastive_loss"]) <= TOLERANCE
    assert relative_difference(loss.diversity, expected["diversity_loss"]) <= TOLERANCE
    assert relative_difference(loss.features_penalty, expected["features_penalty"]) <= TOLERANCE
    assert relative_difference(loss.aggregate, expected["aggregate_loss"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["asr-base", "asr-lv60k", "w2vbert"])
@torch.no_grad()
def test_names_of_fairseq(name: str, tmp_path: Path, home: Path) -> None:
    dumped = Dumped(name)
    names = json.loads(dumped.metadata["fairseq"])
    rules = dumped.family.rules(dumped.config)

    assert dumped.state.keys() - set(names.values()) <= {"w2v2_model.quantizer.num_updates"}
    assert rename(list(names), rules) == rename(list(names.values()), rules)

    expected = dumped.load(tmp_path).state_dict()
    wrapped = dumped.load(tmp_path, **{name: f"module.{name}" for name in dumped.state}).state_dict()
    assert all(torch.equal(wrapped[name], tensor) for name, tensor in expected.items())
    found = dumped.load(tmp_path, **{fairseq2: fairseq for fairseq, fairseq2 in names.items()}).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_a_card_of_a_local_file(tmp_path: Path, home: Path) -> None:
    """All of the way but the download."""
    from lading import import_cards

    dumped = Dumped("asr-lv60k")
    dumped.load(tmp_path)
    card = {
        "name": "tiny_asr",
        "base": "wav2vec2_asr_base_10h",
        "model_arch": "large_lv60k_10h",
        "checkpoint": "./model.safetensors",
        "model_config": json.loads(dumped.metadata["config"]),
    }
    (tmp_path / "cards.yaml").write_text(json.dumps(card))
    import_cards(tmp_path / "cards.yaml")

    model = load_model("tiny_asr", progress=False).eval()

    found = model(*dumped.input())
    for i, n in enumerate(found.num_frames.tolist()):
        assert relative_difference(found.logits[i, :n], dumped.test["logits"][i, :n]) <= TOLERANCE
