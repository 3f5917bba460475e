"""The schema: what the migrations make is what the code knows, on SQLite and on PostgreSQL."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from lading.catalog.check import check_catalog
from lading.catalog.database import connection as engine
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database import target
from lading.catalog.database.objects import SCHEMA_DIGEST, digest_of, objects_of
from lading.catalog.database.target import APPLICATION_ID, SCHEMA_VERSION
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.schema import Row
from lading.catalog.search import is_not_index
from lading.catalog.store import AssetStore
from lading.errors import CatalogError, CatalogOutdatedError
from tests.helpers.catalog_tools import card_file, settings_in

ROOT = Path(__file__).parents[3]
VERSIONS = sorted(f"versions/{path.name}" for path in (ROOT / "migrations" / "versions").glob("[0-9]*.py"))
HEAD = SCHEMA_VERSION
NEXT = HEAD + 1


@pytest.fixture(autouse=True)
def no_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")


def raw(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


def alembic(*arguments: str, url: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env={**os.environ, "LADING_DATABASE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- one schema ------------------------------------------------------------------------------------------------------


def test_the_version_is_the_last_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(files("lading.migrations")))
    script = ScriptDirectory.from_config(config)
    assert script.get_current_head() == f"{SCHEMA_VERSION:04d}"
    assert [r.revision for r in script.walk_revisions()] == [f"{n:04d}" for n in range(SCHEMA_VERSION, 0, -1)]


def test_the_digest_is_that_of_the_migrations(tmp_path: Path) -> None:
    with open_catalog(settings_in(tmp_path)).read() as connection:
        assert digest_of(objects_of(connection)) == SCHEMA_DIGEST


@pytest.mark.few(3)
@pytest.mark.usefixtures("copied_catalogs")
@pytest.mark.parametrize("version", range(HEAD + 1))
def test_the_way_to_a_schema_leaves_no_trace_in_it(tmp_path: Path, version: int) -> None:
    settings = settings_in(tmp_path)
    open_catalog(settings)
    lifecycle.downgrade(settings, str(version))
    lifecycle.upgrade(settings)
    with open_catalog(settings).read() as connection:
        assert digest_of(objects_of(connection)) == SCHEMA_DIGEST


def test_autogenerate_finds_no_difference(tmp_path: Path) -> None:
    opts = {"version_table": lifecycle.VERSION_TABLE, "include_name": is_not_index}
    with open_catalog(settings_in(tmp_path)).read() as connection:
        context = MigrationContext.configure(connection, opts=opts)
        assert compare_metadata(context, Row.metadata) == []


def test_the_rows_would_make_the_same_tables(tmp_path: Path) -> None:
    """What autogenerate does not compare: checks, STRICT, the names of constraints, ON DELETE."""

    def objects(connection: sqlite3.Connection) -> dict[str, list[str]]:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type <> 'view' AND sql IS NOT NULL")
        return {
            name: sorted(line.strip().rstrip(",") for line in sql.splitlines())
            for name, sql in rows
            if name != lifecycle.VERSION_TABLE
        }

    open_catalog(settings_in(tmp_path))
    other = engine.memory_engine()
    with other.begin() as connection:
        Row.metadata.create_all(connection)
        expected = objects(connection.connection.driver_connection)  # type: ignore[arg-type]
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as made:
        assert objects(made) == expected


@pytest.mark.parametrize("table", Row.metadata.sorted_tables, ids=lambda t: t.name)
def test_every_table_is_strict(table: object) -> None:
    sql = str(CreateTable(table).compile(dialect=sqlite.dialect()))  # type: ignore[arg-type]
    assert sql.rstrip().endswith("STRICT")
    assert set(re.findall(r"\b(?:TEXT|INTEGER|BIGINT|VARCHAR|BOOLEAN|NUMERIC|DATETIME)\b", sql)) <= {"TEXT", "INTEGER"}


@pytest.mark.parametrize("table", Row.metadata.sorted_tables, ids=lambda t: t.name)
def test_every_table_compiles_for_postgresql(table: object) -> None:
    sql = str(CreateTable(table).compile(dialect=postgresql.dialect()))  # type: ignore[arg-type]
    assert "json_valid" not in sql
    assert "STRICT" not in sql
    assert " INTEGER" not in sql  # 32 bits there


def test_the_migrations_compile_for_postgresql() -> None:
    sql = alembic("upgrade", "head", "--sql", url="postgresql://host/db")
    assert sql.startswith("BEGIN;")
    assert "CREATE VIEW models AS" in sql
    assert "json_valid" not in sql
    assert "PRAGMA" not in sql
    assert "BIGSERIAL" in sql


@pytest.mark.usefixtures("copied_catalogs")
def test_types_are_enforced(tmp_path: Path) -> None:
    open_catalog(settings_in(tmp_path))
    path = tmp_path / "catalog.sqlite"
    insert = "INSERT INTO sources (uri, kind, imported_at, version, size) VALUES ('u', '{}', 't', 'v', {})"
    with pytest.raises(sqlite3.IntegrityError, match="cannot store TEXT value in INTEGER column"):
        raw(path, insert.format("user", "'many'"))
    with pytest.raises(sqlite3.IntegrityError, match="ck_sources_kind"):
        raw(path, insert.format("gift", 1))
    raw(path, insert.format("user", 2**62))
    with pytest.raises(sqlite3.IntegrityError, match="ck_cards_metadata_is_json"):
        raw(path, "INSERT INTO cards (name, metadata, source_id, position) VALUES ('a', '{', 1, 0)")


@pytest.mark.usefixtures("copied_catalogs")
def test_a_source_that_goes_takes_its_rows(tmp_path: Path) -> None:
    database = open_catalog(settings_in(tmp_path))
    import_files(database, [card_file("name: a\n---\narchitecture: x\nfamily: f\n")])
    with database.write() as connection:
        connection.exec_driver_sql("DELETE FROM sources")
    assert raw(tmp_path / "catalog.sqlite", "SELECT count(*) FROM cards") == [(0,)]
    assert raw(tmp_path / "catalog.sqlite", "SELECT count(*) FROM architectures") == [(0,)]


# --- up and down -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("copied_catalogs")
def test_down_and_up_again(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: a\n")])

    copy = lifecycle.downgrade(settings, "0")
    assert copy is not None
    assert raw(copy, "SELECT name FROM cards") == [("a",)]
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA user_version") == [(0,)]
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert raw(tmp_path / "catalog.sqlite", "SELECT name FROM sqlite_master WHERE type = 'view'") == []
    with pytest.raises(CatalogOutdatedError, match="lading db upgrade"):
        open_catalog(settings)
    assert check_catalog(settings) == [
        f"the schema is of version 0, but this version of lading works with {HEAD}; `lading db upgrade` brings it up "
        "to date"
    ]

    report = lifecycle.upgrade(settings)
    assert (report.from_version, report.to_version) == (0, SCHEMA_VERSION)
    assert AssetStore(open_catalog(settings)).asset_names == set()
    assert check_catalog(settings) == []


def test_upgrade_of_nothing_makes_a_catalog(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "new")
    report = lifecycle.upgrade(settings)
    assert (report.from_version, report.to_version, report.backup) == (0, SCHEMA_VERSION, None)
    assert open_catalog(settings).writable


@pytest.mark.usefixtures("copied_catalogs")
def test_upgrade_of_what_is_up_to_date_does_nothing(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_catalog(settings)
    before = (tmp_path / "catalog.sqlite").read_bytes()
    report = lifecycle.upgrade(settings)
    assert (report.from_version, report.to_version, report.backup) == (
        SCHEMA_VERSION,
        SCHEMA_VERSION,
        None,
    )
    assert (tmp_path / "catalog.sqlite").read_bytes() == before


@pytest.mark.few(3)
@pytest.mark.usefixtures("copied_catalogs")
@pytest.mark.parametrize("version", range(HEAD))
def test_a_version_that_was_forged_back(tmp_path: Path, version: int) -> None:
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: a\n")])
    raw(tmp_path / "catalog.sqlite", f"PRAGMA user_version = {version}")
    with pytest.raises(CatalogOutdatedError, match="lading db upgrade"):
        open_catalog(settings)
    with pytest.raises(CatalogError, match="Run `lading db upgrade` first"):
        lifecycle.downgrade(settings, "0")

    report = lifecycle.upgrade(settings)
    assert (report.from_version, report.to_version) == (version, SCHEMA_VERSION)
    assert AssetStore(open_catalog(settings)).asset_names == {"a"}
    assert check_catalog(settings) == []


@pytest.mark.usefixtures("copied_catalogs")
def test_a_version_that_was_forged_ahead(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: a\n")])
    lifecycle.downgrade(settings, "1")
    raw(tmp_path / "catalog.sqlite", f"PRAGMA user_version = {SCHEMA_VERSION}")
    with pytest.raises(CatalogError, match="is missing"):
        open_catalog(settings)
    assert any("is missing" in line for line in check_catalog(settings))

    lifecycle.upgrade(settings)
    assert AssetStore(open_catalog(settings)).asset_names == {"a"}
    assert check_catalog(settings) == []


@pytest.mark.usefixtures("copied_catalogs")
def test_a_version_that_is_none(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    open_catalog(settings)
    raw(tmp_path / "catalog.sqlite", "UPDATE lading_version SET version_num = 'new'")
    raw(tmp_path / "catalog.sqlite", "PRAGMA user_version = 1")
    with pytest.raises(CatalogError, match="'new' is not a version"):
        lifecycle.upgrade(settings)


def next_version(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Become a future package: one that has another migration, and works with the version behind ours."""
    (folder / "versions").mkdir(parents=True)
    for name in ("env.py", "script.py.mako", *VERSIONS):
        (folder / name).write_text((ROOT / "migrations" / name).read_text())
    (folder / "versions" / f"{NEXT:04d}_more.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\n"
        f"revision = '{NEXT:04d}'\ndown_revision = '{HEAD:04d}'\n{body}"
    )
    monkeypatch.setattr(lifecycle, "files", lambda package: folder)
    for module in (target, lifecycle):
        monkeypatch.setattr(module, "SCHEMA_VERSION", NEXT)


