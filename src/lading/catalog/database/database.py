"""The catalog's database as the rest of lading holds it: opened, up to date, with a way to read and a way to write."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Self

from sqlalchemy import Connection, Engine

from lading.catalog.database.connection import (
    file_engine,
    memory_engine,
    readonly_engine,
    server_engine,
    set_journal_mode,
    transaction,
)
from lading.catalog.database.journal import set_stale_log_aside
from lading.catalog.database.migrate import (
    RestoreReport,
    UpgradeReport,
    backup,
    check,
    check_objects,
    downgrade,
    migrate,
    restore,
    upgrade,
    version_of,
)
from lading.catalog.database.target import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    Found,
    Target,
    check_version,
    foreign,
    no_catalog,
    peek,
    writable,
)
from lading.catalog.importing import refresh
from lading.errors import CatalogError
from lading.system.settings import Settings

__all__ = [
    "SCHEMA_VERSION",
    "Database",
    "RestoreReport",
    "UpgradeReport",
    "backup",
    "check",
    "downgrade",
    "restore",
    "upgrade",
]

_log = logging.getLogger("lading")

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


class Database:
    """A catalog that was opened, and whose schema is the one that this code knows.

    It holds no connection, so it may be shared between threads and survives a fork; each transaction makes its own.
    """

    def __init__(self, target: Target, engine: Engine, *, writable: bool) -> None:
        self._target = target
        self._engine = engine
        # A database in memory has one connection, which its users take in turns.
        self._turns: AbstractContextManager[object] = (
            threading.RLock() if target.is_sqlite and target.path is None else nullcontext()
        )
        self.writable = writable
        """Whether :meth:`write` can be called."""

    @property
    def target(self) -> Target:
        """Where the catalog is."""
        return self._target

    @property
    def url(self) -> str:
        """The URL of the database, without a password and without parameters."""
        return self._target.shown_url

    @property
    def path(self) -> Path | None:
        """The file of the database; ``None`` for a server, and for one in memory."""
        return self._target.path

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Open the catalog; make it on first use; take up what is new in the package and in the user's card files.

        Where there is none and none can be made, the built-in cards are served from memory, with a warning.

        :raises CatalogError: the file is something else, is damaged, or was changed by something other than lading.
        :raises CatalogOutdatedError: the schema is older or newer than this code.
        :raises OSError: the disk is full, or the file cannot be read.
        """
        if settings.database_url is None:
            _log.warning(
                "No catalog can be made, as this user has no home folder, so the built-in cards are used and nothing "
                "is kept. Set LADING_DATABASE_URL to a place that can be written."
            )
            return cls._in_memory(settings, writable=False)

        target = Target.from_url(settings.database_url)
        if target.path is None:
            return cls._open_elsewhere(target, settings)

        try:
            found = peek(target.path)
        except NotADirectoryError as error:
            raise _nowhere(target, error) from error
        if found is Found.FOREIGN:
            raise foreign(target)
        if found is Found.NOTHING:
            try:
                return cls._create(target, settings)
            except OSError as error:
                if error.errno in _NO_FOLDER:
                    raise _nowhere(target, error) from error
                if error.errno not in _CANNOT_WRITE:
                    raise
                _log.warning(
                    "No catalog can be made at %s (%s), so the built-in cards are used and nothing is kept. Set "
                    "LADING_DATABASE_URL to a place that can be written.", target, error.strerror,
                )  # fmt: skip
                return cls._in_memory(settings, writable=False)

        if not writable(target.path):
            # A log of another file is passed over.
            database = cls(target, readonly_engine(target.path), writable=False)
        else:
            set_stale_log_aside(target.path)
            set_journal_mode(target.path, patience_s=0.0)
            database = cls(target, file_engine(target.path), writable=True)
        database._check()
        database._refresh(settings)

        return database

    @classmethod
    def glance(cls, settings: Settings) -> Self:
        """Open the catalog to be read as it is: nothing is made, brought up to date or waited for.

        :raises CatalogError: there is no catalog, it is of another version, or another process holds it.
        :raises OSError: the file cannot be read.
        """
        target = Target.from_url(settings.database_url)
        if target.path is None and not target.is_sqlite:
            database = cls(target, server_engine(target), writable=False)
        elif target.path is None or peek(target.path) is not Found.CATALOG:
            raise no_catalog(target)
        else:
            database = cls(target, readonly_engine(target.path, patience_s=0.0), writable=False)
        database._check()

        return database

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the catalog.

        :raises CatalogError: the catalog is damaged, or another process holds it.
        :raises OSError: the file cannot be read.
        """
        with self._turns, transaction(self._engine, self._target, write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that may write, and has the write lock from its beginning. All or nothing.

        :raises CatalogError: the catalog cannot be written or is damaged, or another process holds it.
        :raises OSError: the disk is full.
        """
        if not self.writable:
            raise CatalogError(
                f"{self._target} cannot be written by you. Set LADING_DATABASE_URL to a catalog that can."
            )
        with self._turns, transaction(self._engine, self._target, write=True) as connection:
            yield connection

    @classmethod
    def _create(cls, target: Target, settings: Settings) -> Self:
        assert target.path is not None
        target.path.parent.mkdir(parents=True, exist_ok=True)

        database = cls(target, file_engine(target.path, create=True), writable=True)
        with database.write() as connection:
            # Another process may have been first, while this one waited for the lock.
            application_id = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
            objects = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
            born = application_id == APPLICATION_ID
            if not born:
                if objects:
                    raise foreign(target)
                migrate(connection)
                refresh.take_up(connection, settings)

        # Only now: the change of mode is no part of a transaction.
        set_journal_mode(target.path, patience_s=2.0)

        database = cls(target, file_engine(target.path), writable=True)
        if born:
            database._check()
            database._refresh(settings)

        return database

    @classmethod
    def _in_memory(cls, settings: Settings, *, writable: bool) -> Self:
        target = Target.from_url("sqlite://")
        database = cls(target, memory_engine(), writable=True)
        with database.write() as connection:
            migrate(connection)
            refresh.take_up(connection, settings)
        database.writable = writable

        return database

    @classmethod
    def _open_elsewhere(cls, target: Target, settings: Settings) -> Self:
        if target.is_sqlite:
            return cls._in_memory(settings, writable=True)

        database = cls(target, server_engine(target), writable=True)
        with database.read() as connection:
            found = version_of(connection)
        if found == 0:
            with database.write() as connection:
                if version_of(connection) == 0:
                    migrate(connection)
        database._check()
        database._refresh(settings)

        return database

    def _check(self) -> None:
        with self.read() as connection:
            check_version(version_of(connection), self._target)
            check_objects(connection, self._target)

    def _refresh(self, settings: Settings) -> None:
        with self.read() as connection:
            news = refresh.look(connection, settings)
        if not news or not self.writable:
            for line in news.warnings.values():
                _log.warning("%s", line)
            if news.changed or news.gone:
                _log.warning("Your card files changed, but the catalog %s cannot be written by you.", self._target)
            return

        try:
            with self.write() as connection:
                refresh.take_up(connection, settings)
        except (CatalogError, OSError) as error:
            # What is there already can be used all the same.
            _log.warning("The catalog %s could not be brought up to date: %s", self._target, error)


def _nowhere(target: Target, error: OSError) -> CatalogError:
    assert target.path is not None
    return CatalogError(
        f"The catalog is expected to be a file at {target}, but {target.path.parent} cannot be a folder "
        f"({error.strerror}). Set LADING_DATABASE_URL to another place."
    )
