"""Full-text search over cards: what it finds, and that its index is always in step with them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading.catalog import search
from lading.catalog.check import check_catalog
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.search import MAX_TEXT, fold, fold_fields, phrases, search_text
from lading.catalog.store import AssetStore
from tests.helpers.catalog_tools import card_file, settings_in, without_seeds

Find = Callable[..., list[str]]

CARDS = """\
name: wav2vec2_base_10h
model_family: wav2vec2_asr
model_arch: a
license: apache-2.0
task: speech recognition
---
name: wav2vec2_large
base: wav2vec2_base_10h
description: Sprache in Zürich, 60 Stunden
---
name: qwen3_0.6b
model_family: qwen
model_arch: b
license: MIT
since: 2025
tags: [chat, {more: Überblick}]
stable: true
model_config: {model_dim: 4096, note: hidden}
---
name: qwen3_0.6b_tuned
base: qwen3_0.6b
license: proprietary
---
name: qwen3_0.6b_tuned@user
license: overlaid
---
name: words
tokenizer: hg://somebody/speech-tokenizer
"""


@pytest.fixture
def database(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")
    database = open_catalog(settings_in(tmp_path))
    import_files(database, [card_file(CARDS)])
    return database


@pytest.fixture(scope="module")
def shared_database(shared_databases: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Database:
    """The same catalog, for tests that do not change it."""
    folder = tmp_path_factory.mktemp("shared")
    with without_seeds():
        database = open_catalog(settings_in(folder, database_url=shared_databases(folder)))
    import_files(database, [card_file(CARDS)])
    return database


@pytest.fixture(params=["the index", "the text"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search by the index, and as other databases do it."""
    if request.param == "the text":
        monkeypatch.setattr(search, "found_by_index", search.found_by_text)


@pytest.fixture
def find(database: Database, way: None) -> Find:
    """Names that a search finds."""
    return find_in(database)


@pytest.fixture
def find_shared(shared_database: Database, way: None) -> Find:
    return find_in(shared_database)


def find_in(database: Database) -> Find:
    def names(words: str, *arguments: str, **options: object) -> list[str]:
        return [m.name for m in AssetStore(database).models(*arguments, search=words, **options)]  # type: ignore[arg-type]

    return names


def check(tmp_path: Path) -> list[str]:
    return check_catalog(settings_in(tmp_path))


# --- what is found ---------------------------------------------------------------------------------------------------


WAV = ["wav2vec2_base_10h", "wav2vec2_large"]
QWEN = ["qwen3_0.6b", "qwen3_0.6b_tuned"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("speech 10h", WAV[:1]),
        ("10h speech", WAV[:1]),
        ("speech", WAV),  # inherited
        ("SPEECH Recognition", WAV),
        ("speech stunden", WAV[1:]),  # one word inherited, one its own
        ("zurich", WAV[1:]),
        ("ZÜRICH", WAV[1:]),
        ("Zu\N{COMBINING DIAERESIS}rich", WAV[1:]),
        ("wav2vec2_asr", WAV),
        ("apache-2.0", WAV),
        ("apache 2", WAV),
        ("spe", WAV),  # the beginning of the last word
        ("spe 10h", []),  # but not of others
        ("peech", []),
        ("0.6b", QWEN),
        ("6b.0", []),  # the parts of one word stand in order
        ("qwen3-0-6b", QWEN),
        ("uberblick", QWEN),  # at any depth
        ("2025", QWEN),
        ("mit", QWEN[:1]),  # a field that is overridden is not inherited
        ("proprietary", QWEN[1:]),
        ("overlaid", []),  # which overlays count is a choice of the process
        ("4096", []),
        ("hidden", []),
        ("true", []),
        ("tokenizer", []),  # no model
        ("", sorted(QWEN + WAV)),
        (" \t", sorted(QWEN + WAV)),
        ("nothing of the kind", []),
    ],
)
def test_a_search(find_shared: Find, words: str, names: list[str]) -> None:
    assert find_shared(words) == names


def test_with_other_conditions(find_shared: Find) -> None:
    assert find_shared("speech", include_all=True) == [*WAV, "words"]
    assert find_shared("speech", "*large") == WAV[1:]
    assert find_shared("speech", family="wav2vec2_asr", limit=1) == WAV[:1]
    assert find_shared("speech", family="qwen") == []
    assert find_shared("qwen", status="gated") == find_shared("qwen") == QWEN
    assert find_shared("qwen", status="broken") == []


