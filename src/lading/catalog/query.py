"""Read-only SQL over the catalog, with a deadline.

On SQLite several fences protect the file. It is open read-only; but ``ATTACH`` and ``VACUUM INTO``
would still write other files, so an authorizer allows what reading needs, and no more. A deadline is kept by a handler
that is called between the steps of the program, and the sizes of values limit what one step can do.
"""

from __future__ import annotations

import math
import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import exc, text

from lading.catalog.database.connection import connect_readonly
from lading.catalog.database.database import Database
from lading.catalog.database.failures import primary_code, sqlite_failure, translated
from lading.catalog.own_store import CardStore, open_store
from lading.errors import CatalogError, PolicyError, QueryError, escaped
from lading.system.display import counted, unique_names

MAX_VALUE_BYTES = 200_000
"""The size of the longest value in a query. Searching a megabyte for half a megabyte is one step of seconds."""

MAX_ANSWER_BYTES = 256 * 2**20
"""The memory for the rows of an answer; all columns of a million tensors take 200 MB."""

_LACKING = re.compile(r"did not supply a value for binding(?: parameter)? :(\w+)")

_MOST_ROWS = 2**31 - 2
"""The most rows to request from a cursor; one more shows whether there are others."""

_Rows = list[tuple[Any, ...]]

_STEPS = 100
"""Steps of SQLite's program between two looks at the clock."""

_LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: MAX_VALUE_BYTES,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 100,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
}

_ACTIONS = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})

_FUNCTIONS = frozenset(
    """
    -> ->> abs acos acosh asin asinh atan atan2 atanh avg ceil ceiling char coalesce concat concat_ws cos cosh
    count cume_dist current_date current_time current_timestamp date datetime degrees dense_rank exp first_value floor
    glob group_concat hex ifnull iif instr json json_array json_array_length json_each json_extract
    json_group_array json_group_object json_insert json_object json_quote json_remove json_replace json_set json_tree
    json_type json_valid julianday lag last_value lead length like likelihood likely ln log log10 log2 lower ltrim max
    median min mod nth_value ntile nullif octet_length percent_rank pi pow power quote radians random rank
    replace round row_number rtrim sign sin sinh soundex sqlite_version sqrt string_agg strftime substr substring sum
    tan tanh time timediff total trim trunc typeof unicode unixepoch unlikely upper
    """.split()
)
"""The functions that a query may call. Not those that read files (``load_extension``) or take pointers
(``fts3_tokenizer``), nor those that run long on short arguments (``printf('%.*c', 100000000, 'x')``, 126 times in one
call)."""

_FIRST_WORD = re.compile(r"(?:\s|\(|--[^\n]*|/\*.*?(?:\*/|\Z))*(\w*)", re.DOTALL)
"""The first word of a statement, behind comments and parentheses."""

_WRITING = frozenset(
    "ALTER ANALYZE CREATE DELETE DROP EXPLAIN INSERT REINDEX REPLACE TRUNCATE UPDATE VACUUM WITH".split()
)
"""The first words of statements to refuse because they write, or may write later on."""


_SHOWN_ROWS = 50
"""The most rows that a notebook shows."""

_SHOWN_LETTERS = 200
"""The most letters of a value that a notebook shows."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class QueryResult:
    """The answer of a query: iterate over it for its rows. Notebooks show it as a table, and ``pandas.DataFrame`` takes
    it with the names of its columns, if it has rows.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    truncated: bool
    """``True`` if there are more rows than requested."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        # Without the names, which pandas reads there as of a named tuple, it would number the columns. The names of a
        # named tuple must be identifiers; those of columns may be `count(*)`, or appear twice.
        row = type("Row", (tuple,), {"__slots__": (), "_fields": self.columns})

        return map(row, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return a dictionary for each row. Repeated names of columns become ``name``, ``name_2`` and so on."""
        names = unique_names(self.columns)

        return [dict(zip(names, row, strict=True)) for row in self.rows]

    def __repr__(self) -> str:
        return f"<QueryResult: {self._size()}, columns {', '.join(map(escaped, self.columns))}>"

    def _repr_html_(self) -> str:
        heading = "".join(f"<th>{_as_html(name)}</th>" for name in self.columns)
        rows = ["".join(f"<td>{_as_html(value)}</td>" for value in row) for row in self.rows[:_SHOWN_ROWS]]
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        note = f"the first {_SHOWN_ROWS} of {self._size()}" if len(self) > _SHOWN_ROWS else self._size()

        return f"<table>\n<thead><tr>{heading}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n<p>{note}</p>"

    def _size(self) -> str:
        return f"{counted(len(self), 'row')}{', and there are more' if self.truncated else ''}"