CHANGE = """
def upgrade():
    with op.batch_alter_table('sources') as batch:
        batch.add_column(sa.Column('note', sa.Text()))
        batch.alter_column('version', new_column_name='lading')

def downgrade():
    with op.batch_alter_table('sources') as batch:
        batch.alter_column('lading', new_column_name='version')
        batch.drop_column('note')
"""


@pytest.mark.usefixtures("copied_catalogs")
def test_a_later_schema_keeps_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: a\n---\nname: b\nbase: a\n")])
    next_version(monkeypatch, tmp_path / "50%_migrations", CHANGE)

    with pytest.raises(CatalogOutdatedError, match=f"version {HEAD}, but this version of lading works with {NEXT}"):
        open_catalog(settings)
    report = lifecycle.upgrade(settings)
    assert (report.from_version, report.to_version) == (HEAD, NEXT)
    assert report.backup is not None
    assert raw(report.backup, "PRAGMA user_version") == [(HEAD,)]
    assert raw(report.backup, "PRAGMA journal_mode") == [("delete",)]

    path = tmp_path / "catalog.sqlite"
    assert raw(path, "PRAGMA user_version") == [(NEXT,)]
    assert raw(path, "SELECT note FROM sources") == [(None,)]
    assert raw(path, "SELECT name FROM cards ORDER BY 1") == [("a",), ("b",)]  # a table was dropped that they refer to
    assert raw(path, "PRAGMA foreign_key_check") == []

    lifecycle.downgrade(settings, str(HEAD))
    assert raw(path, "PRAGMA user_version") == [(HEAD,)]
    assert raw(path, "SELECT name FROM cards ORDER BY 1") == [("a",), ("b",)]