def test_many_hits(find_shared: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MANY_HITS", 1)
    assert find_shared("speech", limit=1) == WAV[:1]
    assert find_shared("speech", "*large") == WAV[1:]
    assert find_shared("0.6b") == QWEN
    assert find_shared("nothing") == []


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_fold() -> None:
    assert fold("  Qwen3_0.6B--Instruct\0 ") == "qwen3 0 6b instruct"
    assert fold("Größe ﬁx ① naïve 中文模型") == "grosse fix 1 naive 中文模型"
    assert fold("'\"*()_") == ""
    assert phrases("a_b  c ** D") == ["a b", "c", "d"]


@given(st.text())
def test_folding_twice_changes_nothing(text: str) -> None:
    assert fold(fold(text)) == fold(text)


@given(st.text(alphabet=st.characters(categories=["L", "N", "M", "Zs", "P", "Cc"]), max_size=40))
def test_the_index_takes_words_as_they_are(text: str) -> None:
    """Its own tokenizer agrees with what was folded, whatever the script."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE VIRTUAL TABLE t USING fts5(x, tokenize='ascii')")
        connection.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, instance)")
        connection.execute("INSERT INTO t VALUES (?)", (fold(text),))
        words = [word for (word,) in connection.execute("SELECT term FROM v ORDER BY offset")]
    assert words == fold(text).split()


def test_a_long_text_is_cut_between_words() -> None:
    text = search_text("name", {"a": "own " * 2_000}, {"b": "inherited"})
    assert text.startswith("name own ")
    assert len(text) <= MAX_TEXT
    assert set(text.split()) == {"name", "own"}
    assert search_text("name", {"a": "x" * 9_999}, {}) == "name"
    assert search_text("--", {"a": "x" * 9_999}, {}) == ""


def test_what_is_inherited() -> None:
    base = fold_fields({"base": "root", "license": "MIT", "note": None, "model_config": {"x": "y"}})
    assert base == {"license": "mit"}
    assert search_text("a", {"base": "b"}, base) == "a mit"
    assert search_text("a", {"license": None}, base) == "a"


# --- in step ---------------------------------------------------------------------------------------------------------


def test_an_import_that_changes_a_base(find: Find, database: Database, tmp_path: Path) -> None:
    changed = CARDS.replace("speech recognition", "singing").replace("10h\nmodel", "10h\nmore: opera\nmodel")
    import_files(database, [card_file(changed)])
    assert find("singing opera") == WAV
    assert find("speech recognition") == []
    assert check(tmp_path) == []


@pytest.mark.few(1)
def test_an_import_that_renames_and_removes(find: Find, database: Database, tmp_path: Path) -> None:
    import_files(database, [card_file(CARDS.replace("name: wav2vec2_base_10h", "name: other"))])
    assert find("other") == ["other"]
    assert find("speech") == ["other"]  # the base of the second is gone
    assert find("stunden") == ["wav2vec2_large"]
    import_files(database, [card_file("name: other\n")])
    assert find("speech") == find("qwen3") == []
    assert check(tmp_path) == []


def test_a_base_that_comes_later(find: Find, database: Database, tmp_path: Path) -> None:
    import_files(database, [card_file("name: leaf\nbase: mid\n", "file:///c/1.yaml")])
    import_files(database, [card_file("name: mid\nbase: root\n", "file:///c/2.yaml")])
    assert find("marble") == []
    import_files(
        database, [card_file("name: root\nmodel_family: f\nmodel_arch: a\nnote: marble\n", "file:///c/3.yaml")]
    )
    assert find("marble") == ["leaf", "mid", "root"]
    assert check(tmp_path) == []


def test_a_replacement(find: Find, database: Database, tmp_path: Path) -> None:
    other = card_file("name: qwen3_0.6b\nmodel_family: qwen\nmodel_arch: b\nnote: replaced\n", "file:///c/b.yaml")
    import_files(database, [other], replace=True)
    assert find("replaced") == QWEN
    assert find("chat") == []
    assert check(tmp_path) == []


def test_what_is_undone(find: Find, database: Database, tmp_path: Path) -> None:
    changed = card_file(CARDS.replace("speech recognition", "singing"))
    import_files(database, [changed], dry_run=True)
    assert find("singing") == []
    assert find("recognition") == WAV
    assert check(tmp_path) == []


def test_a_source_that_goes_takes_its_words(find: Find, database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("DELETE FROM sources")
    assert find("speech") == []
    import_files(database, [card_file("name: new\nmodel_family: f\n")])  # its row number was another card's
    assert find("speech") == []
    assert find("new") == ["new"]
    assert check(tmp_path) == []


def test_a_bulk(database: Database, tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MANY_NEW", 10)
    for n in range(3):
        text = "".join(f"name: bulk_{n}_{i}\nmodel_family: f\nnote: word{i}\n---\n" for i in range(50))
        import_files(database, [card_file(text.removesuffix("---\n"), f"file:///c/{n}.yaml")])
    assert find("word7") == ["bulk_0_7", "bulk_1_7", "bulk_2_7"]
    assert check(tmp_path) == []


@pytest.mark.few(1)
def test_down_and_up_again(database: Database, tmp_path: Path, find: Find) -> None:
    lifecycle.downgrade(settings_in(tmp_path), "0")
    lifecycle.upgrade(settings_in(tmp_path))
    import_files(open_catalog(settings_in(tmp_path)), [card_file(CARDS)])
    assert find("speech 10h") == WAV[:1]
    assert check(tmp_path) == []


@pytest.mark.parametrize("any_database", ["sqlite"], indirect=True)  # a file
@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("INSERT INTO card_search (card_search) VALUES ('delete-all')", r"search index .* 10h"),
        ("INSERT INTO card_search (rowid, search_text) VALUES (1, 'strange')", "strange, 1 in all"),
        (
            "INSERT INTO card_search (card_search, rowid, search_text) VALUES ('delete', 1, 'speech');"
            "INSERT INTO card_search (rowid, search_text) VALUES (3, 'speech')",
            "speech, 1 in all",
        ),
        ("UPDATE cards SET search_text = 'x' WHERE name = 'words'", "the card 'words' has search_text 'x'"),
        ("DROP TABLE card_search", "table card_search is missing"),
        ("DROP TRIGGER card_search_delete", "trigger card_search_delete is missing"),
    ],
)
def test_check_finds_a_stale_index(database: Database, tmp_path: Path, sql: str, words: str) -> None:
    assert check(tmp_path) == []
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection:
        connection.executescript(sql)
    lines = check(tmp_path)
    assert any(re.search(words, line) for line in lines), lines
