"""Offline holds for what transformers fetches by itself, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ASK = """
import json, sys

def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"a socket was used: {event}")

from lading.models.construct import build_on_meta
from lading.errors import FetchError
from lading.families.hg import FAMILY

sys.addaudithook(guard)
try:
    print(type(build_on_meta(FAMILY, FAMILY.from_hf(json.loads(sys.argv[1])))).__name__)
except FetchError as error:
    print(error)
"""

BACKBONE = {"use_timm_backbone": False, "backbone": "acme/tiny-resnet", "backbone_config": None}
DETR = {
    "model_type": "detr",
    "architectures": ["DetrModel"],
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    **BACKBONE,
}
DPT = {"model_type": "dpt", "architectures": ["DPTForDepthEstimation"], **BACKBONE}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}


def ask(values: dict[str, Any], home: Path, variable: str) -> str:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LADING_", "TRANSFORMERS_"))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(values)],
        env={**keep, "HF_HOME": str(home), variable: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("values", "variable"), [(DETR, "LADING_OFFLINE"), (DPT, "HF_HUB_OFFLINE")], ids=["detr", "dpt"]
)
def test_a_backbone_that_is_elsewhere_opens_no_socket(tmp_path: Path, values: dict[str, Any], variable: str) -> None:
    assert "as its backbone" in ask(values, tmp_path, variable)


def test_a_backbone_that_is_stated_is_made(tmp_path: Path) -> None:
    stated = {**DETR, "backbone": None, "backbone_config": RESNET}
    assert ask(stated, tmp_path, "LADING_OFFLINE") == "DetrModel\n"
