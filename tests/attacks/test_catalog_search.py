"""Questions that are no words: a search answers all of them, and none reaches the database as more than words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lading.catalog import search
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.store import AssetStore
from tests.helpers.catalog_tools import card_file, settings_in

NONSENSE = [
    '"', '""', '"""', "'", "''", "*", "**", "a*b*", "-", "--", "- speech", "^speech", "+", "a + b", "(", ")",
    "((", "{a}", "search_text:", "{search_text} : x", "-search_text : x", "rowid:1", "card_search:x", 'a"b',
    'a" OR "b', "a' OR '1'='1", "AND", "OR", "NOT", "NEAR", "AND AND", "NOT NOT", "NEAR(a b)",
    "NEAR(a, 1000000000)", "a AND", "OR b", "\0", "a\0b", "\0\0\0", "%", "_", "\\", "a%b", "%%%", "[a-z]", "?",
    ":name", "$1", "@x", "#", "; DROP TABLE cards", "/*", "*/", "-- x", "\udc80", "half \udc80 pair", "\ufeff",
    "\u200b", "\u202e", "\U0010ffff", "\uffff", "\N{COMBINING ACUTE ACCENT}", "中文", "🙂", "İ", "ǅ", "ﷺ" * 500,
    "delete", "rebuild", "integrity-check", "optimize",
]  # fmt: skip

LONG = ["x" * 1_000_000, "x " * 20_000, "x-" * 20_000, '"' * 100_000, "(" * 100_000, "a b " * 5_000, "* " * 50_000]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AssetStore:
    folder = tmp_path_factory.mktemp("catalog")
    (folder / "seeds").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "files", lambda package: folder / "seeds")
        database = open_catalog(settings_in(folder))
    import_files(database, [card_file("name: speech\nmodel_family: f\nnote: near and or not\n")])
    return AssetStore(database)


@pytest.fixture(params=["the index", "the text", "many hits"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to answer."""
    if request.param == "the text":
        monkeypatch.setattr(search, "found_by_index", search.found_by_text)
        monkeypatch.setattr(search, "_MOST_CONDITIONS", 0)
    elif request.param == "many hits":
        monkeypatch.setattr(search, "_MANY_HITS", 1)


@pytest.mark.few(60)
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("words", NONSENSE, ids=ascii)
def test_nonsense(store: AssetStore, words: str) -> None:
    assert {m.name for m in store.models(search=words)} <= {"speech"}
    assert {m.name for m in store.models(search=f"{words} speech")} <= {"speech"}
    assert {m.name for m in store.models("s*", search=f"speech {words}", status="gated", limit=3)} <= {"speech"}


@pytest.mark.parametrize("words", LONG, ids=lambda words: f"{words[:2]!r} times {len(words)}")
def test_long_questions(store: AssetStore, words: str) -> None:
    assert store.models(search=words) == []


@given(st.text(alphabet=st.characters()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text(store: AssetStore, words: str) -> None:
    assert {m.name for m in store.models(search=words)} <= {"speech"}


@pytest.mark.parametrize("words", ["near", "AND", "not or", '"near and"', "NEAR(and)", "note: near"])
def test_operators_are_words(store: AssetStore, words: str) -> None:
    assert len(store.models(search=words)) == (0 if "note" in words else 1)


def test_a_card_of_nonsense(tmp_path: Path, store: AssetStore) -> None:
    """What is hard to ask is no easier to keep."""
    fields = "\n".join(f"f{i}: {text!a}" for i, text in enumerate(NONSENSE) if text.isprintable() and "'" not in text)
    import_files(store.database, [card_file(f"name: odd\nmodel_family: f\n{fields}\n", "file:///c/odd.yaml")])
    assert [m.name for m in store.models(search="rebuild integrity")] == ["odd"]
