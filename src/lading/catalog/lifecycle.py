"""The life of a catalog's schema: made, brought up to date, brought back, checked and backed up.

Alembic is imported only here, and only when one of these things is done: opening a catalog compares two numbers.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, inspect, text

from lading.catalog.engine import (
    connect_readonly,
    file_engine,
    memory_engine,
    readonly_engine,
    server_engine,
    transaction,
)
from lading.catalog.failures import translated
from lading.catalog.resolved import stale_columns
from lading.catalog.search import is_not_index, stale_index
from lading.catalog.target import SCHEMA_VERSION, Found, Target, check_version, foreign, peek
from lading.errors import CatalogError
from lading.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "lading_version"
"""Alembic's own table; not its default name, as a server's schema may be shared with another user of Alembic."""

_SCRIPTS = "lading.migrations"

_alembic_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeReport:
    """What an upgrade did."""

    from_version: int
    """Zero where there was no catalog."""
    to_version: int
    backup: Path | None
    """The copy that was taken before; ``None`` where nothing was changed, or nothing was there."""


# --- versions --------------------------------------------------------------------------------------------------------


def migrate(connection: Connection, revision: str = "head", *, down: bool = False) -> None:
    """Run migrations in the transaction that ``connection`` is in.

    :raises CatalogError: there is no such revision.
    """
    from alembic import command
    from alembic.util import CommandError

    config = _config(connection)
    # Alembic keeps the context of a run in module-level variables.
    with _alembic_lock:
        try:
            (command.downgrade if down else command.upgrade)(config, revision)
        except CommandError as error:
            raise CatalogError(f"The schema cannot be brought to version {revision!r}: {error}") from error


def version_of(connection: Connection) -> int:
    """The version of the schema; zero where there is none."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if not inspect(connection).has_table(VERSION_TABLE):
        return 0

    return int(connection.scalar(text(f"SELECT max(version_num) FROM {VERSION_TABLE}")) or 0)


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    # The option goes through a ConfigParser, to which a percent sign is special.
    config.set_main_option("script_location", str(files(_SCRIPTS)).replace("%", "%%"))
    config.attributes["connection"] = connection

    return config


# --- upgrade, downgrade ----------------------------------------------------------------------------------------------


def upgrade(settings: Settings) -> UpgradeReport:
    """Bring the schema of the catalog to the version of this code, after a backup. One transaction: all or nothing.

    :raises CatalogError: the file is no catalog, or is damaged.
    :raises CatalogOutdatedError: the catalog is newer than this code.
    """
    target = Target.from_url(settings.database_url)
    before = _version(target)
    if before > SCHEMA_VERSION:
        check_version(before, target)
    if before == SCHEMA_VERSION:
        return UpgradeReport(from_version=before, to_version=before, backup=None)

    if target.path is not None:
        target.path.parent.mkdir(parents=True, exist_ok=True)
    copy = backup(settings, None) if before and target.path is not None else None
    _move(target, "head", down=False)

    return UpgradeReport(from_version=before, to_version=SCHEMA_VERSION, backup=copy)


def downgrade(settings: Settings, to: str) -> Path | None:
    """Bring the schema back to an older version (``"0"``: to nothing), after a backup.

    :returns: the path of the backup.

    :raises CatalogError: there is no catalog or no such version, or the file is damaged.
    """
    target = Target.from_url(settings.database_url)
    before = _version(target)
    if not before:
        raise CatalogError(f"There is no catalog at {target} that could be downgraded.")
    # Alembic takes other words, too: -1 for the version before.
    if not to.isdecimal() or int(to) > before:
        raise CatalogError(
            f"The schema cannot be brought to version {to!r}: expected a number from 0 to {before}, its own."
        )

    copy = backup(settings, None) if target.path is not None else None
    _move(target, f"{int(to):04d}" if int(to) else "base", down=True)

    return copy


def _move(target: Target, revision: str, *, down: bool) -> None:
    engine = (
        file_engine(target.path, create=True, foreign_keys=False) if target.path is not None else server_engine(target)
    )
    with transaction(engine, target, write=True) as connection:
        migrate(connection, revision, down=down)
        if target.is_sqlite:
            lost = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if lost:
                raise CatalogError(f"{target} has rows that refer to missing ones: {lost[:3]}. Nothing was changed.")


