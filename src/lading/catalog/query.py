"""SQL over the catalog that can only read, and that ends.

On SQLite several fences stand one behind the other. The file is opened read-only; but ``ATTACH`` and ``VACUUM INTO``
would still write other files, so an authorizer allows what reading needs, and no more. A deadline is kept by a handler
that is called between the steps of the program; what one step or the compiler could do for hours is limited.
"""

from __future__ import annotations

import math
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from sqlalchemy import exc, text

from lading.catalog.database.connection import connect_readonly
from lading.catalog.database.database import Database
from lading.catalog.database.failures import primary_code, sqlite_failure, translated
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import CatalogError, PolicyError, QueryError

MAX_VALUE_BYTES = 200_000
"""Of the longest value in a query. To search a megabyte for half a megabyte is one step, and takes seconds."""

MAX_ANSWER_BYTES = 256 * 2**20
"""The memory for the rows of an answer; those of a catalog with a million tensors, all columns, are 200 MB."""

MAX_EXPANSION = 10_000
"""Copies that the compiler may make of common table expressions; each that names another one twice doubles them."""

_LACKING = re.compile(r"did not supply a value for binding(?: parameter)? :(\w+)")

_MOST_ROWS = 2**31 - 2
"""That a cursor can be asked for, and one more to know whether there are others."""

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
"""What a query may call. Not what reads files (``load_extension``) or takes pointers (``fts3_tokenizer``), and not what
takes longer than its arguments are long (``printf('%.*c', 100000000, 'x')``, 126 times in one call)."""

