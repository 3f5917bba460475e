"""Connections to the catalog's database: what is there, how it is opened, and how its failures are told.

SQLite is opened by rules that were learnt from failures. The driver runs in autocommit mode and an event issues
``BEGIN`` (``BEGIN IMMEDIATE`` to write): with the driver's own transactions, a process that is killed in a migration
leaves half a schema. Connections are not pooled, so that a fork never shares one.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Self
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, exc, make_url
from sqlalchemy.pool import NullPool, StaticPool

from lading.errors import CatalogError, CatalogOutdatedError, InternalError, LadingError
from lading.filesystem import on_network

SCHEMA_VERSION = 2
"""The version of the schema that this code works with: the number of the last migration."""

APPLICATION_ID = int.from_bytes(b"ldng", "big")
"""What the header of a catalog file carries, so that no other database is taken for one."""

BUSY_TIMEOUT_S = 30.0
"""How long a connection waits for the lock of another one."""

WRITE = "lading_write"
"""The execution option of a connection whose transaction takes the write lock at its beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a catalog is."""

    url: URL
    path: Path | None
    """The file of a SQLite database; ``None`` for a server, and for one in memory."""

    @classmethod
    def from_url(cls, text: str) -> Self:
        """Read a database URL.

        :raises CatalogError: not a URL, or a SQLite URL with query parameters.
        """
        try:
            url = make_url(text)
        except exc.ArgumentError as error:
            raise CatalogError(
                f"LADING_DATABASE_URL is expected to be a URL such as sqlite:////data/catalog.sqlite or "
                f"postgresql+psycopg://user@host/lading, but is {text!r}."
            ) from error

        if url.get_backend_name() != "sqlite":
            return cls(url=url, path=None)
        if url.query:
            raise CatalogError(f"A SQLite database URL takes no parameters, but {text!r} has some behind the `?`.")
        if url.database in (None, "", ":memory:"):
            return cls(url=url, path=None)

        return cls(url=url, path=Path(str(url.database)).expanduser().absolute())

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)

        return "the catalog in memory" if self.is_sqlite else self.url.render_as_string(hide_password=True)


# --- what is there ---------------------------------------------------------------------------------------------------


class Found(Enum):
    """What a look at a file finds, before it is opened as a database."""

    NOTHING = auto()
    """No file, or one that holds nothing yet: what a creation that was cut off leaves behind."""
    CATALOG = auto()
    FOREIGN = auto()


def peek(path: Path) -> Found:
    """Look at the file's header and touch nothing: not even a journal appears beside a file that is not ours.

    :raises CatalogError: ``path`` is a folder or another thing that is not a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Found.NOTHING
    if not stat.S_ISREG(mode):
        raise CatalogError(
            f"The catalog is expected to be a file, but {path} is {'a folder' if stat.S_ISDIR(mode) else 'not one'}."
        )

    # https://www.sqlite.org/fileformat2.html#the_database_header
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        return Found.NOTHING
    if len(header) == 100 and not any(header):
        # A big transaction writes other pages before the first one; a journal tells that one was under way.
        return Found.NOTHING if Path(f"{path}-journal").exists() else Found.FOREIGN
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        return Found.FOREIGN

    (application_id,) = struct.unpack_from(">i", header, 68)
    if application_id == APPLICATION_ID:
        return Found.CATALOG
    if application_id != 0 or Path(f"{path}-wal").exists():
        return Found.FOREIGN

    try:
        with _closing(_connect(path, "mode=ro&immutable=1")) as connection:
            (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (sqlite3.Error, UnicodeDecodeError):  # the latter of a message that quotes what is damaged
        return Found.FOREIGN

    return Found.FOREIGN if objects else Found.NOTHING


def foreign(target: Target) -> CatalogError:
    """The error for a file that is something else."""
    return CatalogError(
        f"{target} is expected to be a catalog of lading, but is another kind of file; it was left as it is. Move it "
        "away, or set LADING_DATABASE_URL to another place."
    )


def check_version(found: int, target: Target) -> None:
    """Check the schema's version.

    :raises CatalogOutdatedError: it is not :data:`SCHEMA_VERSION`.
    """
    if found == SCHEMA_VERSION:
        return

    what = f"The schema of {target} is of version {found}, but this version of lading works with {SCHEMA_VERSION}."
    todo = (
        "Upgrade lading: `pip install --upgrade lading`."
        if found > SCHEMA_VERSION
        else "`lading db upgrade` brings it up to date, after a backup."
    )
    raise CatalogOutdatedError(f"{what} {todo}", expected=SCHEMA_VERSION, found=found)


def writable(path: Path) -> bool:
    """Whether the catalog file can be written, and a journal beside it."""
    # With the effective user's rights where the system can tell them: those are the ones that `open` is granted by.
    effective = os.access in os.supports_effective_ids

    return os.access(path, os.W_OK, effective_ids=effective) and os.access(
        path.parent, os.W_OK | os.X_OK, effective_ids=effective
    )


# --- engines ---------------------------------------------------------------------------------------------------------


def file_engine(path: Path, *, create: bool = False, foreign_keys: bool = True) -> Engine:
    """An engine for a SQLite file that can be written.

    :param foreign_keys: off for migrations. SQLite changes a table by writing it anew and dropping the old one, and
        by the keys all that refers to it.
    """
    mode = "mode=rwc" if create else "mode=rw"

    return _sqlite_engine(lambda: _connect(path, mode), NullPool, foreign_keys=foreign_keys)


def readonly_engine(path: Path) -> Engine:
    """An engine for a SQLite file that cannot be written, or must not be."""
    return _sqlite_engine(lambda: connect_readonly(path), NullPool)


def memory_engine() -> Engine:
    """An engine for a new database in memory: one connection, which its users take turns with."""
    return _sqlite_engine(
        lambda: sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False), StaticPool
    )


