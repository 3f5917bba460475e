"""Encoders with a decoder against fairseq2; ``dump_fairseq2_encoder_decoders.py`` wrote its tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lading import check_model, import_cards
from lading.models.accessor import ModelHubAccessor
from lading.models.family import get_family
from tests.helpers.configs import structured
from tests.helpers.parity_tools import relative_difference

TOLERANCE = 1e-5
FOLDER = Path(__file__).with_name("fairseq2_encoder_decoders")
CASES = ["nllb", "s2t_conformer", "s2t_conformer-relative", "s2t_transformer"]


class Dumped:
    def __init__(self, case: str) -> None:
        self.family = get_family(case.partition("-")[0])
        with safe_open(FOLDER / f"{case}.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.values = json.loads(metadata["config"])
        self.config = structured(self.family.config_kls, self.values)
        self.names = json.loads(metadata["fairseq"])
        self.test = {key.removeprefix("test."): value for key, value in tensors.items() if key.startswith("test.")}
        self.state = {key: value for key, value in tensors.items() if not key.startswith("test.")}

    def of_fairseq(self) -> dict[str, Tensor]:
        """The state as fairseq has it: NLLB's control symbols in another order, and buffers beside it."""
        state = {self.names[name]: tensor.clone() for name, tensor in self.state.items()}
        if self.family.name == "nllb":
            for name in ("encoder.embed_tokens", "decoder.embed_tokens", "decoder.output_projection"):
                state[f"{name}.weight"][[1, 3, 0, 2]] = self.state["final_proj.weight"][[0, 1, 2, 3]]
        for side in ("encoder", "decoder"):
            state |= {f"{side}.version": torch.tensor([3.0]), f"{side}.embed_positions._float_tensor": torch.zeros(1)}

        return state

    def load(self, path: Path) -> Any:
        hub = ModelHubAccessor(self.family.name, self.family.model_kls, self.family.config_kls)()

        return hub.load_custom_model(path, self.config, progress=False).eval()

    def agrees(self, model: Any) -> bool:
        expected = self.test
        source, target = expected["source"], expected["target"]
        masks = [
            torch.arange(x.size(1))[None] < expected[f"{name}_lengths"][:, None]
            for name, x in (("source", source), ("target", target))
        ]
        with torch.no_grad():
            found = model(source, masks[0], target, target_mask=masks[1])

        return relative_difference(found[masks[1]], expected["logits"][masks[1]]) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_fairseq2(case: str, tmp_path: Path, home: Path) -> None:
    dumped = Dumped(case)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in dumped.state.items()}}, tmp_path / "model.pt")

    assert dumped.agrees(dumped.load(tmp_path / "model.pt"))


@pytest.mark.parametrize("case", CASES)
def test_a_card_of_a_checkpoint_of_fairseq(case: str, tmp_path: Path, home: Path) -> None:
    dumped = Dumped(case)
    torch.save({"args": None, "model": dumped.of_fairseq()}, tmp_path / "model.pt")
    import_cards(
        [
            {
                "name": "tiny",
                "model_family": dumped.family.name,
                "checkpoint": str(tmp_path / "model.pt"),
                "model_config": dumped.values,
            }
        ]
    )

    assert check_model("tiny").fits
    assert dumped.agrees(dumped.load(tmp_path / "model.pt"))