def _as_html(value: object) -> str:
    import html  # few queries are shown in a notebook

    text = "-" if value is None else value.hex() if isinstance(value, bytes) else str(value)
    text = text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}…"

    return html.escape(escaped(text))


def query(
    sql: str,
    parameters: Mapping[str, object] | None = None,
    *,
    deadline_s: float = 30.0,
    limit: int | None = None,
    store: CardStore | None = None,
) -> QueryResult:
    """Ask the catalog in SQL. The tables and views are described in ``docs/reference/sql.md``.

    :param sql: one statement, with parameters as ``:name``.
    :param parameters: their values: ``None``, numbers, text or bytes.
    :param deadline_s: seconds after which the query is stopped.
    :param limit: the most rows to return; the result says if there are more.

    :raises PolicyError: the statement does more than read.
    :raises QueryError: the database does not understand it, or a parameter is missing.
    :raises CatalogError: the deadline has passed, or the catalog is damaged.
    """
    return run_query(open_store(store).database, sql, parameters, deadline_s=deadline_s, limit=limit)


def run_query(
    database: Database,
    sql: str,
    parameters: Mapping[str, object] | None = None,
    *,
    deadline_s: float = 30.0,
    limit: int | None = None,
) -> QueryResult:
    """Ask a database as :func:`query` does."""
    if not (deadline_s > 0 and math.isfinite(deadline_s)):
        raise ValueError(f"deadline_s must be a positive number of seconds, but is {deadline_s}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, but is {limit}")

    most = _MOST_ROWS if limit is None else min(limit, _MOST_ROWS)
    ask = _ask_sqlite if database.target.is_sqlite else _ask_server
    columns, rows = ask(database, sql, dict(parameters or {}), deadline_s, most + 1)

    truncated = len(rows) > most

    return QueryResult(columns=columns, rows=rows[:most] if truncated else rows, truncated=truncated)


def view_columns(database: Database) -> list[tuple[str, str]]:
    """Return the views that queries may rely on, each with its columns: pairs (view, column).

    :raises CatalogError: the catalog is damaged.
    """
    return [
        (view, column)
        for view in ("models", "model_tensors", "model_shards", "assets", "unregistered")
        for column in run_query(database, f"SELECT * FROM {view}", limit=0).columns
    ]


def _late(deadline_s: float) -> CatalogError:
    return CatalogError(
        f"The query was stopped after {deadline_s:g} s. Narrow it, or give it more time with `--deadline`."
    )


def _refused(sql: str, what: str) -> PolicyError:
    """Return the error for a statement that writes, or is refused for ``what``: its first word, if that is empty."""
    first = _first_word(sql)
    if first in _WRITING and (not what or first not in ("EXPLAIN", "WITH")):
        return PolicyError(f"The query would write ({first}), but `lading sql` only reads: it is refused.")
    if not what and first in ("SELECT", "VALUES"):
        what = "a table that the database would make"
    hint = " `lading sql --schema` shows the columns of the views." if first == "PRAGMA" else ""

    return PolicyError(f"`lading sql` only reads, so {what or first or 'this'} is refused.{hint}")


def _first_word(sql: str) -> str:
    found = _FIRST_WORD.match(sql)

    return "" if found is None else found[1].upper()


def _fetch(cursor: Iterable[Iterable[object]], most: int) -> _Rows:
    """Return the rows of an answer, at most so many.

    :raises QueryError: they are larger than :data:`MAX_ANSWER_BYTES`.
    """
    rows: _Rows = []
    left = MAX_ANSWER_BYTES
    for row in islice(cursor, most):
        values = tuple(row)
        left -= sys.getsizeof(values) + sum(map(sys.getsizeof, values))
        if left < 0:
            raise QueryError(
                f"The answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB, after {len(rows):,} rows. Select fewer "
                "columns, a part of long values, or fewer rows: `--limit`, or `where`."
            )
        rows.append(values)

    return rows