def server_engine(target: Target) -> Engine:
    """An engine for a database server.

    :raises CatalogError: the driver is not installed, or there is none of that name.
    """
    try:
        return create_engine(target.url, poolclass=NullPool)
    except (exc.ArgumentError, ImportError) as error:
        raise CatalogError(
            f"No driver for {target} can be used ({error}). For PostgreSQL: `pip install psycopg` and "
            "postgresql+psycopg://…"
        ) from error


def connect_readonly(path: Path) -> sqlite3.Connection:
    """A connection that cannot write; for a file in a folder that cannot be written too.

    A database in WAL mode needs its shared memory even to be read. Where that cannot be made, the file is taken as one
    that does not change: without other users that is what it is.
    """
    connection = _connect(path, "mode=ro")
    try:
        connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError as error:
        connection.close()
        if primary_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        return _connect(path, "mode=ro&immutable=1")

    return connection


def _connect(path: Path, parameters: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?{parameters}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,
        check_same_thread=False,
    )


def _sqlite_engine(
    connect: Callable[[], sqlite3.Connection], pool: type[NullPool | StaticPool], *, foreign_keys: bool = True
) -> Engine:
    if sqlite3.sqlite_version_info < (3, 37):
        raise CatalogError(f"lading needs SQLite 3.37 or newer, but this Python comes with {sqlite3.sqlite_version}.")

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
    """A transaction that is committed at the end, and rolled back when the body raises.

    :raises CatalogError: as :func:`translated`.
    """
    with translated(target), engine.connect() as connection:
        connection = connection.execution_options(**{WRITE: write})
        with connection.begin():
            if write and not target.is_sqlite:
                # One writer at a time, as on SQLite: two imports of one name would else both find it free.
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({APPLICATION_ID})")
            yield connection