_NAMES = {
    value: name.removeprefix("SQLITE_").replace("_", " ")
    for name, value in vars(sqlite3).items()
    if name in """
        SQLITE_CREATE_INDEX SQLITE_CREATE_TABLE SQLITE_CREATE_TEMP_INDEX SQLITE_CREATE_TEMP_TABLE
        SQLITE_CREATE_TEMP_TRIGGER SQLITE_CREATE_TEMP_VIEW SQLITE_CREATE_TRIGGER SQLITE_CREATE_VIEW SQLITE_DELETE
        SQLITE_DROP_INDEX SQLITE_DROP_TABLE SQLITE_DROP_TEMP_INDEX SQLITE_DROP_TEMP_TABLE SQLITE_DROP_TEMP_TRIGGER
        SQLITE_DROP_TEMP_VIEW SQLITE_DROP_TRIGGER SQLITE_DROP_VIEW SQLITE_INSERT SQLITE_PRAGMA SQLITE_TRANSACTION
        SQLITE_UPDATE SQLITE_ATTACH SQLITE_DETACH SQLITE_ALTER_TABLE SQLITE_REINDEX SQLITE_ANALYZE SQLITE_CREATE_VTABLE
        SQLITE_DROP_VTABLE SQLITE_FUNCTION SQLITE_SAVEPOINT
    """.split()
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryResult:
    """What a query answers."""

    columns: tuple[str, ...]
    rows: list[tuple[object, ...]]
    truncated: bool
    """Whether there are more rows than were asked for."""


def query(
    sql: str,
    parameters: Mapping[str, object] | None = None,
    *,
    deadline_s: float = 30.0,
    limit: int | None = None,
    store: AssetStore | None = None,
) -> QueryResult:
    """The rows of a query that only reads.

    :param parameters: values of ``:name`` placeholders.
    :param deadline_s: seconds.
    :param limit: of rows; further ones are left out, and the result says so.

    :raises PolicyError: it does more than read.
    :raises QueryError: the database does not understand it.
    :raises CatalogError: the deadline passed.
    """
    return run_query((store or get_asset_store()).database, sql, parameters, deadline_s=deadline_s, limit=limit)


def run_query(
    database: Database,
    sql: str,
    parameters: Mapping[str, object] | None = None,
    *,
    deadline_s: float = 30.0,
    limit: int | None = None,
) -> QueryResult:
    """Ask the catalog in SQL. The tables and views are described in ``docs/reference/sql.md``.

    :param sql: one statement, with parameters as ``:name``.
    :param parameters: their values: ``None``, numbers, text or bytes.
    :param deadline_s: seconds after which the query is stopped.
    :param limit: rows that are returned at most.

    :raises PolicyError: the statement does something else than read.
    :raises QueryError: the database does not understand it, or a parameter is missing.
    :raises CatalogError: the deadline has passed, or the catalog is damaged.
    """
    if not (deadline_s > 0 and math.isfinite(deadline_s)):
        raise ValueError(f"deadline_s must be a positive number of seconds, but is {deadline_s}")
    if limit is not None and limit < 0:
        raise ValueError(f"limit must not be negative, but is {limit}")

    if limit is not None:
        limit = min(limit, _MOST_ROWS)
    ask = _ask_sqlite if database.target.is_sqlite else _ask_server

    return ask(database, sql, dict(parameters or {}), deadline_s, limit)


def _late(deadline_s: float) -> CatalogError:
    return CatalogError(
        f"The query was stopped after {deadline_s:g} s. Narrow it, or give it more time with `--deadline`."
    )


def _fetch(cursor: Iterable[Iterable[object]], limit: int | None) -> list[tuple[object, ...]]:
    """Return the rows of an answer, at most one more than ``limit``.

    :raises QueryError: they are larger than :data:`MAX_ANSWER_BYTES`.
    """
    rows: list[tuple[object, ...]] = []
    left = MAX_ANSWER_BYTES
    for row in islice(cursor, None if limit is None else limit + 1):
        values = tuple(row)
        left -= sys.getsizeof(values) + sum(map(sys.getsizeof, values))
        if left < 0:
            raise QueryError(
                f"The answer is larger than {MAX_ANSWER_BYTES // 2**20} MiB, after {len(rows):,} rows. Select fewer "
                "columns, a part of long values, or fewer rows: `--limit`, or `where`."
            )
        rows.append(values)

    return rows


# --- SQLite ----------------------------------------------------------------------------------------------------------


def _ask_sqlite(
    database: Database, sql: str, parameters: dict[str, object], deadline_s: float, limit: int | None
) -> QueryResult:
    end = time.monotonic() + deadline_s
    denied: list[str] = []

    def authorize(action: int, first: str | None, second: str | None, schema: str | None, inner: str | None) -> int:
        if action in _ACTIONS or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FUNCTIONS):
            return sqlite3.SQLITE_OK
        what = f"the function {second}" if action == sqlite3.SQLITE_FUNCTION else _NAMES.get(action, "this")
        denied.append(f"{what} {first}" if action == sqlite3.SQLITE_PRAGMA else what)
        return sqlite3.SQLITE_DENY

    _refuse_expansion(sql)
    with closing(_reader(database)) as connection:
        connection.set_authorizer(authorize)
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        try:
            cursor = connection.execute(sql, parameters)
            if cursor.description is None:
                raise QueryError("There is no query. For example: lading sql 'select name, status from models'")
            rows = _fetch(cursor, limit)
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            # `Warning` is what older Pythons raise for a second statement.
            if denied or "one statement at a time" in str(error):
                what = denied[0] if denied else "more than one statement"
                raise PolicyError(f"`lading sql` only reads, so {what} is refused.") from error
            code = primary_code(error) if isinstance(error, sqlite3.Error) else sqlite3.SQLITE_ERROR
            if code == sqlite3.SQLITE_INTERRUPT:
                raise _late(deadline_s) from error
            if code in (sqlite3.SQLITE_AUTH, sqlite3.SQLITE_READONLY):
                raise PolicyError(f"`lading sql` only reads, so this is refused: {error}.") from error
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

    truncated = limit is not None and len(rows) > limit

    return QueryResult(
        columns=tuple(name for name, *_ in cursor.description),
        rows=rows[:limit] if truncated else rows,
        truncated=truncated,
    )


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

        # The first use of a table-valued function makes a table, in SQLite's eyes, which the authorizer would refuse.
        connection.execute("SELECT 1 FROM json_each('[]'), json_tree('[]')").fetchall()
        connection.text_factory = lambda data: data.decode("utf-8", errors="replace")
        # The built-in ones compare each character with each of the set.
        for name, strip in (("trim", str.strip), ("ltrim", str.lstrip), ("rtrim", str.rstrip)):
            connection.create_function(name, 2, _stripping(strip), deterministic=True)
        for limit, value in _LIMITS.items():
            connection.setlimit(limit, value)

        return connection