def test_a_later_schema_is_made_at_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    next_version(monkeypatch, tmp_path / "migrations", CHANGE.replace("new_column_name='lading'", "nullable=True"))
    database = open_catalog(settings_in(tmp_path))
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT note FROM sources").all() == []
        assert connection.exec_driver_sql("SELECT * FROM models").all() == []
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA user_version") == [(NEXT,)]


@pytest.mark.usefixtures("copied_catalogs")
def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_in(tmp_path)
    open_catalog(settings)
    failing = "def upgrade():\n    op.drop_table('copies')\n    op.execute('SELECT nonsense')\n"
    next_version(monkeypatch, tmp_path / "migrations", failing)

    before = raw(tmp_path / "catalog.sqlite", "SELECT sql FROM sqlite_master")
    with pytest.raises(CatalogError, match="nonsense"):
        lifecycle.upgrade(settings)
    assert raw(tmp_path / "catalog.sqlite", "SELECT sql FROM sqlite_master") == before
    assert raw(tmp_path / "catalog.sqlite", "PRAGMA user_version") == [(HEAD,)]


@pytest.mark.few(2)
@pytest.mark.usefixtures("copied_catalogs")
@pytest.mark.parametrize("to", ["99", "0099", "nonsense", "-1", "base", ""])
def test_downgrade_to_no_version(tmp_path: Path, to: str) -> None:
    open_catalog(settings_in(tmp_path))
    with pytest.raises(CatalogError, match="cannot be brought to version"):
        lifecycle.downgrade(settings_in(tmp_path), to)
    assert check_catalog(settings_in(tmp_path)) == []
    assert len(list(tmp_path.glob("*.sqlite"))) == 1  # a backup is made only of what is about to change


def test_downgrade_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No catalog"):
        lifecycle.downgrade(settings_in(tmp_path), "0")


