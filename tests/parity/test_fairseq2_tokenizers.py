"""Tokenizers against fairseq2's, on the same files; ``dump_fairseq2_tokenizers.py`` wrote what its own say."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lading import AssetCard, Tokenizer, get_asset_store, import_cards, load_tokenizer
from lading.cards.card import CardEntry
from lading.cards.card_file import dump
from lading.models.tokenizers.families import get_tokenizer_family

FOLDER = Path(__file__).parent
FILES = FOLDER / "fairseq2_tokenizers"
DUMPED: dict[str, Any] = json.loads((FOLDER / "fairseq2_tokenizers.json").read_text(encoding="utf-8"))
TEXTS: list[str] = DUMPED["texts"]
CASES: list[dict[str, Any]] = DUMPED["cases"]


def load(case: dict[str, Any], folder: Path) -> Tokenizer:
    file = Path(shutil.copy(FILES / case["file"], folder))
    if case["tokenizer_config"] is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(case["tokenizer_config"]), encoding="utf-8")
    config = get_tokenizer_family(case["family"]).config_kls(**case["config"])

    return load_tokenizer(file, family=case["family"], config=config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['family']}-{case['file']}-{case['config']}")
def test_texts_have_the_indices_of_fairseq2(tmp_path: Path, case: dict[str, Any]) -> None:
    tokenizer = load(case, tmp_path)

    assert asdict(tokenizer.vocab_info) == case["vocab_info"]
    raw = tokenizer.create_raw_encoder()
    assert [raw(text).tolist() for text in TEXTS] == case["raw"]
    for expected in case["encoders"]:
        encode = tokenizer.create_encoder(**expected["arguments"])
        indices = [encode(text) for text in TEXTS]
        assert {each.dtype for each in indices} == {torch.int64}
        assert [each.tolist() for each in indices] == expected["indices"]
        assert encode.encode_as_tokens(TEXTS[0]) == expected["tokens"]
        for found, key in ((encode.prefix_indices, "prefix"), (encode.suffix_indices, "suffix")):
            assert (None if found is None else found.tolist()) == expected[key]

    assert [tokenizer.encode(text).tolist() for text in TEXTS] == case["encoders"][0]["indices"]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == case["decoded"]
    skip = tokenizer.create_decoder(skip_special_tokens=True)
    assert [skip(indices) for indices in case["encoders"][0]["indices"]] == case["skipped"]
    assert tokenizer.create_decoder().decode_from_tokens(raw.encode_as_tokens(TEXTS[0])) == case["from_tokens"]


FILE_OF = {
    "char_tokenizer": "plain.model", "gemma3n": "tokenizer.json", "hg": "tokenizer.json", "llama": "plain.model",
    "llama4": "ranks.tiktoken", "mistral": "plain.model", "nllb": "plain.model", "olmo": "tokenizer.json",
    "qwen": "tokenizer.json", "s2t_transformer": "speech.model",
}  # fmt: skip


def test_all_cards_of_fairseq2_state_a_known_family(home: Path, tmp_path: Path) -> None:
    """Each loads with a tiny file in place of the published one, by its own family and configuration."""
    files = json.loads((FOLDER / "fairseq2_cards.json").read_text(encoding="utf-8"))["files"]
    cards = [card for cards in files.values() for card in cards]
    path = tmp_path / "cards.yaml"
    path.write_text(dump([CardEntry(name=card.pop("name"), metadata=card) for card in map(dict, cards)]))
    import_cards(path)
    store = get_asset_store()

    loaded = {}
    for name in {card["name"] for card in cards} - {"librispeech_asr_100h"}:  # its base does not exist
        card = store.retrieve_card(name)
        if card.has_field("tokenizer_family"):
            family = card.field("tokenizer_family").as_(str)
            file = "tokenizer.json" if "llama3" in name else FILE_OF[family]
            here = {"tokenizer": (FILES / file).as_uri(), "tokenizer_path": None}
            loaded[name] = load_tokenizer(AssetCard(f"{name}_here", here, card), store=store)

    assert len(loaded) == 76

    def eos(name: str) -> str:
        return str(loaded[name].model.id_to_token(loaded[name].vocab_info.eos_idx))

    assert eos("llama3_8b") == "<|end_of_text|>"
    assert eos("llama3_2_1b_instruct") == "<|eot_id|>"
    assert eos("qwen3_0.6b_base") == "<|endoftext|>"
    assert eos("qwen25_32b_instruct") == "<|im_end|>"
    assert loaded["nllb-200_dense_1b"].vocab_info.size == loaded["mistral_7b"].vocab_info.size + 202 + 3 + 1
    assert loaded["s2t_transformer_mustc_st_jt_m"].create_encoder(lang="fr").encode_as_tokens("")[0] == "</s>"
