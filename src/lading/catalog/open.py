"""Opening the catalog: lading creates it on first use, updates it, or keeps it in memory if it cannot make a file."""

from __future__ import annotations

import errno
import logging

from sqlalchemy import Connection

from lading.catalog.database.connection import (
    file_engine,
    memory_engine,
    readonly_engine,
    server_engine,
    set_journal_mode,
)
from lading.catalog.database.database import Database
from lading.catalog.database.journal import set_stale_log_aside
from lading.catalog.database.migrate import check_objects, migrate, version_of
from lading.catalog.database.target import (
    APPLICATION_ID,
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

_log = logging.getLogger("lading")

_CANNOT_WRITE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_FOLDER = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST)


def open_catalog(settings: Settings) -> Database:
    """Open the catalog, create it on first use, and update it from the package and the user's card files.

    If the catalog does not exist and cannot be made, this warns and keeps the built-in cards in memory.

    :raises CatalogError: the file is something else, is damaged, or was changed by something other than lading.
    :raises CatalogOutdatedError: the schema is older or newer than this code.
    :raises OSError: the disk is full, or the file cannot be read.
    """
    if settings.database_url is None:
        _log.warning(
            "No catalog can be made, as this user has no home folder, so the built-in cards are used and nothing "
            "is kept. Set LADING_DATABASE_URL to a place that can be written."
        )
        return _in_memory(settings, is_writable=False)

    target = Target.from_url(settings.database_url)
    if target.path is None:
        return _open_elsewhere(target, settings)

    try:
        found = peek(target.path)
    except NotADirectoryError as error:
        raise _nowhere(target, error) from error
    if found is Found.FOREIGN:
        raise foreign(target)
    if found is Found.NOTHING:
        try:
            return _create(target, settings)
        except OSError as error:
            if error.errno in _NO_FOLDER:
                raise _nowhere(target, error) from error
            if error.errno not in _CANNOT_WRITE:
                raise
            _log.warning(
                "No catalog can be made at %s (%s), so the built-in cards are used and nothing is kept. Set "
                "LADING_DATABASE_URL to a place that can be written.", target, error.strerror,
            )  # fmt: skip
            return _in_memory(settings, is_writable=False)

    if not writable(target.path):
        # This ignores a log of another file.
        database = Database(target, readonly_engine(target.path), writable=False, settings=settings)
    else:
        set_stale_log_aside(target.path)
        set_journal_mode(target.path, patience_s=0.0)
        database = Database(target, file_engine(target.path), writable=True, settings=settings)
    _refresh(database, settings)

    return database


def open_catalog_readonly(settings: Settings) -> Database:
    """Open the catalog to read it as it is, without creating it, updating it or waiting.

    :raises CatalogError: the catalog does not exist, it is of another version, or another process holds it.
    :raises OSError: the file cannot be read.
    """
    target = Target.from_url(settings.database_url)
    if target.path is None and not target.is_sqlite:
        database = Database(target, server_engine(target), writable=False, settings=settings)
    elif target.path is None or peek(target.path) is not Found.CATALOG:
        raise no_catalog(target)
    else:
        database = Database(target, readonly_engine(target.path, patience_s=0.0), writable=False, settings=settings)
    with database.read() as connection:
        _require_current(connection, target)

    return database


def _create(target: Target, settings: Settings) -> Database:
    assert target.path is not None
    target.path.parent.mkdir(parents=True, exist_ok=True)

    database = Database(target, file_engine(target.path, create=True), writable=True, settings=settings)
    with database.session(write=True) as session:
        connection = session.connection()
        # Another process may have been first, while this one waited for the lock.
        application_id = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        objects = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        born = application_id == APPLICATION_ID
        if not born:
            if objects:
                raise foreign(target)
            migrate(connection)
            refresh.apply_changes(session, settings)

    # Only now: a transaction cannot contain the change of mode.
    set_journal_mode(target.path, patience_s=2.0)

    database = Database(target, file_engine(target.path), writable=True, settings=settings)
    if born:
        _refresh(database, settings)

    return database


def _in_memory(settings: Settings, *, is_writable: bool) -> Database:
    target = Target.from_url("sqlite://")
    database = Database(target, memory_engine(), writable=True, settings=settings)
    with database.session(write=True) as session:
        migrate(session.connection())
        refresh.apply_changes(session, settings)
    database.writable = is_writable

    return database


def _open_elsewhere(target: Target, settings: Settings) -> Database:
    if target.is_sqlite:
        return _in_memory(settings, is_writable=True)

    database = Database(target, server_engine(target), writable=True, settings=settings)
    with database.read() as connection:
        found = version_of(connection)
    if found == 0:
        with database.write() as connection:
            if version_of(connection) == 0:
                migrate(connection)
    _refresh(database, settings)

    return database


def _require_current(connection: Connection, target: Target) -> None:
    check_version(version_of(connection), target)
    check_objects(connection, target)


def _refresh(database: Database, settings: Settings) -> None:
    """Update a catalog, once its schema is that of this code."""
    with database.session() as session:
        _require_current(session.connection(), database.target)
        news = refresh.find_changes(session, settings)
    if not news or not database.writable:
        for line in news.warnings.values():
            _log.warning("%s", line)
        if news.changed or news.gone:
            _log.warning("Your card files changed, but the catalog %s cannot be written by you.", database.target)
        return

    try:
        with database.session(write=True) as session:
            refresh.apply_changes(session, settings)
    except (CatalogError, OSError) as error:
        # The catalog works as it is all the same.
        _log.warning("The catalog %s could not be brought up to date: %s", database.target, error)


def _nowhere(target: Target, error: OSError) -> CatalogError:
    assert target.path is not None
    return CatalogError(
        f"The catalog is expected to be a file at {target}, but {target.path.parent} cannot be a folder "
        f"({error.strerror}). Set LADING_DATABASE_URL to another place."
    )