@pytest.mark.parametrize("door", [lifecycle.upgrade, lifecycle.backup])
def test_a_catalog_in_memory_has_no_life(tmp_path: Path, door: object) -> None:
    with pytest.raises(CatalogError, match="in memory"):
        door(settings_in(tmp_path, database_url="sqlite://"))  # type: ignore[operator]


# --- check -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.usefixtures("copied_catalogs")
@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("DROP VIEW model_shards", "the view model_shards is missing"),
        ("CREATE TABLE mine (a)", "a table mine, which lading did not make"),
        ("DROP INDEX ix_cards_base", "index ix_cards_base is missing"),
        ("ALTER TABLE cards ADD COLUMN extra TEXT", "extra"),
        ("UPDATE cards SET family = NULL WHERE name = 'b'", "the card 'b' has family None, but resolves to 'f'"),
        ("PRAGMA foreign_keys = OFF; DELETE FROM sources", "refers to a missing row of sources"),
    ],
)
def test_check_finds_what_drifted(tmp_path: Path, sql: str, words: str) -> None:
    settings = settings_in(tmp_path)
    import_files(open_catalog(settings), [card_file("name: a\nmodel_family: f\n---\nname: b\nbase: a\n")])
    assert check_catalog(settings) == []
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite")) as connection:
        connection.executescript(sql)
    assert any(words in line for line in check_catalog(settings)), check_catalog(settings)


def test_check_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No catalog"):
        check_catalog(settings_in(tmp_path))


# --- backup ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("copied_catalogs")
def test_backup(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    database = open_catalog(settings)
    import_files(database, [card_file("name: a\n")])

    with database.read():  # in use
        copy = lifecycle.backup(settings)
    assert copy.parent == tmp_path
    assert re.fullmatch(rf"catalog\.v{HEAD}\.\d{{8}}T\d{{6}}\.\d{{6}}Z\.sqlite", copy.name)
    assert raw(copy, "SELECT name FROM cards") == [("a",)]
    assert check_catalog(settings_in(tmp_path, database_url=f"sqlite:///{copy}")) == []

    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert lifecycle.backup(settings, folder).parent == folder
    assert lifecycle.backup(settings, folder / "b.sqlite") == folder / "b.sqlite"
    with pytest.raises(CatalogError, match="exists already"):
        lifecycle.backup(settings, folder / "b.sqlite")
    with pytest.raises(FileNotFoundError):
        lifecycle.backup(settings, tmp_path / "not" / "there.sqlite")
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_backup_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="No catalog exists at"):
        lifecycle.backup(settings_in(tmp_path))


# --- for developers --------------------------------------------------------------------------------------------------


def test_alembic_in_a_checkout(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'dev.sqlite'}"
    alembic("upgrade", "head", url=url)
    assert raw(tmp_path / "dev.sqlite", "PRAGMA user_version") == [(SCHEMA_VERSION,)]
    assert raw(tmp_path / "dev.sqlite", "PRAGMA application_id") == [(APPLICATION_ID,)]
    assert "No new upgrade operations detected." in alembic("check", url=url)
    assert open_catalog(settings_in(tmp_path, database_url=url)).writable
    alembic("downgrade", "base", url=url)
    assert raw(tmp_path / "dev.sqlite", "SELECT name FROM sqlite_master WHERE type = 'table'") == [
        (lifecycle.VERSION_TABLE,)
    ]


def test_the_next_migration_gets_the_next_number(tmp_path: Path) -> None:
    """`alembic revision` writes a file that Python can read; here into a copy of the checkout."""
    checkout = tmp_path / "checkout"
    (checkout / "migrations" / "versions").mkdir(parents=True)
    for name in (
        "alembic.ini",
        "migrations/env.py",
        "migrations/script.py.mako",
        *(f"migrations/{name}" for name in VERSIONS),
    ):
        (checkout / name).write_text((ROOT / name).read_text())
    env = {**os.environ, "LADING_DATABASE_URL": f"sqlite:///{tmp_path / 'dev.sqlite'}"}
    for arguments in (
        ["upgrade", "head"],
        ["revision", "--autogenerate", "-m", "Add what is new"],
        ["upgrade", "head"],
    ):
        subprocess.run(
            [sys.executable, "-m", "alembic", *arguments], cwd=checkout, env=env, check=True, capture_output=True
        )
    (made,) = (checkout / "migrations" / "versions").glob(f"{NEXT:04d}_*.py")
    assert made.name == f"{NEXT:04d}_add_what_is_new.py"
    text = made.read_text()
    compile(text, made.name, "exec")
    assert f'down_revision = "{HEAD:04d}"' in text.replace("'", '"')
    assert raw(tmp_path / "dev.sqlite", "PRAGMA user_version") == [(NEXT,)]
