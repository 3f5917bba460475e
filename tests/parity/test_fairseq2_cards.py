"""Built-in cards, and the form of card files, against fairseq2's; ``dump_fairseq2_cards.py`` wrote what it ships."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from lading import get_asset_store, import_cards
from lading.cards.card import CardEntry, resolve_card
from lading.cards.card_file import dump, parse

DUMPED: dict[str, Any] = json.loads(Path(__file__).with_name("fairseq2_cards.json").read_text(encoding="utf-8"))
FILES: dict[str, list[dict[str, Any]]] = DUMPED["files"]
RESOLVED: dict[str, dict[str, dict[str, Any]]] = DUMPED["resolved"]
NATIVE = [family for family in RESOLVED if files("lading.seeds").joinpath(f"{family}.yaml").is_file()]
CARD_FILES = {"llama4": "llama", "wav2vec2_asr": "wav2vec2"}
"""The files of fairseq2 that hold the cards of several families."""

FIELDS = (
    "model_family",
    "model_arch",
    "model_config",
    "checkpoint",
    "checkpoint_path",
    "tokenizer",
    "tokenizer_path",
    "tokenizer_family",
)

RENAMED = {"model_config_overrides": "model_config"}
"""The older name of a field, which would hide what a card based on it says by the other."""

CORRECTED = {"olmo-2-0325-32b": {"model_config": {"ffn_inner_dim": 27_648}}}
"""What cards say here because fairseq2's would not load the checkpoint that they name."""


def entries(cards: list[dict[str, Any]]) -> list[CardEntry]:
    return [
        CardEntry(name=card["name"], metadata={key: value for key, value in card.items() if key != "name"})
        for card in cards
    ]


def resolved(name: str, cards: list[CardEntry]) -> dict[str, object]:
    by_name = {card.name: card for card in cards}

    def look_up(name: str) -> Mapping[str, CardEntry]:
        return {"": by_name[name]} if name in by_name else {}

    card = resolve_card(name, (), look_up)
    assert card is not None

    return card.fields()


def seeds(family: str) -> list[CardEntry]:
    name = f"{family}.yaml"
    data = files("lading.seeds").joinpath(name).read_bytes()

    return list(parse(data, source=f"package:lading.seeds/{name}").cards)


@pytest.mark.parametrize("family", NATIVE)
def test_built_in_cards_say_what_fairseq2_says(family: str) -> None:
    cards = seeds(family)

    for name, expected in RESOLVED[family].items():
        found = resolved(name, cards)
        expected = {RENAMED.get(key, key): value for key, value in expected.items()} | CORRECTED.get(name, {})
        assert {key: found.get(key) for key in FIELDS} == {key: expected.get(key) for key in FIELDS}, name
        assert {key: found.get(key) for key in expected} == expected, name


@pytest.mark.parametrize("family", RESOLVED)
def test_fairseq2_resolves_its_own_cards_as_this_project_does(family: str) -> None:
    cards = entries(FILES[f"models/{CARD_FILES.get(family, family)}.yaml"])

    for name, expected in RESOLVED[family].items():
        assert resolved(name, cards) == expected


@pytest.mark.parametrize("name", FILES)
def test_card_files_of_all_families_are_read_and_written(name: str) -> None:
    cards = entries(FILES[name])

    found = parse(dump(cards).encode(), source="stdin")

    assert found.problems == ()
    assert found.architectures == ()
    assert [(card.name, card.env, card.metadata) for card in found.cards] == [
        (card.name, "", card.metadata) for card in cards
    ]


def test_all_card_files_make_one_catalog() -> None:
    """Not all of their families are known here, and one card has a base that does not exist."""
    cards = [card for name in FILES for card in entries(FILES[name])]

    found = parse(dump(cards).encode(), source="stdin")

    assert found.problems == ()
    assert len(found.cards) == sum(map(len, FILES.values()))
    assert {card.base for card in found.cards} - {None} - {card.name for card in found.cards} == {"wav2vec2_asr"}


def test_they_import_over_the_cards_that_come_with_lading(home: Path, tmp_path: Path) -> None:
    """As they are, without replacing anything; the one base that does not exist is a warning."""
    names = set()
    folder = tmp_path / "cards"
    for file, cards in FILES.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(entries(cards)))
        names |= {card["name"] for card in cards}

    report = import_cards(folder)

    assert not report.problems
    assert not report.changed
    assert any("librispeech_asr_100h" in warning for warning in report.warnings)
    assert get_asset_store().asset_names >= names
    assert get_asset_store().retrieve_card("qwen3_0.6b").field("license").value == "apache-2.0"
    assert not import_cards(folder).added
