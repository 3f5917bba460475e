"""Cards of lading's own: written with what their checkpoints hold, and changed in place; in both kinds of database."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lading.catalog import edit_cards
from lading.catalog.added_cards import card_entry, record_additions
from lading.catalog.check import check_catalog
from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore
from lading.errors import AssetCardError, CardFileError, PolicyError
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in


@pytest.fixture
def database(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")
    return open_catalog(settings_in(tmp_path))


def contents(path: Path, *, moved_from: str | None = None) -> CheckpointContents:
    manifest = make_manifest()
    return CheckpointContents(
        uri=f"file://{path}", manifest=manifest, copies=make_copies(manifest, path), moved_from=moved_from
    )


def metadata(database: Database, name: str) -> dict[str, object]:
    return dict(AssetStore(database).retrieve_card(name).metadata)


def linked(database: Database) -> dict[str, str]:
    """The checkpoint that each card is linked to."""
    with database.read() as connection:
        rows = connection.exec_driver_sql(
            "SELECT cards.name, checkpoints.uri FROM card_checkpoints "
            "JOIN cards ON cards.id = card_id JOIN checkpoints ON checkpoints.id = checkpoint_id"
        )
        return dict(map(tuple, rows))


def test_cards_and_contents_are_written_together(database: Database, tmp_path: Path) -> None:
    paths = [tmp_path / "x" / name for name in ("ä b", "c%_d")]
    entries = [card_entry(path.name, {"model_family": "qwen", "checkpoint": str(path)}) for path in paths]

    report = record_additions(database, entries, [contents(path) for path in paths])

    assert report.added == ("c%_d", "ä b")
    assert linked(database) == {path.name: f"file://{path}" for path in paths}
    assert record_additions(database, entries[1:], []).unchanged == ("c%_d",)
    changed = card_entry("c%_d", {"model_family": "llama", "checkpoint": str(paths[1])})
    assert record_additions(database, [changed], []).changed == ("c%_d",)
    assert [entry.name for entry in AssetStore(database).entries()[0]] == ["ä b", "c%_d"], "each keeps its place"
    assert check_catalog(database.settings) == []


def test_a_name_of_another_source_stops_all(database: Database, tmp_path: Path) -> None:
    import_files(database, [card_file("name: taken\n")])
    entries = [card_entry(name, {"model_family": "qwen"}) for name in ("free", "taken")]

    with pytest.raises(CardFileError, match="taken"):
        record_additions(database, entries, [contents(tmp_path / "free")])

    assert AssetStore(database).asset_names == {"taken"}
    assert AssetStore(database).checkpoint(f"file://{tmp_path / 'free'}") is None


@pytest.mark.parametrize(
    ("name", "fields", "error"),
    [
        ("", {}, CardFileError),
        (" ", {}, CardFileError),
        ("a@b", {}, CardFileError),
        ("a\nb", {}, CardFileError),
        ("\udcff", {}, CardFileError),
        ("x" * 201, {}, CardFileError),
        ("a", {"license": 5}, CardFileError),
        ("a", {"note": "\udcff"}, CardFileError),
        ("a", {"": 1}, CardFileError),
        ("a", {"n": 2**70}, CardFileError),
        ("a", {"base": "x@y"}, CardFileError),
        ("a", {"note": {1}}, TypeError),
        ("a", {"note": float("inf")}, TypeError),
    ],
)
def test_what_no_card_file_could_state(name: str, fields: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        card_entry(name, fields)


def test_values_are_those_of_a_card_file() -> None:
    fields = {"a": [1, {"b": None}], "c": "no", "d": 1e-5, "e": "1", "f": True, "g": "ü\n", "h": {}}
    assert dict(card_entry(" x ", fields).metadata) == fields
    assert card_entry(" x ", fields).name == "x"


def test_changes_in_place(database: Database, tmp_path: Path) -> None:
    old, new = tmp_path / "o_d%", tmp_path / "new"
    record_additions(
        database,
        [
            card_entry("a", {"model_family": "qwen", "checkpoint": str(old / "a")}),
            card_entry("child", {"base": "a", "adapters": [{"checkpoint": str(old / "l")}, {"checkpoint": "hg://o/l"}]}),
            card_entry("grandchild", {"base": "child"}),
            card_entry("near", {"checkpoint": f"{old}2/a", "note": str(old)}),
        ],
        [contents(old / "a")],
    )  # fmt: skip

    changes = edit_cards.relocate_cards(
        database, old, new, [contents(new / "a", moved_from=f"file://{old / 'a'}")], dry_run=False
    )
    assert [(change.card, change.field, change.after) for change in changes] == [
        ("a", "checkpoint", str(new / "a")),
        ("child", "adapters[0].checkpoint", str(new / "l")),
    ]
    assert linked(database) == dict.fromkeys(["a", "child", "grandchild"], f"file://{new / 'a'}")
    assert metadata(database, "near") == {"checkpoint": f"{old}2/a", "note": str(old)}

    edit_cards.rename_card("a", "A", store=AssetStore(database))
    assert metadata(database, "child")["base"] == "A"
    assert AssetStore(database).retrieve_card("grandchild").field("model_family").value == "qwen"
    assert linked(database).keys() == {"A", "child", "grandchild"}
    with pytest.raises(AssetCardError):
        edit_cards.rename_card("A", "child", store=AssetStore(database))

    with pytest.raises(PolicyError, match="grandchild"):
        edit_cards.remove_cards("A", "child", store=AssetStore(database))
    edit_cards.remove_cards("A", "child", "grandchild", store=AssetStore(database))
    assert AssetStore(database).asset_names == {"near"}
    assert check_catalog(database.settings) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda database, path: edit_cards.remove_cards("a", dry_run=True, store=AssetStore(database)),
        lambda database, path: edit_cards.rename_card("a", "b", dry_run=True, store=AssetStore(database)),
        lambda database, path: edit_cards.relocate_cards(database, path, path.parent, [], dry_run=True),
    ],
)
def test_a_dry_run_needs_no_right_to_write(
    database: Database, tmp_path: Path, change: Callable[[Database, Path], list[object]]
) -> None:
    entry = card_entry("a", {"model_family": "qwen", "checkpoint": str(tmp_path / "a")})
    record_additions(database, [entry], [])
    database.writable = False

    assert len(change(database, tmp_path / "a")) == 1

    assert metadata(database, "a")["checkpoint"] == str(tmp_path / "a")
