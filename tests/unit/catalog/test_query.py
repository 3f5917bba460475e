"""SQL over the catalog: what it answers, and that the documented queries do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lading.catalog import query as reading
from lading.catalog.checkpoints.record import record_checkpoint, record_files
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database.database import Database
from lading.catalog.import_cards import import_files
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query as query
from lading.catalog.query import view_columns
from lading.catalog.records import Check, CheckpointContents
from lading.catalog.schema import Row
from lading.errors import CatalogError, PolicyError, QueryError
from lading.system.uris import path_uri
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in, without_seeds

DOCUMENT = (Path(__file__).parents[3] / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
DOCUMENTED = re.findall(r"^```sql\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)

CARDS = """\
name: base
model_family: qwen
model_config: {max_seq_len: 10}
tokenizer: hg://a/words
---
name: m
base: base
checkpoint: hg://a/m
license: mit
---
name: n
base: base
checkpoint: hg://a/n
---
name: broken
base: gone
---
architecture: big
family: qwen
config: {num_layers: 48}
"""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """A catalog that all tests may ask, and none may change."""
    folder = tmp_path_factory.mktemp("shared")
    with without_seeds():
        database = open_catalog(settings_in(folder))
    import_files(database, [card_file(CARDS)])
    for name in ("m", "n"):
        manifest = make_manifest()
        copies = make_copies(manifest, folder) if name == "m" else []
        record_checkpoint(database, CheckpointContents(uri=f"hg://a/{name}", manifest=manifest, copies=copies))
    record_checkpoint(
        database, CheckpointContents(uri=path_uri(folder), manifest=manifest, copies=make_copies(manifest, folder))
    )
    copy = make_copies(manifest, folder)[0]
    for found in ("aa", "bb"):
        check = Check(file=copy.file, path=copy.path, stat=copy.stat, method="sha256", expected="aa", found=found)
        record_files(database, uri="hg://a/m", checks=[check])
    return database


# --- the documentation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sql", DOCUMENTED, ids=range(len(DOCUMENTED)))
def test_every_documented_query_answers(database: Database, sql: str) -> None:
    parameters = {"model": "n" if "local_path IS NULL" in sql else "m"} if ":model" in sql else {}
    result = query(database, sql, parameters)
    assert result.rows or "% 8" in sql  # no tensor of the example is that odd
    assert not result.truncated


def test_there_are_documented_queries() -> None:
    assert len(DOCUMENTED) >= 10


@pytest.mark.parametrize("view", ["models", "model_tensors", "model_shards"])
def test_the_views_have_the_documented_columns(database: Database, view: str) -> None:
    section = DOCUMENT.partition(f"### `{view}`")[2].partition("\n#")[0]
    table = section.partition("| column | meaning |")[2].partition("\n\n")[0]
    columns = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert query(database, f"SELECT * FROM {view}").columns == tuple(columns)
    assert [column for of, column in view_columns(database) if of == view] == columns


def test_the_tables_have_the_documented_columns() -> None:
    documented = {
        name: re.sub(r"\(.*?\)|\*|and what it resolves to:|; rows are only added.*|(?<!\*): the .*", "", columns)
        for name, columns in re.findall(
            r"^\| `(\w+)` \| (\*\*.*) \|$", DOCUMENT.partition("## Tables")[2], re.MULTILINE
        )
    }
    assert {name: re.split(r"[,\s]+", columns.strip()) for name, columns in documented.items()} == {
        **{table.name: [column.name for column in table.columns] for table in Row.metadata.sorted_tables},
        lifecycle.VERSION_TABLE: ["version_num:", *documented[lifecycle.VERSION_TABLE].split()[1:]],
    }


# --- answers ---------------------------------------------------------------------------------------------------------


def test_parameters(database: Database) -> None:
    values = {"i": 2**62, "f": 1.5, "t": "ü", "n": None, "b": b"\x00"}
    assert query(database, "SELECT :i, :f, :t, :n, :b", values).rows == [(2**62, 1.5, "ü", None, b"\x00")]
    assert query(database, "SELECT :t, :t", {"t": "; DROP TABLE cards", "unused": 1}).rows[0][0] == "; DROP TABLE cards"
    assert query(database, "SELECT ':t'").rows == [(":t",)]


def test_limit(database: Database) -> None:
    numbers = "SELECT value FROM json_each('[1,2,3]')"
    assert query(database, numbers, limit=2).rows == [(1,), (2,)]
    assert query(database, numbers, limit=2).truncated
    assert query(database, numbers, limit=3).rows == [(1,), (2,), (3,)]
    assert not query(database, numbers, limit=3).truncated
    assert query(database, numbers, limit=0).rows == []
    assert query(database, numbers, limit=0).truncated


@pytest.mark.parametrize(
    "sql",
    [
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a",
        "VALUES (1)",
        "EXPLAIN QUERY PLAN SELECT * FROM models",
        "EXPLAIN SELECT 1",
        "SELECT count(*) FROM sqlite_master",
        "  SELECT 1 ; ",
        "SELECT 1 -- behind\n",
        "/* before */ SELECT 1",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5) SELECT sum(i) FROM n",
        "SELECT name, row_number() OVER (ORDER BY name) FROM models",
        "SELECT metadata ->> '$.license' FROM cards",
        "SELECT * FROM json_tree('{\"a\": [1]}')",
        "SELECT date('now'), strftime('%Y', 'now'), upper('a') LIKE 'A', 'abc' GLOB 'a*', round(2.345, 1)",
    ],
)
def test_what_may_be_asked(database: Database, sql: str) -> None:
    assert query(database, sql).rows


def test_text_that_is_not_utf8(database: Database) -> None:
    assert query(database, "SELECT CAST(x'41ff42' AS TEXT)").rows == [("A\ufffdB",)]


def test_a_long_answer(database: Database) -> None:
    sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000) SELECT i FROM n"
    assert len(query(database, sql).rows) == 100_000


def test_a_query_in_memory(tmp_path: Path) -> None:
    with without_seeds():
        other = open_catalog(settings_in(tmp_path, database_url="sqlite://"))
    import_files(other, [card_file("name: x\nmodel_family: f\n")])
    assert query(other, "SELECT name FROM models").rows == [("x",)]
    with pytest.raises(PolicyError):
        query(other, "DELETE FROM cards")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT nix FROM models", "no such column: nix"),
        ("SELECT * FROM nix", "no such table: nix"),
        ("SELEC 1", 'near "SELEC": syntax error'),
        ("SELECT", "incomplete input|syntax error"),
        ("SELECT :name", "`-p name VALUE`|inding 1"),
        ("SELECT ?", "has no name|binding"),
        ("SELECT nix()", "no such function: nix"),
        ("SELECT upper()", "wrong number of arguments"),
        ("SELECT json('{')", "malformed JSON"),
        ("SELECT abs(-9223372036854775808)", "integer overflow"),
        ("SELECT 1 \0", "null character|embedded null|unrecognized token"),
        ("SELECT '\ud800'", "surrogates|encode"),
        ("", "The query is empty"),
        ("  -- nothing\n", "The query is empty"),
        (";", "The query is empty"),
    ],
)
def test_mistakes(database: Database, sql: str, words: str) -> None:
    with pytest.raises(QueryError, match=words):
        query(database, sql)


@pytest.mark.parametrize("value", [2**63, object(), [1], {"a": 1}, "half \ud800"])
def test_parameters_of_no_sql_type(database: Database, value: object) -> None:
    with pytest.raises(QueryError):
        query(database, "SELECT :x", {"x": value})


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf")])
def test_deadlines_that_are_none(database: Database, deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        query(database, "SELECT 1", deadline_s=deadline)


def test_a_negative_limit(database: Database) -> None:
    with pytest.raises(ValueError, match="limit"):
        query(database, "SELECT 1", limit=-1)


def test_a_damaged_catalog(tmp_path: Path) -> None:
    path = tmp_path / "catalog.sqlite"
    damaged = open_catalog(settings_in(tmp_path))
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\xa5" * (len(data) - 4096))
    with pytest.raises(CatalogError, match="damaged"):
        query(damaged, "SELECT * FROM models")


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"


@pytest.mark.parametrize("sql", [f"{ENDLESS} SELECT i FROM n", f"{ENDLESS} SELECT hex(hex(hex(i + 1000000))) FROM n"])
@pytest.mark.parametrize("limit", [None, 10**9])
def test_an_answer_without_an_end(
    database: Database, sql: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_ANSWER_BYTES", 2**20)
    with pytest.raises(QueryError, match=r"larger than 1 MiB, after .* rows.*`--limit`"):
        query(database, sql, limit=limit)
    assert len(query(database, sql, limit=1000).rows) == 1000
