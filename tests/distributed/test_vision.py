"""What ranks compute together of images and videos is what one process computes alone, over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from lading.families.jepa import JepaConfig, JepaEncoderConfig, get_jepa_model_hub
from lading.families.jepa_classifier import JepaClassifierConfig
from lading.gangs import create_gangs
from tests.distributed.tiny_models import compare_with_one, far
from tests.distributed.workers import Pool

VIDEO = JepaEncoderConfig(
    model_dim=20,
    input_dims=(4, 12, 16),
    patch_dims=(2, 4, 4),
    num_encoder_layers=3,
    num_encoder_attn_heads=2,
    ffn_inner_dim_ratio=1.5,
    droppath_p=0.3,
    init_std=0.3,
)
IMAGES = JepaEncoderConfig(
    model_dim=20,
    input_dims=(12, 16),
    patch_dims=(4, 4),
    num_encoder_layers=2,
    num_encoder_attn_heads=4,
    learned_positions=True,
    init_std=0.3,
)
CONFIGS: dict[str, tuple[str, Any]] = {
    "videos": ("jepa", JepaConfig(encoder_config=VIDEO)),
    "images": ("jepa", JepaConfig(encoder_config=IMAGES)),
    "classifier": ("jepa_classifier", JepaClassifierConfig(encoder_config=IMAGES, pool_depth=2, num_classes=5)),
    "classifier-of-videos": (
        "jepa_classifier",
        JepaClassifierConfig(encoder_config=VIDEO, decoder_projection=False, num_queries=3, num_classes=5),
    ),
}


def forward(model: Module) -> Tensor:
    config: Any = model
    spec = getattr(config, "jepa", config).spec
    x = torch.randn(2, 3, *spec.input_dims, generator=torch.Generator().manual_seed(0))
    found: Tensor = model(x)

    return found


def compare(case: str, axes: dict[str, int]) -> list[str]:
    """Skipped blocks are the same where the seeds are."""
    return compare_with_one(*CONFIGS[case], axes, forward)


OURS_TO_META = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "layernorm": "norm",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def save_as_meta(path: Path) -> None:
    """A random model of videos, whose projections of queries, keys and values are one tensor."""
    state = get_jepa_model_hub().create_new_model(CONFIGS["videos"][1]).state_dict()
    found = {}
    for name, tensor in state.items():
        if ".key." in name or ".value." in name:
            continue
        if ".query." in name:
            tensor = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
            name = name.replace("attention.attention.query", "attn.qkv")
        for ours, meta in OURS_TO_META.items():
            name = name.replace(ours, meta)
        found[f"module.backbone.{name}"] = tensor
    save_file(found, path)


def load(path: Path, axes: dict[str, int]) -> bool:
    torch.set_num_threads(1)
    hub, config = get_jepa_model_hub(), CONFIGS["videos"][1]

    alone = hub.load_custom_model(path, config, progress=False).eval()
    with create_gangs("cpu", **axes) as gangs, torch.no_grad():
        model = hub.load_custom_model(path, config, gangs=gangs, progress=False).eval()

        return far(forward(model), forward(alone))


@pytest.mark.parametrize(
    ("case", "axes"),
    [
        ("videos", {"tp": 2}),
        ("images", {"sdp": 2}),
        ("classifier", {"tp": 2}),
        ("classifier-of-videos", {"sdp": 2}),
        pytest.param("videos", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("images", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("classifier", {"sdp": 2}, marks=pytest.mark.slow),
        pytest.param("classifier-of-videos", {"tp": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_ranks(pool2: Pool, case: str, axes: dict[str, int]) -> None:
    assert pool2.values(compare, case, axes) == [[]] * 2


@pytest.mark.parametrize("axes", [{"tp": 2}, {"sdp": 2}], ids=str)
def test_a_checkpoint_of_meta(pool2: Pool, tmp_path: Path, axes: dict[str, int]) -> None:
    save_as_meta(tmp_path / "model.safetensors")

    assert pool2.values(load, tmp_path / "model.safetensors", axes) == [False] * 2


@pytest.mark.parametrize("case", ["videos", pytest.param("classifier", marks=pytest.mark.slow)])
def test_four_ranks(pool4: Pool, case: str) -> None:
    assert pool4.values(compare, case, {"tp": 2, "sdp": 2}) == [[]] * 4
