"""Connections to the catalog's database, and transactions.

These rules for SQLite come from failures. The driver runs in autocommit mode and an event issues
``BEGIN`` (``BEGIN IMMEDIATE`` to write): with the driver's own transactions, a process that is killed in a migration
leaves half a schema. Connections are not pooled, so that a fork never shares one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event, exc
from sqlalchemy.pool import NullPool, StaticPool

from lading.catalog.database.failures import primary_code, translated
from lading.catalog.database.journal import has_stale_log, refuse_left_log
from lading.catalog.database.target import APPLICATION_ID, Target, connect, writable
from lading.errors import CatalogError
from lading.system.filesystem import on_network

WRITE = "lading_write"
"""The execution option of a connection whose transaction takes the write lock at its beginning."""


def file_engine(path: Path, *, create: bool = False, foreign_keys: bool = True) -> Engine:
    """Return an engine for a SQLite file to read and write.

    :param foreign_keys: off for migrations. SQLite changes a table by writing a new one and dropping the old one; keys
        would drop all rows that refer to it.
    """
    mode = "mode=rwc" if create else "mode=rw"

    return _sqlite_engine(lambda: connect(path, mode), NullPool, foreign_keys=foreign_keys)


def readonly_engine(path: Path, *, patience_s: float | None = None) -> Engine:
    """Return an engine for a SQLite file to read only."""
    return _sqlite_engine(lambda: connect_readonly(path, patience_s=patience_s), NullPool)


def memory_engine() -> Engine:
    """Return an engine for a new database in memory: one connection, whose users take turns."""
    return _sqlite_engine(
        lambda: sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), StaticPool
    )


def server_engine(target: Target) -> Engine:
    """Return an engine for a database server.

    :raises CatalogError: the driver is not installed, or does not exist.
    """
    try:
        return create_engine(target.url, poolclass=NullPool)
    except (exc.ArgumentError, ImportError) as error:
        raise CatalogError(
            f"No driver for {target} can be used ({target.without_secrets(error)}). For PostgreSQL: `pip install "
            "'lading-hub[postgresql]'` and postgresql+psycopg://…"
        ) from error


def connect_readonly(path: Path, *, patience_s: float | None = None) -> sqlite3.Connection:
    """Connect without a way to write; also to a file in a read-only folder.

    Even reading a database in WAL mode takes its shared memory. If that fails and the log is missing, this opens
    the file as one that does not change: without other users, it does not.

    :param patience_s: as for :func:`lading.catalog.database.target.connect`.

    :raises CatalogError: the database needs a log that this user cannot use.
    """
    # A process that can write has set such a log aside. Looking at the file closes it, which ends this process's locks.
    if not writable(path) and has_stale_log(path):
        return connect(path, "mode=ro&immutable=1", patience_s=patience_s)

    connection = connect(path, "mode=ro", patience_s=patience_s)
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if primary_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        if writable(path):
            # The first process that can undoes a transaction that a killed writer left half done.
            with closing(connect(path, "mode=rw", patience_s=patience_s)) as undoing:
                undoing.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return connect(path, "mode=ro", patience_s=patience_s)
        refuse_left_log(path)
        return connect(path, "mode=ro&immutable=1", patience_s=patience_s)

    return connection


def _sqlite_engine(
    connect: Callable[[], sqlite3.Connection], pool: type[NullPool | StaticPool], *, foreign_keys: bool = True
) -> Engine:
    if sqlite3.sqlite_version_info < (3, 37):
        raise CatalogError(
            f"lading needs SQLite 3.37 or newer, but this Python comes with {sqlite3.sqlite_version}. "
            "Use another Python, or a newer SQLite."
        )

    def creator() -> sqlite3.Connection:
        connection = connect()
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        return connection

    engine = create_engine("sqlite://", creator=creator, poolclass=pool)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        write = connection.get_execution_options().get(WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


@contextmanager
def transaction(engine: Engine, target: Target, *, write: bool) -> Iterator[Connection]:
    """Commit the body's transaction at the end; roll it back if the body raises.

    :raises CatalogError: as :func:`translated`.
    """
    with translated(target), engine.connect() as connection:
        connection = connection.execution_options(**{WRITE: write})
        with connection.begin():
            if write and not target.is_sqlite:
                # One writer at a time, as on SQLite: otherwise two imports of one name would both find it free.
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({APPLICATION_ID})")
            yield connection


def set_journal_mode(path: Path, *, patience_s: float) -> None:
    """Turn the write-ahead log on; or off on a file system that hosts share, as it needs memory that they cannot share.

    :param patience_s: seconds to try. The change needs exclusive use of the file and does not wait by SQLite's own
        time-out; if it fails, the database works as it is.
    """
    mode, version = ("delete", 1) if on_network(path.parent) else ("wal", 2)
    deadline = time.monotonic() + patience_s

    while True:
        try:
            with open(path, "rb") as file:
                if file.read(20)[18:] == bytes((version, version)):
                    return
            with closing(connect(path, "mode=rw")) as connection:
                connection.execute("PRAGMA busy_timeout = 0")
                (found,) = connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
            if found == mode:
                return
        except (sqlite3.Error, OSError, UnicodeDecodeError):
            pass
        if time.monotonic() >= deadline:
            return
        time.sleep(0.02)