def set_journal_mode(path: Path, *, patience_s: float) -> None:
    """Turn the write-ahead log on, or off on a file system that hosts share: it needs memory that they cannot share.

    :param patience_s: for how long it is tried. The change needs the file for itself and does not wait by SQLite's own
        time-out; where it fails, the database works as it is.
    """
    mode, version = ("delete", 1) if on_network(path.parent) else ("wal", 2)
    deadline = time.monotonic() + patience_s

    while True:
        try:
            with open(path, "rb") as file:
                if file.read(20)[18:] == bytes((version, version)):
                    return
            with _closing(_connect(path, "mode=rw")) as connection:
                connection.execute("PRAGMA busy_timeout = 0")
                (found,) = connection.execute(f"PRAGMA journal_mode = {mode}").fetchone()
            if found == mode:
                return
        except (sqlite3.Error, OSError, UnicodeDecodeError):
            pass
        if time.monotonic() >= deadline:
            return
        time.sleep(0.02)


@contextmanager
def _closing(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    try:
        yield connection
    finally:
        connection.close()


# --- failures --------------------------------------------------------------------------------------------------------


@contextmanager
def translated(target: Target) -> Iterator[None]:
    """Let no exception of the database's driver out.

    :raises CatalogError: the catalog is damaged, another process holds it, or it was given what it cannot keep.
    :raises OSError: the disk is full, or the file cannot be read or written.
    """
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        if isinstance(cause, sqlite3.Error):
            raise sqlite_failure(cause, target) from error
        raise CatalogError(f"{target} does not answer as expected: {cause}".rstrip()) from error
    except UnicodeDecodeError as error:
        raise _damaged(error, target) from error
    except UnicodeEncodeError as error:
        raise CatalogError(f"{target} keeps Unicode text only, but was given {error.object!r}.") from error


def sqlite_failure(error: sqlite3.Error, target: Target) -> LadingError | OSError:
    """What a failure of SQLite means to the user."""
    code = primary_code(error)
    path = target.path

    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        holders = _holders(path) if path is not None else ""
        return CatalogError(
            f"Another process has been writing to {target} for {BUSY_TIMEOUT_S:.0f} s{holders}. Try again when it is "
            "done."
        )
    # Without room for the shared memory of the write-ahead log, a catalog cannot even be read.
    if code == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return PermissionError(errno.EACCES, f"The catalog cannot be written ({error})", str(target))
    if code == sqlite3.SQLITE_CANTOPEN:
        if path is not None and not path.exists():
            return FileNotFoundError(errno.ENOENT, "The catalog, or the folder for it, is not there", str(target))
        return PermissionError(errno.EACCES, f"The catalog cannot be opened ({error})", str(target))
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({error})", str(target))

    if code == sqlite3.SQLITE_CONSTRAINT:
        return InternalError(f"{target} refuses a row that lading wrote: {error}")

    if "no such module" in str(error):
        return CatalogError(
            f"lading needs SQLite with full-text search, but that of this Python was built without it ({error})."
        )

    # The rest is told apart by no code: a table that is missing is as much a damage as a page that is.
    return _damaged(error, target)


def _damaged(error: Exception, target: Target) -> CatalogError:
    return CatalogError(
        f"{target} is damaged: {error}. `lading db check` says more. Put a backup in its place, or move it away: "
        "lading then makes a new one."
    )


def primary_code(error: sqlite3.Error) -> int:
    """SQLite's primary result code of an error."""
    # Errors that the Python module raises by itself have no code.
    return int(getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


def _holders(path: Path) -> str:
    """Which processes of this machine hold a lock on the database, as far as the system tells."""
    inodes = set()
    for name in (path, Path(f"{path}-shm")):
        try:
            inodes.add(os.stat(name).st_ino)
        except OSError:
            continue

    try:
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

    pids = {
        int(pid)
        for pid, inode in re.findall(r" (?:READ|WRITE) +(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", locks)
        if int(inode) in inodes and int(pid) != os.getpid()
    }

    return f" (process {', '.join(map(str, sorted(pids)))})" if pids else ""