def _version(target: Target) -> int:
    if target.path is None and target.is_sqlite:
        raise CatalogError("A catalog in memory lives as long as its process: it has no versions and no copies.")
    if target.path is not None:
        found = peek(target.path)
        if found is Found.FOREIGN:
            raise foreign(target)
        if found is Found.NOTHING:
            return 0

    with transaction(_engine(target), target, write=False) as connection:
        return version_of(connection)


def _engine(target: Target) -> Engine:
    return server_engine(target) if target.path is None else readonly_engine(target.path)


# --- check -----------------------------------------------------------------------------------------------------------


def check(settings: Settings) -> list[str]:
    """What is wrong with the catalog, one line each: damage, lost references, a schema or columns that drifted.

    :raises CatalogError: there is no catalog, or the file is something else.
    """
    target = Target.from_url(settings.database_url)
    if target.path is not None:
        found = peek(target.path)
        if found is Found.FOREIGN:
            raise foreign(target)
        if found is Found.NOTHING:
            raise CatalogError(f"There is no catalog at {target} yet. `lading list` makes one.")

    try:
        with transaction(_engine(target), target, write=False) as connection:
            version = version_of(connection)
            if version != SCHEMA_VERSION:
                return [f"the schema is of version {version}, but this version of lading works with {SCHEMA_VERSION}"]

            # Each question makes sense only where the one before it found nothing.
            return (
                (_damage(connection) if target.is_sqlite else [])
                or _drift(connection)
                or (_lost_references(connection) if target.is_sqlite else [])
                or stale_columns(connection)
                or stale_index(connection)
            )
    except CatalogError as error:
        return [error.message]


def _damage(connection: Connection) -> list[str]:
    return [f"damage: {line}" for (line,) in connection.exec_driver_sql("PRAGMA integrity_check").all() if line != "ok"]


def _lost_references(connection: Connection) -> list[str]:
    return [
        f"lost reference: row {row} of {table} refers to a missing row of {parent}"
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    ]


def _drift(connection: Connection) -> list[str]:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from lading.catalog.schema import Row

    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "include_name": is_not_index}
    )
    problems = [f"drift: {difference}" for difference in compare_metadata(context, Row.metadata)]
    if connection.dialect.name != "sqlite":
        return problems

    # The comparison above knows neither views nor checks.
    with memory_engine().connect() as other, other.begin():
        migrate(other)
        expected = _objects(other)
    found = _objects(connection)
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            problems.append(f"drift: the {key[0]} {key[1]} is missing")
        elif key not in expected:
            problems.append(f"drift: there is a {key[0]} {key[1]}, which is not of lading")
        elif expected[key] != found[key]:
            problems.append(f"drift: the {key[0]} {key[1]} is not defined as it should be")

    return problems


def _objects(connection: Connection) -> dict[tuple[str, str], str]:
    rows = connection.exec_driver_sql(
        "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"
    )

    return {(kind, name): sql for kind, name, sql in rows}


# --- backup ----------------------------------------------------------------------------------------------------------


def backup(settings: Settings, target: Path | None = None) -> Path:
    """Copy the catalog, which may be in use, and return the path of the copy.

    :param target: a file that is not there yet, or a folder. Default: beside the catalog, under a name that tells its
        version and the time.

    :raises CatalogError: there is no catalog, or it has no file; something is in the copy's place.
    :raises OSError: the copy cannot be written.
    """
    source = Target.from_url(settings.database_url)
    version = _version(source)
    if source.path is None:
        raise CatalogError(f"{source} has no file that could be copied. Use the server's own tool: `pg_dump`.")
    if version == 0 and peek(source.path) is Found.NOTHING:
        raise CatalogError(f"There is no catalog at {source} yet, so there is nothing to copy.")

    name = f"{source.path.stem}.v{version}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{source.path.suffix}"
    if target is None:
        target = source.path.with_name(name)
    elif target.is_dir():
        target = target / name
    if target.exists():
        raise CatalogError(f"{target} exists already; a backup overwrites nothing. Give another name.")

    # A copy that was cut off must not look like a whole one.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with translated(source), closing(connect_readonly(source.path)) as reader, closing(_new(partial)) as copy:
            reader.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        partial.rename(target)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(f"{partial}{suffix}").unlink(missing_ok=True)

    return target


def _new(path: Path) -> sqlite3.Connection:
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder for the backup is not there", str(path.parent))

    return sqlite3.connect(path, isolation_level=None)
