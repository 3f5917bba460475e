"""Decoders as fairseq2 saves them; ``dump_fairseq2_decoders.py`` wrote tiny random ones beside this file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lading.errors import NotSupportedError
from lading.models.accessor import ModelHubAccessor
from lading.models.family import get_family
from tests.helpers.configs import structured
from tests.helpers.parity_tools import relative_difference

FILES = {path.stem: path for path in sorted(Path(__file__).with_name("fairseq2_decoders").glob("*.safetensors"))}


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path, home: Path) -> None:
    family = get_family(name.partition("-")[0])
    with safe_open(FILES[name], "pt") as file:
        values = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tokens, logits = state.pop("test.tokens"), state.pop("test.logits")
    torch.save({"fs2": True, "model": state}, tmp_path / "model.pt")
    if values.get("yarn_scale_config"):
        values["yarn_in_all_layers"] = True
    config = structured(family.config_kls, values)

    hub = ModelHubAccessor(family.name, family.model_kls, family.config_kls)()
    model = hub.load_custom_model(tmp_path / "model.pt", config, progress=False).eval()

    assert relative_difference(model(tokens), logits) <= 1e-5


def test_an_olmo_3_of_fairseq2_scales_all_layers_or_is_refused(tmp_path: Path, home: Path) -> None:
    with safe_open(FILES["olmo-3-yarn"], "pt") as file:
        values = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys() if not key.startswith("test.")}  # noqa: SIM118
    torch.save({"fs2": True, "model": state}, tmp_path / "model.pt")
    family = get_family("olmo")
    hub = ModelHubAccessor(family.name, family.model_kls, family.config_kls)()

    with pytest.raises(NotSupportedError, match="yarn_in_all_layers: true"):
        hub.load_custom_model(tmp_path / "model.pt", structured(family.config_kls, values), progress=False)