# --- SQLite -----------------------------------------------------------------------------------------------------------


def _ask_sqlite(
    database: Database, sql: str, parameters: dict[str, object], deadline_s: float, most: int
) -> tuple[tuple[str, ...], _Rows]:
    end = time.monotonic() + deadline_s
    denied: list[str] = []

    def authorize(action: int, first: str | None, second: str | None, schema: str | None, inner: str | None) -> int:
        if action in _ACTIONS or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FUNCTIONS):
            return sqlite3.SQLITE_OK
        denied.append(f"the function {second}" if action == sqlite3.SQLITE_FUNCTION else "")
        return sqlite3.SQLITE_DENY

    with closing(_reader(database)) as connection:
        connection.set_authorizer(authorize)
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        try:
            cursor = connection.execute(sql, parameters)
            if cursor.description is None:
                raise QueryError("The query is empty. For example: lading sql 'select name, status from models'")
            return tuple(name for name, *_ in cursor.description), _fetch(cursor, most)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            # Older Pythons raise `Warning` for a second statement.
            if denied or "one statement at a time" in str(error):
                raise _refused(sql, denied[0] if denied else "more than one statement") from error
            code = primary_code(error) if isinstance(error, sqlite3.Error) else sqlite3.SQLITE_ERROR
            if code == sqlite3.SQLITE_INTERRUPT:
                raise _late(deadline_s) from error
            if code in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY):
                raise _refused(sql, "") from error
            if code == sqlite3.SQLITE_TOOBIG:
                raise QueryError(
                    f"A value of the query is longer than {MAX_VALUE_BYTES:,} bytes, more than `lading sql` handles. "
                    "Select a part of it: substr(value, 1, 1000)."
                ) from error
            if code not in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_RANGE):
                raise sqlite_failure(error, database.target) from error  # type: ignore[arg-type]
            if (lacking := _LACKING.search(str(error))) is not None:
                name = lacking[1]
                raise QueryError(
                    f"The query has a parameter {name!r} without a value. Give it one: `-p {name} VALUE`, or in Python "
                    f"{{{name!r}: value}}."
                ) from error
            raise QueryError(
                f"{str(error).rstrip('.')}. `docs/reference/sql.md` describes the tables and views."
            ) from error


def _reader(database: Database) -> sqlite3.Connection:
    with translated(database.target):
        if database.path is not None:
            connection = connect_readonly(database.path)
        else:
            connection = sqlite3.connect(":memory:", isolation_level=None)
            with database.read() as source:
                driver = source.connection.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                driver.backup(connection)

        # To SQLite, the first use of a table-valued function makes a table, which the authorizer would refuse.
        connection.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')").fetchall()
        connection.text_factory = lambda data: data.decode("utf-8", errors="replace")
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)

        return connection


# --- a server ---------------------------------------------------------------------------------------------------------


def _ask_server(
    database: Database, sql: str, parameters: dict[str, object], deadline_s: float, most: int
) -> tuple[tuple[str, ...], _Rows]:
    statement = sql.strip().rstrip(";").rstrip()
    if not statement:
        raise QueryError("The query is empty. For example: lading sql 'select name, status from models'")
    if ";" in statement:
        raise PolicyError("`lading sql` takes one statement; write a semicolon in a text as a parameter.")
    first = _first_word(statement)
    if first not in {"", "SELECT", "WITH", "VALUES", "TABLE"}:
        raise _refused(statement, first)

    with database.read() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, math.ceil(deadline_s * 1000))}")
        # A cursor of the server accepts only queries: not COPY, which writes files even in a read-only transaction.
        streaming = connection.execution_options(stream_results=True)
        try:
            with streaming.execute(text(statement), parameters) as result:
                return tuple(result.keys()), _fetch(result, most)
        except exc.SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            state = getattr(cause, "sqlstate", None) or ""
            # https://www.postgresql.org/docs/current/errcodes-appendix.html
            if state == "57014":
                raise _late(deadline_s) from error
            if state in ("0A000", "25006", "42501"):
                raise PolicyError(f"The query would write, but `lading sql` only reads: {cause}") from error
            if state.startswith(("08", "53", "57", "58", "XX")):
                raise CatalogError(
                    f"{database.target} does not answer: {database.target.without_secrets(cause)}"
                ) from error
            raise QueryError(str(cause)) from error
