"""Write tiny random JEPA models of fairseq2 to a folder: parameters, inputs and what comes out.

Run it where fairseq2 0.8.1 is installed::

    python tests/parity/dump_fairseq2_jepa.py tests/parity/fairseq2_jepa
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fairseq2.models.jepa import JepaConfig, JepaEncoderConfig, create_jepa_model
from fairseq2.models.jepa.classifier import JepaClassifierConfig, create_jepa_classifier_model
from fairseq2.nn import BatchLayout
from safetensors.torch import save_file
from torch import Tensor

VIDEO: dict[str, Any] = {"num_input_channels": 1, "input_dims": (4, 12, 16), "patch_dims": (2, 4, 4)}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, list[tuple[int, ...]]]] = {
    "images": ({}, None, [(16, 16), (24, 24)]),
    "wide-images": ({"input_dims": (12, 20), "patch_dims": (4, 2), "num_input_channels": 1}, None, [(12, 20)]),
    "videos": (VIDEO | {"uniform_power": True}, None, [(4, 12, 16), (6, 24, 16)]),
    "videos-by-depth": (VIDEO | {"qkv_bias": False, "ffn_inner_dim_ratio": 2.3}, None, [(4, 12, 16), (2, 12, 32)]),
    "classifier": ({}, {}, [(16, 16), (24, 24)]),
    "classifier-of-videos": (
        VIDEO,
        {"pool_depth": 2, "decoder_projection": False, "num_queries": 2},
        [(4, 12, 16)],
    ),
}
"""The encoder, the classifier if there is one, and the sizes of inputs."""


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)


def main(folder: Path) -> None:
    torch.compiler.set_stance("force_eager")
    folder.mkdir(exist_ok=True)

    for name, (encoder, classifier, sizes) in CASES.items():
        torch.manual_seed(len(name))
        encoder_config = JepaEncoderConfig(
            **{
                "model_dim": 20,  # whose thirds and eighths are odd or not whole
                "input_dims": (16, 16),
                "patch_dims": (4, 4),
                "num_encoder_layers": 2,
                "num_encoder_attn_heads": 2,
                **encoder,
            }
        )
        config: Any
        if classifier is None:
            config = JepaConfig(encoder_config=encoder_config)
            model: Any = create_jepa_model(config).eval()
        else:
            config = JepaClassifierConfig(encoder_config=encoder_config, num_classes=5, **classifier)
            model = create_jepa_classifier_model(config).eval()
        randomise(model)

        tensors: dict[str, Tensor] = {}
        for i, size in enumerate(sizes):
            x = torch.randn(2, encoder_config.num_input_channels, *size)
            with torch.no_grad():
                found = model(x, BatchLayout.of(x))
            tensors |= {f"test.input{i}": x, f"test.output{i}": found if isinstance(found, Tensor) else found[0]}

        save_file(
            {key: value.contiguous() for key, value in (model.state_dict() | tensors).items()},
            folder / f"{name}.safetensors",
            {"config": json.dumps(asdict(config))},
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
