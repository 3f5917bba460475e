"""The number of parameters of models whose checkpoint is not known: that which their card states."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import update

from lading.catalog.import_cards import import_files
from lading.catalog.open import open_catalog
from lading.catalog.schema import CardRow
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import CardFileError
from lading.families.hg import HuggingFaceModelConfig
from lading.families.qwen import QWEN_3_JSON
from lading.models.family import get_family
from lading.models.resolve import model_config
from lading.models.shapes import count_parameters
from tests.helpers.catalog_tools import card_file, settings_in, without_seeds
from tests.helpers.seed_counts import OF_TRANSFORMERS, counts


@pytest.fixture
def store(home: Path) -> AssetStore:
    return get_asset_store()


def test_the_cards_of_the_package_state_those_of_their_models(store: AssetStore) -> None:
    """If they do not: ``python -m tests.helpers.seed_counts`` writes them."""
    stated = {model.name: model.parameters for model in store.models()}
    found = counts()
    assert {name: stated[name] for name in found} == found
    assert None not in stated.values()


@pytest.mark.parametrize(("name", "same"), OF_TRANSFORMERS.items())
def test_those_of_transformers_are_those_of_the_same_repository(store: AssetStore, name: str, same: str) -> None:
    card = store.retrieve_card(same)
    config = model_config(card, get_family("qwen"), store)
    hub = HuggingFaceModelConfig(model_type="causal_lm", hf_config=dict(QWEN_3_JSON.write(config)))
    uris = {store.retrieve_card(each).field("checkpoint").as_uri().lower() for each in (name, same)}
    assert len(uris) == 1
    assert count_parameters(get_family("hg"), hub) == count_parameters(get_family("qwen"), config)


def test_what_a_card_states_is_listed(any_database: str, tmp_path: Path) -> None:
    with without_seeds():
        database = open_catalog(settings_in(tmp_path))
    cards = "".join(
        f'{{"name": "{name}", "model_family": "qwen"{more}}}\n'
        for name, more in {
            "small": ', "model_arch": "qwen3_0.6b", "parameters": 1000',
            "large": f', "parameters": {10**18 - 1}',
            "none": "",
            "null": ', "parameters": null',
            "child": ', "base": "small", "checkpoint": "hg://a/b"',
        }.items()
    )
    import_files(database, [card_file(cards, "file:///c/a.jsonl")])
    store = AssetStore(database)
    stated = {model.name: model.parameters for model in store.models()}
    assert stated == {"small": 1000, "large": 10**18 - 1, "none": None, "null": None, "child": None}
    # A size that is not known is that of 16-bit weights.
    assert [model.name for model in store.models(max_bytes=2000)] == ["small"]
    assert [model.name for model in store.models(min_bytes=2000, max_bytes=2001)] == ["small"]
    assert store.models(max_bytes=1999) == []
    assert {model.bytes for model in store.models()} == {None}


@pytest.mark.few(5)
@pytest.mark.parametrize("value", ["-1", "0", "1.5", "true", '"7B"', "[1]", str(10**18)])
def test_a_card_that_states_no_number(any_database: str, tmp_path: Path, value: str) -> None:
    """Of an import now it is refused; a row of an earlier version states nothing."""
    with without_seeds():
        database = open_catalog(settings_in(tmp_path))
    text = f'{{"name": "odd", "model_family": "qwen", "parameters": {value}}}\n'
    with pytest.raises(CardFileError, match=r"\.parameters: expected a positive integer below"):
        import_files(database, [card_file(text, "file:///c/a.jsonl")])

    import_files(database, [card_file('{"name": "odd", "model_family": "qwen"}\n', "file:///c/a.jsonl")])
    with database.write() as connection:
        connection.execute(update(CardRow).values(metadata_=f'{{"model_family": "qwen", "parameters": {value}}}'))
    (model,) = AssetStore(database).models()
    assert not isinstance(model.parameters, str)