def _stripping(strip: Callable[[str, str], str]) -> Callable[[object, object], str | None]:
    def function(value: object, signs: object) -> str | None:
        return None if value is None or signs is None else strip(_as_text(value), _as_text(signs))

    return function


def _as_text(value: object) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


_TOKEN = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]|[\w$]+|\S""", re.DOTALL
)


def _refuse_expansion(sql: str) -> None:
    """Refuse common table expressions that would be copied too often before the first step of the program.

    The bound is the product of how often each is named, as if each named only the one before it.
    """
    tokens = [_bare(token) for token in _TOKEN.findall(sql) if not token.startswith(("--", "/*"))]
    definitions = _common_tables(tokens)
    named = Counter(
        token
        for i, (before, token, after) in enumerate(zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False))
        # Only where a table may stand; `name.column` refers to one that was named before.
        if before in {"from", "join", ",", "(", "in"} and after != "." and i not in definitions
    )

    copies = math.prod(max(named[tokens[i]], 1) for i in definitions)
    if copies > MAX_EXPANSION:
        raise PolicyError(
            f"The query's WITH tables name one another so often that they would be copied {copies:,} times, which is "
            f"refused beyond {MAX_EXPANSION:,}. Ask in several steps."
        )


def _common_tables(tokens: list[str]) -> set[int]:
    """The positions of the names in ``name [(columns)] AS [[NOT] MATERIALIZED] (``."""
    positions = set()
    for i, token in enumerate(tokens):
        behind = [t for t in tokens[i + 1 : i + 4] if t not in {"not", "materialized"}]
        if token != "as" or behind[:1] != ["("]:
            continue
        at = i - 1
        if at >= 0 and tokens[at] == ")":
            while at > 0 and tokens[at] != "(":
                at -= 1
            at -= 1
        if at >= 0:
            positions.add(at)

    return positions


def _bare(token: str) -> str:
    """An identifier without its quotes, in lower case."""
    if len(token) >= 2 and token[0] in "\"'`[":
        return token[1:-1].replace(token[0] * 2, token[0]).lower()

    return token.lower()


# --- a server --------------------------------------------------------------------------------------------------------


def _ask_server(
    database: Database, sql: str, parameters: dict[str, object], deadline_s: float, limit: int | None
) -> QueryResult:
    statement = sql.strip().rstrip(";").rstrip()
    if not statement:
        raise QueryError("There is no query. For example: lading sql 'select name, status from models'")
    if ";" in statement:
        raise PolicyError("`lading sql` takes one statement; write a semicolon in a text as a parameter.")
    first = _TOKEN.sub(lambda m: "" if m[0].startswith(("--", "/*")) else m[0], statement).split(maxsplit=1)[:1]
    if first and first[0].lower().lstrip("(") not in {"", "select", "with", "values", "table"}:
        raise PolicyError(f"`lading sql` only reads, so {first[0].upper()} is refused.")

    with database.read() as connection:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")
        connection.exec_driver_sql(f"SET LOCAL statement_timeout = {max(1, math.ceil(deadline_s * 1000))}")
        # Through a cursor of the server only a query can go: not COPY, which writes files even when reading only.
        streaming = connection.execution_options(stream_results=True)
        try:
            with streaming.execute(text(statement), parameters) as result:
                rows = _fetch(result, limit)
                columns = tuple(result.keys())
        except exc.SQLAlchemyError as error:
            cause = getattr(error, "orig", None) or error
            state = getattr(cause, "sqlstate", None) or ""
            # https://www.postgresql.org/docs/current/errcodes-appendix.html
            if state == "57014":
                raise _late(deadline_s) from error
            if state in ("0A000", "25006", "42501"):
                raise PolicyError(f"`lading sql` only reads, so this is refused: {cause}") from error
            if state.startswith(("08", "53", "57", "58", "XX")):
                raise CatalogError(
                    f"{database.target} does not answer: {database.target.without_secrets(cause)}"
                ) from error
            raise QueryError(str(cause)) from error

    truncated = limit is not None and len(rows) > limit

    return QueryResult(columns=columns, rows=rows[:limit], truncated=truncated)
