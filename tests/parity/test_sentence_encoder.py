"""The real trained encoder: what the demo prints is what transformers computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference(demo: ModuleType) -> torch.Tensor:
    from tokenizers import Tokenizer
    from transformers import BertModel

    folder = demo.model_folder()
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(list(demo.SENTENCES))
    ids = torch.tensor([e.ids for e in encoded])
    mask = torch.tensor([e.attention_mask for e in encoded])
    with torch.inference_mode():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).float()
    mean = (hidden * weights).sum(1) / weights.sum(1)
    unit = torch.nn.functional.normalize(mean, dim=-1)
    return unit @ unit.T


def test_the_printed_reference_values_are_those_of_transformers(demo: ModuleType, reference: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(demo.REFERENCE), reference, atol=1e-6, rtol=0)


def test_the_loaded_model_computes_them(
    demo: ModuleType, reference: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    (cards / "mine.yaml").write_text(f'name: all-minilm-l6-v2@user\ncheckpoint: "{demo.model_folder()}"\n')
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{tmp_path / 'catalog.sqlite'}")
    monkeypatch.setenv("LADING_CARDS", str(cards))

    found = torch.tensor(demo.similarities(demo.model_folder()))

    torch.testing.assert_close(found, reference, atol=1e-5, rtol=0)
