"""Ways out of read-only SQL, and ways past its deadline."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.query import _FUNCTIONS, MAX_VALUE_BYTES
from lading.catalog.query import run_query as query
from lading.errors import CatalogError, LadingError, PolicyError, QueryError
from tests.helpers.catalog_tools import card_file, settings_in


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder without cards, in the place of the package's."""
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refresh, "files", lambda package: folder)
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, seeds: Path) -> bytes:
    """The bytes of a catalog with one card."""
    folder = tmp_path_factory.mktemp("made")
    import_files(open_catalog(settings_in(folder)), [card_file("name: a\nmodel_family: qwen\n")])
    return (folder / "catalog.sqlite").read_bytes()


@pytest.fixture
def database(tmp_path: Path, made: bytes, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "catalog.sqlite").write_bytes(made)
    monkeypatch.chdir(tmp_path)
    return open_catalog(settings_in(tmp_path))


def state(folder: Path) -> dict[str, bytes]:
    """All files but the shared memory and the empty log, which even a reader needs."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".sqlite-shm"]
    return {p.name: data for p in files if (data := p.read_bytes()) or p.suffix != ".sqlite-wal"}


# --- writing ---------------------------------------------------------------------------------------------------------


WRITES = """\
INSERT INTO families (name) VALUES ('x')
INSERT INTO families (name) VALUES ('x') RETURNING name
REPLACE INTO families (name) VALUES ('x')
UPDATE cards SET name = 'x'
DELETE FROM cards
WITH x AS (SELECT 1) DELETE FROM cards
WITH x AS (SELECT 1) INSERT INTO families (name) SELECT 'x' FROM x RETURNING *
EXPLAIN DELETE FROM cards
CREATE TABLE x (y)
CREATE TABLE x AS SELECT 1
CREATE TEMP TABLE x (y)
CREATE TEMP TABLE x AS SELECT * FROM cards
CREATE VIEW x AS SELECT 1
CREATE TEMP VIEW x AS SELECT 1
CREATE INDEX x ON cards (name)
CREATE TRIGGER x AFTER INSERT ON cards BEGIN SELECT 1; END
CREATE TEMP TRIGGER x AFTER INSERT ON cards BEGIN SELECT 1; END
CREATE VIRTUAL TABLE x USING fts5(y)
CREATE VIRTUAL TABLE temp.x USING fts5(y)
CREATE VIRTUAL TABLE x USING rtree(a, b, c)
ALTER TABLE cards ADD COLUMN x
ALTER TABLE cards RENAME TO x
DROP TABLE cards
DROP VIEW models
DROP INDEX ix_cards_base
ATTACH 'other.sqlite' AS other
ATTACH ':memory:' AS other
ATTACH 'file:other.sqlite?mode=rwc' AS other
DETACH main
VACUUM
VACUUM INTO 'other.sqlite'
VACUUM main INTO 'file:other.sqlite'
REINDEX
ANALYZE
BEGIN
BEGIN IMMEDIATE
COMMIT
ROLLBACK
SAVEPOINT x
RELEASE x
PRAGMA writable_schema = ON
PRAGMA journal_mode = DELETE
PRAGMA user_version = 7
PRAGMA user_version
PRAGMA table_info(cards)
PRAGMA query_only = OFF
PRAGMA temp_store_directory = '/tmp'
PRAGMA wal_checkpoint(TRUNCATE)
PRAGMA hard_heap_limit = 1
PRAGMA trusted_schema = ON
SELECT load_extension('/tmp/x.so')
SELECT load_extension('/tmp/x.so', 'entry')
SELECT fts3_tokenizer('simple')
SELECT fts3_tokenizer('x', x'0000000000000000')
SELECT "load_extension"('x')
SELECT LOAD_EXTENSION('x')
SELECT * FROM pragma_table_info('cards')
SELECT * FROM pragma_user_version
SELECT * FROM pragma_journal_mode('delete')
SELECT * FROM dbstat
SELECT * FROM sqlite_stmt
SELECT sqlite_compileoption_get(1)
SELECT randomblob(10)
SELECT zeroblob(10)
SELECT json_patch('{}', '{}')
SELECT printf('%.*c', 100000000, 'x')
SELECT format('%.*c', 100000000, 'x')
SELECT 1; SELECT 2
SELECT 1; DELETE FROM cards
SELECT 1; ATTACH 'other.sqlite' AS other
/* SELECT */ DELETE FROM cards
""".splitlines()


@pytest.mark.parametrize("sql", [*WRITES, "-- SELECT\nDELETE FROM cards", "SELECT 1;\nDELETE FROM cards;"])
def test_it_only_reads(tmp_path: Path, database: Database, sql: str) -> None:
    before = state(tmp_path)
    with pytest.raises(PolicyError, match=r"only reads.*refused"):
        query(database, sql)
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "sql", ["DROP TABLE cards", "-- so\n drop view models", "/* so */ DELETE FROM cards", "CREATE TABLE x (y)"]
)
def test_the_error_for_a_write_says_so(database: Database, sql: str) -> None:
    with pytest.raises(PolicyError, match=r"would write \((DROP|DELETE|CREATE)\)"):
        query(database, sql)


@pytest.mark.parametrize("sql", ["PRAGMA table_info(models)", "PRAGMA user_version = 7"])
def test_a_pragma_is_refused_with_the_way_to_ask_for_columns(database: Database, sql: str) -> None:
    with pytest.raises(PolicyError, match=r"PRAGMA is refused.*`lading sql --schema`"):
        query(database, sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT writefile('x', 'y')",
        "SELECT readfile('/etc/passwd')",
        "SELECT edit('x')",
        "SELECT eval('DELETE FROM cards')",
        "SELECT * FROM fsdir('/')",
        "SELECT * FROM generate_series(1, 10)",
        "SELECT * FROM zipfile('x')",
        "SELECT * FROM csv('x')",
        ".shell touch x",
        "SELECT sqlite_dbpage FROM sqlite_dbpage",
        "SELECT * FROM main.json_each('[]'), temp.x",
    ],
)
def test_what_other_shells_have(tmp_path: Path, database: Database, sql: str) -> None:
    before = state(tmp_path)
    with pytest.raises((QueryError, PolicyError)):
        query(database, sql)
    assert state(tmp_path) == before


def test_no_function_has_side_effects() -> None:
    """What a newer SQLite brings is refused until it stands in the list."""
    refused = (
        "load_extension fts3_tokenizer sqlite_log rtreecheck optimize randomblob zeroblob printf format json_patch"
    )
    assert not set(refused.split()) & _FUNCTIONS


def test_a_value_that_looks_like_sql(database: Database) -> None:
    with pytest.raises(QueryError, match="syntax error"):
        query(database, "SELECT * FROM :table", {"table": "cards; DROP TABLE cards"})


# --- time ------------------------------------------------------------------------------------------------------------


def late(database: Database, sql: str, parameters: dict[str, object] | None = None, *, deadline_s: float = 0.3) -> None:
    """The query ends soon after its deadline, whatever its end is."""
    start = time.monotonic()
    with pytest.raises(LadingError):
        query(database, sql, parameters, deadline_s=deadline_s)
    assert time.monotonic() - start < deadline_s + 5


NUMBERS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "sql",
    [
        NUMBERS + "SELECT count(*) FROM n",
        NUMBERS + "SELECT i FROM n",
        NUMBERS + "SELECT DISTINCT i % 7 FROM n",
        NUMBERS + "SELECT i FROM n ORDER BY -i",
        NUMBERS + "SELECT a.i FROM n a JOIN n b ON a.i = b.i + 1",
        NUMBERS + "SELECT sum(i) OVER (ORDER BY i DESC) FROM n",
        NUMBERS + "SELECT * FROM models WHERE (SELECT max(i) FROM n) > 0",
        "SELECT count(*) FROM " + ", ".join(f"sqlite_master t{i}" for i in range(8)),
    ],
)
def test_a_query_without_end(database: Database, sql: str) -> None:
    late(database, sql)


def test_the_error_states_the_deadline(database: Database) -> None:
    with pytest.raises(CatalogError, match=r"stopped after 0\.2 s.*--deadline"):
        query(database, NUMBERS + "SELECT count(*) FROM n", deadline_s=0.2)


LONG = {"a": "a" * (MAX_VALUE_BYTES - 10), "half": "a" * (MAX_VALUE_BYTES // 2) + "b"}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "expression",
    [
        "instr(:a, :half)",
        "replace(:a, :half, 'c')",
        ":a LIKE '%a%a%a%a%a%a%a%a%b'",
        ":a LIKE '%' || substr(:a, 1, 190) || 'b'",
        ":a GLOB '*a*a*a*a*a*a*a*b'",
        ":a GLOB '*[a-z]*[a-z]*[a-z]*[a-z]b'",
        "json_extract('[' || substr(replace(substr(:a, 1, 40000), 'a', '1,'), 1, 79999) || ']', '$[39999]')",
    ],
)
def test_a_long_step_in_a_query_without_end(database: Database, expression: str) -> None:
    """A hundred of them lie between two looks at the clock; each is quick, as its arguments are short."""
    sql = NUMBERS + f"SELECT count({expression}) FROM n WHERE {expression} IS NOT i"
    names = {name: value for name, value in LONG.items() if f":{name}" in sql}
    late(database, sql, names)  # type: ignore[arg-type]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    "sql",
    [
        "SELECT hex(:a)",
        "SELECT quote(replace(:a, 'a', ''''))",
        "SELECT replace(:a, 'a', :a)",
        "SELECT json_group_array(:a) FROM sqlite_master",
        "SELECT group_concat(:a) FROM sqlite_master",
        "SELECT :a || :a",
        NUMBERS + "SELECT group_concat(i) FROM n",
        "WITH RECURSIVE n(s) AS (SELECT 'x' UNION ALL SELECT s || s FROM n) SELECT count(*) FROM n",
    ],
)
def test_values_without_end(database: Database, sql: str) -> None:
    late(database, sql, {"a": LONG["a"]}, deadline_s=2)


def test_the_error_for_a_long_value_says_so(database: Database) -> None:
    with pytest.raises(QueryError, match=r"longer than 200,000 bytes.*substr"):
        query(database, "SELECT :a || :a", {"a": LONG["a"]})


def test_a_pattern_that_takes_long_to_match(database: Database) -> None:
    with pytest.raises(QueryError, match="pattern too complex"):
        query(database, "SELECT 'a' LIKE :p", {"p": "%a" * 1000})


# --- the compiler ----------------------------------------------------------------------------------------------------


def doubling(n: int, body: str, hint: str = "") -> str:
    tables = [f"t{i} AS {hint} ({body.format(before=f't{i - 1}')})" for i in range(1, n + 1)]
    return f"WITH t0(x) AS (SELECT 1), {', '.join(tables)} SELECT count(*) FROM t{n}"


def test_a_query_in_many_steps_is_no_attack(database: Database) -> None:
    sql = doubling(12, "SELECT x FROM {before} UNION ALL SELECT x FROM {before}")
    assert query(database, sql).rows == [(4096,)]

    tables = [
        f"m{i} AS (SELECT m{i - 1}.name, m{i - 1}.status FROM m{i - 1} WHERE m{i - 1}.name <> 'x')"
        for i in range(1, 30)
    ]
    sql = f"WITH m0 AS (SELECT models.name, models.status FROM models), {', '.join(tables)} SELECT m29.name FROM m29"
    assert query(database, sql).rows == [("a",)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT " + "(" * 5000 + "1" + ")" * 5000,
        "SELECT " + "+".join("1" * 1 for _ in range(5000)),
        " UNION ALL ".join(["SELECT 1"] * 5000),
        "SELECT * FROM " + ", ".join(f"cards c{i}" for i in range(70)),
        "SELECT " + ", ".join(f"{i}" for i in range(5000)),
        "SELECT '" + "x" * 1_000_000 + "'",
    ],
    ids=["deep", "long", "compound", "join", "columns", "text"],
)
def test_queries_that_are_too_big(database: Database, sql: str) -> None:
    late(database, sql, deadline_s=2)


def test_the_biggest_join_compiles_in_time(database: Database) -> None:
    start = time.monotonic()
    joins = ", ".join(f"cards c{i}" for i in range(60))
    where = " AND ".join(f"c{i}.name = c{i + 1}.name" for i in range(59))
    query(database, f"SELECT 1 FROM {joins} WHERE {where}", deadline_s=5)
    assert time.monotonic() - start < 10


def test_the_fences_stand_alone(tmp_path: Path, database: Database) -> None:
    """The file itself is opened read-only: an authorizer that lets something through is not the last fence."""
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        from_engine(database).execute("DELETE FROM cards")


def from_engine(database: Database) -> sqlite3.Connection:
    from lading.catalog.query import _reader

    return _reader(database)
