"""The decoder of a Gemma 3 that sees images, loaded by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lading import AssetCardError, NotSupportedError, import_cards, load_model
from lading.families.gemma3 import Gemma3, get_gemma3_model_hub
from tests.helpers.parity_tools import relative_difference

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 7, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip

CARD = """\
name: tiny_gemma
model_family: gemma3
model_config: {model_dim: 16, max_seq_len: 131072, vocab_size: 64, num_layers: 7, num_attn_heads: 2,
  num_key_value_heads: 1, head_dim: 8, sliding_window: 5, ffn_inner_dim: 24, rope_factor: 8.0}
checkpoint: ./model
"""


@pytest.fixture
def theirs(tmp_path: Path, home: Path) -> Any:
    """A model of random weights, which is saved to ``model``."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")
    return model


@torch.no_grad()
def _check(model: torch.nn.Module, theirs: Any) -> None:
    assert isinstance(model, Gemma3)
    tokens = torch.arange(18).view(2, 9) % 64
    assert relative_difference(model.eval()(tokens), theirs(tokens).logits) <= 1e-5


def test_a_folder(theirs: Any, tmp_path: Path) -> None:
    _check(get_gemma3_model_hub().load_model(tmp_path / "model", progress=False), theirs)


def test_a_card(theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(CARD)
    import_cards(tmp_path / "cards.yaml")

    _check(load_model("tiny_gemma", progress=False), theirs)


def test_the_names_of_the_model_in_memory(theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "cards.yaml").write_text(CARD)
    import_cards(tmp_path / "cards.yaml")
    save_file(
        {name: tensor.contiguous() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"},
        tmp_path / "model" / "model.safetensors",
    )

    assert "model.language_model.norm.weight" in load_file(tmp_path / "model" / "model.safetensors")
    _check(load_model("tiny_gemma", progress=False), theirs)


def test_the_whole_of_it_is_what_a_folder_stands_for(theirs: Any, tmp_path: Path) -> None:
    model = load_model(tmp_path / "model", progress=False)

    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_families_do_not_read_a_part_of_it(theirs: Any, tmp_path: Path) -> None:
    from lading.families.qwen import get_qwen_model_hub

    with pytest.raises(AssetCardError, match="'qwen'"):
        get_qwen_model_hub().load_model(tmp_path / "model")


def test_an_error_in_its_part_of_the_file_says_where(theirs: Any, tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["final_logit_softcapping"] = 30.0
    file.write_text(json.dumps(values))

    with pytest.raises(NotSupportedError, match=r"text_config\.final_logit_softcapping"):
        get_gemma3_model_hub().load_model(tmp_path / "model")
