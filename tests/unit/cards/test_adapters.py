"""The fields `adapter` and `adapters` of a card."""

from __future__ import annotations

from pathlib import Path

import pytest

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, checkpoint_ref
from lading.cards.card_file import parse
from lading.errors import AssetCardError
from lading.formats.adapter_config import ADAPTER_NAME


def card(fields: dict[str, object], base: AssetCard | None = None) -> AssetCard:
    return AssetCard("c", fields, base, dict.fromkeys(fields, Path("/cards")), "cards.yaml[0]")


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("lora", "file:///cards/lora/adapter_model.safetensors"),
        ("/a/lora/", "file:///a/lora/adapter_model.safetensors"),
        ("/a/other.safetensors", "file:///a/other.safetensors"),
        ("hg://o/lora@main", "hg://o/lora@main/adapter_model.safetensors"),
        ("hg://o/all/sub", "hg://o/all/sub/adapter_model.safetensors"),
        ("https://h/a/adapter_model.safetensors", "https://h/a/adapter_model.safetensors"),
    ],
)
def test_the_address_of_an_adapter(address: str, key: str) -> None:
    (ref,) = adapter_refs(card({"adapter": address}))
    assert (checkpoint_ref(ref.card).key, ref.weight) == (key, 1.0)
    assert adapter_refs(card({"adapters": [{"checkpoint": address, "weight": 1}]})) == (ref,)


def test_several_keep_their_order_and_weights() -> None:
    refs = adapter_refs(card({"adapters": [{"checkpoint": "b", "weight": -0.5}, {"checkpoint": "a"}]}))
    assert [(ref.card.name, ref.weight) for ref in refs] == [
        (f"/cards/b/{ADAPTER_NAME}", -0.5),
        (f"/cards/a/{ADAPTER_NAME}", 1.0),
    ]


def test_the_nearest_card_counts() -> None:
    base = card({"adapter": "a"})
    assert [ref.card.name for ref in adapter_refs(card({}, base))] == [f"/cards/a/{ADAPTER_NAME}"]
    (ref,) = adapter_refs(card({"adapters": [{"checkpoint": "/b.safetensors"}]}, base))
    assert ref.card.name == "/b.safetensors"
    for none in ({"adapter": None}, {"adapters": None}, {"adapters": []}):
        assert adapter_refs(card(none, base)) == ()


def test_the_name_of_an_adapter_has_no_secrets() -> None:
    (ref,) = adapter_refs(card({"adapter": "https://me:pass@h/a.safetensors?token=x"}))
    assert ref.card.name == "https://h/a.safetensors"


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("hg://o/a", "adapters: expected a list"),
        ("[hg://o/a]", r"adapters\[0\]: expected a mapping"),
        ("[{weight: 1}]", r"adapters\[0\].checkpoint: expected a string"),
        ("[{checkpoint: a, weight: x}]", r"adapters\[0\].weight: expected a finite number"),
        ("[{checkpoint: a, weight: .inf}]", r"adapters\[0\].weight: expected"),
        ("[{checkpoint: a, weight: 1e300}]", r"adapters\[0\].weight: expected"),
        ("[{checkpoint: a, weight: true}]", r"adapters\[0\].weight: expected"),
        ("[{checkpoint: a, sha256: 0}]", r"adapters\[0\].sha256: expected 64 hexadecimal digits"),
        ("[{checkpoint: a}, {checkpoint: b, sha: c}]", r"adapters\[1\]: expected the fields"),
    ],
)
def test_a_list_of_another_form_is_a_problem_of_its_file_and_of_its_card(value: str, problem: str) -> None:
    import re

    (found,) = parse(f"name: a\nadapters: {value}\n".encode(), source="file:///cards.yaml").problems
    assert re.search(problem, found)


@pytest.mark.parametrize(
    "fields",
    [
        {"adapter": "a", "adapters": [{"checkpoint": "b"}]},
        {"adapter": 1},
        {"adapter": " "},
        {"adapters": "a"},
        {"adapters": [{}]},
        {"adapters": [{"checkpoint": "a", "weight": float("nan")}]},
    ],
)
def test_a_card_of_another_form_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(AssetCardError, match="adapter"):
        adapter_refs(card(fields))
