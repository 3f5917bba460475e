"""Offline holds for what transformers fetches by itself, too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.helpers.interpreters import Interpreters

ASK = """
import json, sys

def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"a socket was used: {event}")

from lading.models.construct import build_on_meta
from lading.errors import FetchError
from lading.families.hg import FAMILY

sys.addaudithook(guard)
for values in json.loads(sys.argv[1]):
    try:
        answer = type(build_on_meta(FAMILY, FAMILY.from_hf(values))).__name__
    except FetchError as error:
        answer = error
    print(answer, end="\\0")
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


STATED = {**DETR, "backbone": None, "backbone_config": RESNET}


def ask(interpreters: Interpreters, questions: list[dict[str, Any]], home: Path, variable: str) -> list[str]:
    """Return the class of the model that each configuration makes, or the error; in one process."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LADING_", "TRANSFORMERS_"))}
    out = interpreters.run(ASK, json.dumps(questions), env={**keep, "HF_HOME": str(home), variable: "1"})

    return out.split("\0")[:-1]


def test_a_backbone_that_is_elsewhere_opens_no_socket_and_one_that_is_stated_is_made(
    interpreters: Interpreters, tmp_path: Path
) -> None:
    elsewhere, stated = ask(interpreters, [DETR, STATED], tmp_path, "LADING_OFFLINE")
    assert "as its backbone" in elsewhere
    assert stated == "DetrModel"


def test_a_backbone_that_is_elsewhere_opens_no_socket_where_the_hub_is_offline(
    interpreters: Interpreters, tmp_path: Path
) -> None:
    (elsewhere,) = ask(interpreters, [DPT], tmp_path, "HF_HUB_OFFLINE")
    assert "as its backbone" in elsewhere
