"""Lists: patterns of names, and that a large catalog is not read from end to end."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lading.catalog import search
from lading.catalog.import_cards import import_files
from lading.catalog.open import open_catalog
from lading.catalog.query import query
from lading.catalog.store import AssetStore
from tests.helpers.catalog_tools import card_file, settings_in, without_seeds

NAMES = [
    "a", "ab", "abc", "aB", "Ab", "b", "qwen3", "Qwen3", "qweo", "qwem", "ü", "üb", "ýz", "힣", "힣z", "🙂", "🙂z",
    "a_b", "a%b", "a.b", "zz",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AssetStore:
    """A catalog that all tests may ask, and none may change."""
    return store_in(tmp_path_factory.mktemp("shared"))


def store_in(folder: Path) -> AssetStore:
    with without_seeds():
        database = open_catalog(settings_in(folder))
    cards = "".join(f'{{"name": "{name}", "model_family": "qwen", "note": "speech"}}\n' for name in NAMES)
    import_files(database, [card_file(cards, "file:///c/a.jsonl")])
    return AssetStore(database)


@pytest.mark.parametrize(
    "pattern",
    ["*", "?", "a*", "ab*", "A*", "qwen*", "q\U0010ffff*", "\U0010ffff*", "\U0010ffff\U0010ffff*", "\ud7ff*", "\ue000*",
     "ü*", "힣*", "🙂*", "a\ud7ff*", "a_*", "a%*", "a[bB]*", "[aq]*", "ab", "*b", "a?b", "none*", "qwen3"],
    ids=ascii,
)  # fmt: skip
def test_a_pattern(store: AssetStore, pattern: str) -> None:
    found = [m.name for m in store.models(pattern)]
    assert found == sorted(name for name in NAMES if fnmatchcase(name, pattern))


@pytest.mark.parametrize(
    ("question", "step"),
    [
        ({"pattern": "qwen*"}, "(name>? AND name<?)"),
        ({"pattern": "qwen3"}, "(name=? AND env=?)"),
        ({"family": "qwen"}, "USING INDEX ix_cards_family (family=?)"),
        ({"status": "gated"}, "SCAN c USING INDEX"),
        ({"search": "speech"}, "VIRTUAL TABLE INDEX"),
        ({}, "SCAN c USING INDEX"),
    ],
)
def test_no_list_sorts_or_scans(
    store: AssetStore, monkeypatch: pytest.MonkeyPatch, question: dict[str, str], step: str
) -> None:
    plan = plan_of(store, "FROM assets", lambda: store.models(**question))  # type: ignore[arg-type]
    assert any(step in line for line in plan), plan
    assert "ORDER BY" not in plan[-1] or "name=?" in step, plan


def plan_of(store: AssetStore, part: str, ask: Callable[[], object]) -> list[str]:
    """How SQLite answers the one statement with this part."""
    asked = []

    def remember(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        if part in statement:
            asked.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", remember)
    try:
        ask()
    finally:
        event.remove(Engine, "before_cursor_execute", remember)

    ((statement, parameters),) = asked
    with store.database.read() as connection:
        return [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]


def test_content_is_found_by_indexes_alone(store: AssetStore) -> None:
    plan = plan_of(store, "FROM copies", lambda: store.find_content("0" * 64))
    assert not any("SCAN" in line for line in plan), plan


def test_where_all_are_hits_the_text_is_read_in_the_order_of_the_list(
    store: AssetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_MANY_HITS", 2)
    monkeypatch.setattr(search, "found_by_index", None)
    assert [m.name for m in store.models(search="speech", limit=2)] == sorted(NAMES)[:2]


def test_a_status_that_an_overlay_changes(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    overlay = f"name: abc@user\ncheckpoint: {tmp_path}\n---\nname: b@user\ncheckpoint: /nowhere/at/all\n"
    import_files(store.database, [card_file(overlay, "file:///c/b.yaml")])
    assert [m.name for m in store.models(status="ready")] == ["abc"]
    assert [m.name for m in store.models(status="broken")] == ["b"]
    assert {m.name for m in store.models(status="gated")} == set(NAMES) - {"abc", "b"}


def test_a_card_that_only_serves_as_a_base(any_database: str, tmp_path: Path) -> None:
    """It is no model until it has numbers or weights of its own, or nothing is based on it."""
    with without_seeds():
        database = open_catalog(settings_in(tmp_path))
    cards = """\
name: recipe
model_family: qwen
---
name: chat_recipe
base: recipe
---
name: with_arch
base: chat_recipe
model_arch: qwen3_0.6b
---
name: with_checkpoint
base: chat_recipe
checkpoint: hg://a/b
---
name: leaf
base: with_arch
---
name: alone
model_family: qwen
"""
    import_files(database, [card_file(cards, "file:///c/a.yaml")])
    store = AssetStore(database)
    models = ["alone", "leaf", "with_arch", "with_checkpoint"]
    assert [model.name for model in store.models()] == models
    assert [model.name for model in store.models("*recipe")] == []
    assert [row[0] for row in query("SELECT name FROM models ORDER BY name", store=store).rows] == models
    assert [model.name for model in store.models("*recipe", include_all=True)] == ["chat_recipe", "recipe"]
    assert store.suggest("recipee") == []

    overlay = "name: chat_recipe@user\ncheckpoint: hg://a/c\n"
    import_files(database, [card_file(overlay, "file:///c/b.yaml")])
    assert [model.name for model in store.models("*recipe")] == ["chat_recipe"]
