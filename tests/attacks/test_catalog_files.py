"""Damaged catalogs: whatever the bytes are, what comes out is an answer, or an error of lading or of the system."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lading.catalog.check import check_catalog
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.database import migrate as lifecycle
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog, open_catalog_readonly
from lading.catalog.query import run_query as query
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore
from lading.errors import CatalogError, LadingError
from lading.system.settings import Settings
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in

PAGE = 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a catalog that holds something in every table."""
    folder = tmp_path_factory.mktemp("whole")
    database = open_catalog(settings_in(folder))
    cards = "".join(f"name: c{i}\nbase: c{i - 1}\nnote: {'x' * (i * 7)}\n---\n" for i in range(1, 40))
    import_files(database, [card_file(f"name: c0\nmodel_family: qwen\ncheckpoint: hg://a/b\n---\n{cards}name: end\n")])
    manifest = make_manifest(300, 3)
    record_checkpoint(
        database, CheckpointContents(uri="hg://a/b", manifest=manifest, copies=make_copies(manifest, folder))
    )
    return (folder / "catalog.sqlite").read_bytes()


def flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 40)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def flip_in_header(data: bytearray, chance: random.Random) -> None:
    data[chance.randrange(16, 100)] = chance.randrange(256)


def cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data)) :]


def cut_at_page(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(1, len(data) // PAGE) * PAGE :]


def blank(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) // PAGE) * PAGE
    data[at : at + PAGE] = bytes(PAGE)


def swap(data: bytearray, chance: random.Random) -> None:
    a, b = (chance.randrange(1, len(data) // PAGE) * PAGE for _ in range(2))
    data[a : a + PAGE], data[b : b + PAGE] = data[b : b + PAGE], data[a : a + PAGE]


def noise(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data))
    data[at : at + 200] = chance.randbytes(len(data[at : at + 200]))


DOORS: list[Callable[[Settings], object]] = [
    lambda s: AssetStore(open_catalog(s)).models(include_all=True),
    lambda s: AssetStore(open_catalog(s)).retrieve_card("c30").fields(),
    lambda s: [c.name for c in AssetStore(open_catalog(s)).find_cards("model_family", "qwen")],
    lambda s: AssetStore(open_catalog(s)).checkpoint("hg://a/b"),
    lambda s: AssetStore(open_catalog(s)).entries(),
    lambda s: AssetStore(open_catalog(s)).suggest("c3o"),
    lambda s: query(open_catalog(s), "SELECT * FROM model_tensors"),
    lambda s: import_files(open_catalog(s), [card_file("name: c1\nv: 1\n---\nname: new\nbase: c2\n")], replace=True),
    lambda s: record_checkpoint(open_catalog(s), CheckpointContents(uri="hg://a/b", manifest=make_manifest(30))),
    check_catalog,
    lifecycle.upgrade,
    lifecycle.backup,
]


@pytest.mark.few(3)
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 100))])
@pytest.mark.parametrize("damage", [flip, flip_in_header, cut, cut_at_page, blank, swap, noise])
def test_damage(
    tmp_path: Path,
    whole: bytes,
    damage: Callable[[bytearray, random.Random], None],
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")
    data = bytearray(whole)
    damage(data, random.Random(seed))

    for number, door in enumerate(DOORS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "catalog.sqlite").write_bytes(data)
        try:
            door(settings_in(folder))
        except (LadingError, OSError):
            pass
        shutil.rmtree(folder)


@pytest.mark.parametrize("door", DOORS)
def test_a_family_without_a_name(tmp_path: Path, whole: bytes, door: Callable[[Settings], object]) -> None:
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(whole)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "PRAGMA foreign_keys = OFF; DROP TABLE families;"
            "CREATE TABLE families (name TEXT PRIMARY KEY, entry_point TEXT); INSERT INTO families VALUES (NULL, 'x')"
        )
    with suppress(LadingError, OSError):
        door(settings_in(tmp_path))


# --- programs in a catalog that someone else made --------------------------------------------------------------------

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"

PROGRAMS = {
    "trigger": f"CREATE TRIGGER t AFTER INSERT ON families BEGIN DELETE FROM cards WHERE id IN ({ENDLESS} "
    "SELECT i FROM n); END",
    "trigger on update": "CREATE TRIGGER t BEFORE UPDATE ON sources BEGIN DELETE FROM cards; END",
    "trigger of a lading name": "DROP TRIGGER card_search_delete; CREATE TRIGGER card_search_delete AFTER DELETE ON "
    "cards BEGIN DELETE FROM sources; END",
    "view of its own": f"CREATE VIEW v AS {ENDLESS} SELECT i FROM n",
    "view that never ends": f"DROP VIEW models; CREATE VIEW models AS {ENDLESS} SELECT i AS name FROM n",
    "view in the place of a table": "PRAGMA legacy_alter_table = ON; ALTER TABLE families RENAME TO f; "
    "CREATE VIEW families AS SELECT * FROM f; "
    "CREATE TRIGGER t INSTEAD OF INSERT ON families BEGIN DELETE FROM f; END",
    "column that is computed": "ALTER TABLE families ADD COLUMN big INTEGER AS (length(hex(zeroblob(400000000))))",
    "index that computes": "CREATE INDEX i ON cards (length(replace(name, 'a', hex(metadata))))",
    "table": "CREATE TABLE more (a)",
    "name of control characters": 'CREATE TRIGGER "\x1b[2J" AFTER INSERT ON families BEGIN SELECT 1; END',
}


QUICK = {"trigger", "view in the place of a table"}
"""What is put into a catalog of an older version, too."""


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("program", "version"),
    [
        *((program, None) for program in PROGRAMS),
        *(pytest.param(each, "1", marks=[] if each in QUICK else pytest.mark.slow) for each in PROGRAMS),
    ],
)
def test_programs_are_found_before_they_run(tmp_path: Path, whole: bytes, program: str, version: str | None) -> None:
    settings = settings_in(tmp_path)
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(whole)
    if version is not None:
        lifecycle.downgrade(settings, version)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"PRAGMA journal_mode = delete; {PROGRAMS[program]};")
        cards = connection.execute("SELECT count(*) FROM cards").fetchone()
    before = path.read_bytes()

    doors: list[Callable[[Settings], object]] = [
        open_catalog,
        open_catalog_readonly,
        lifecycle.upgrade,
        lambda s: lifecycle.downgrade(s, "0"),
        lambda s: lifecycle.restore(settings_in(tmp_path / "new"), path),
    ]
    for door in doors:
        with pytest.raises(CatalogError) as caught:
            door(settings)
        assert str(caught.value).isprintable()
    if version is None:
        assert any(line.startswith("drift:") for line in check_catalog(settings))
    assert not (tmp_path / "new" / "catalog.sqlite").exists()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = delete")
        assert connection.execute("SELECT count(*) FROM cards").fetchone() == cards
    assert path.read_bytes()[100:] == before[100:]
