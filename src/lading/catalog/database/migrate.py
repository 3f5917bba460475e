"""Upgrades, downgrades, checks, backups and restores of a catalog.

Only this module imports Alembic, and only when one of these runs: opening a catalog compares two numbers.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, Engine, inspect, text

from lading.catalog.database.connection import (
    connect_readonly,
    file_engine,
    memory_engine,
    readonly_engine,
    server_engine,
    set_journal_mode,
    transaction,
)
from lading.catalog.database.failures import primary_code, translated
from lading.catalog.database.journal import SUFFIXES, beside, set_stale_log_aside
from lading.catalog.database.objects import SCHEMA_DIGEST, Objects, altered, differences, digest_of, objects_of
from lading.catalog.database.target import (
    BUSY_TIMEOUT_S,
    SCHEMA_VERSION,
    Found,
    Target,
    check_version,
    connect,
    foreign,
    no_catalog,
    peek,
    writable,
)
from lading.errors import CatalogError
from lading.system.settings import Settings

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "lading_version"
"""Alembic's own table; not its default name, as a server's schema may be shared with another user of Alembic."""

_SCRIPTS = "lading.migrations"

_alembic_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class UpgradeReport:
    """The result of an upgrade."""

    from_version: int
    """The version before; zero if there was no catalog."""
    to_version: int
    backup: Path | None
    """The copy made before; ``None`` if nothing changed, or nothing was there."""


# --- versions ---------------------------------------------------------------------------------------------------------


def migrate(connection: Connection, revision: str = "head", *, down: bool = False) -> None:
    """Run migrations in the transaction that ``connection`` is in.

    :raises CatalogError: the revision does not exist.
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
    """Return the version of the schema; zero without a schema."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())

    return _recorded_version(connection) if inspect(connection).has_table(VERSION_TABLE) else 0


def _recorded_version(connection: Connection) -> int:
    """Return the version that Alembic recorded, from which migrations begin."""
    found = connection.scalar(text(f"SELECT max(version_num) FROM {VERSION_TABLE}")) or 0
    try:
        return int(found)
    except ValueError:
        raise CatalogError(f"The catalog is damaged: {found!r} is not a version of its schema.") from None


def check_objects(connection: Connection, target: Target) -> None:
    """Check that a SQLite catalog has the tables, indexes, views and triggers that the migrations make, and no others.

    :raises CatalogError: it differs.
    """
    if target.is_sqlite and (problems := alterations(connection)):
        raise altered(target, problems)


def alterations(connection: Connection) -> list[str]:
    found = objects_of(connection)
    # A matching digest saves a run of the migrations. Another version of SQLite may write the same schema differently.
    return [] if digest_of(found) == SCHEMA_DIGEST else differences(_expected_objects(SCHEMA_VERSION), found)


def _expected_objects(version: int) -> Objects:
    """Return the objects that the migrations make up to a version."""
    if version == 0:
        return {}
    with memory_engine().connect() as connection, connection.begin():
        migrate(connection, f"{version:04d}")
        return objects_of(connection)


def _true_version(connection: Connection, target: Target) -> int:
    """Return the version whose objects a catalog has, regardless of the header of the file.

    :raises CatalogError: no version has these objects.
    """
    if not target.is_sqlite:
        version = version_of(connection)
        if version > SCHEMA_VERSION:
            check_version(version, target)
        return version

    found = objects_of(connection)
    version = _recorded_version(connection) if ("table", VERSION_TABLE) in found else 0
    if max(version, version_of(connection)) > SCHEMA_VERSION:
        check_version(max(version, version_of(connection)), target)
    expected = _expected_objects(version)
    if not version and found:
        # Alembic keeps its table when all else is gone.
        table = ("table", VERSION_TABLE)
        expected = {table: _expected_objects(1)[table]}
    if problems := differences(expected, found):
        raise altered(target, problems)

    return version


def _config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    # The option goes through a ConfigParser, which interprets percent signs.
    config.set_main_option("script_location", str(files(_SCRIPTS)).replace("%", "%%"))
    config.attributes["connection"] = connection

    return config


# --- upgrade, downgrade -----------------------------------------------------------------------------------------------


def upgrade(settings: Settings) -> UpgradeReport:
    """Bring the schema of the catalog to the version of this code, after a backup. One transaction: all or nothing.

    :raises CatalogError: the file is not a catalog, or is damaged.
    :raises CatalogOutdatedError: the catalog is newer than this code.
    """
    target = Target.from_url(settings.database_url)
    before, true = _versions(target)
    if before == true == SCHEMA_VERSION:
        return UpgradeReport(from_version=before, to_version=before, backup=None)

    if target.path is not None:
        target.path.parent.mkdir(parents=True, exist_ok=True)
    copy = backup(settings, None) if true and target.path is not None else None
    _move(target, SCHEMA_VERSION, down=False)

    return UpgradeReport(from_version=min(before, true), to_version=SCHEMA_VERSION, backup=copy)


def downgrade(settings: Settings, to: str) -> Path | None:
    """Bring the schema back to an older version (``"0"``: to nothing), after a backup.

    :returns: the path of the backup.

    :raises CatalogError: the catalog or the version does not exist, or the file is damaged.
    """
    target = Target.from_url(settings.database_url)
    before, true = _versions(target)
    if not true:
        raise no_catalog(target)
    if before != true:
        raise CatalogError(
            f"The header of {target} says version {before}, but its schema is of version {true}. Run "
            "`lading db upgrade` first."
        )
    # Alembic accepts more: -1 for the version before.
    if not to.isdecimal() or int(to) > before:
        raise CatalogError(
            f"The schema cannot be brought to version {to!r}: expected a number from 0 to {before}, its own. "
            "Give one of these: `lading db downgrade --to VERSION`."
        )

    copy = backup(settings, None) if target.path is not None else None
    _move(target, int(to), down=True)

    return copy


def _move(target: Target, version: int, *, down: bool) -> None:
    engine = (
        file_engine(target.path, create=True, foreign_keys=False) if target.path is not None else server_engine(target)
    )
    with transaction(engine, target, write=True) as connection:
        _true_version(connection, target)
        migrate(connection, f"{version:04d}" if version else "base", down=down)
        if target.is_sqlite:
            # The migrations write it, too, but there may be none to run.
            connection.exec_driver_sql(f"PRAGMA user_version = {version}")
            lost = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            if lost:
                raise CatalogError(f"{target} has rows that refer to missing ones: {lost[:3]}. Nothing was changed.")


def _versions(target: Target) -> tuple[int, int]:
    """Return the version that the catalog claims, and the one of its schema; zeros without a catalog.

    :raises CatalogError: the file is something else, is damaged, or its schema is not that of any version.
    :raises CatalogOutdatedError: the catalog is newer than this code.
    """
    if not path_exists(target):
        return 0, 0

    with transaction(engine_for(target), target, write=False) as connection:
        return version_of(connection), _true_version(connection, target)


def path_exists(target: Target) -> bool:
    """Return whether there is a catalog, after setting aside the log of another file beside it."""
    if target.path is None and target.is_sqlite:
        raise CatalogError(
            "A catalog in memory lives as long as its process: it has no versions and no copies. "
            "Name a file in LADING_DATABASE_URL."
        )
    if target.path is None:
        return True

    found = peek(target.path)
    if found is Found.FOREIGN:
        raise foreign(target)
    if found is Found.CATALOG and writable(target.path):
        set_stale_log_aside(target.path)

    return found is Found.CATALOG


def engine_for(target: Target) -> Engine:
    return server_engine(target) if target.path is None else readonly_engine(target.path)


# --- backup -----------------------------------------------------------------------------------------------------------


def backup(settings: Settings, target: Path | None = None) -> Path:
    """Copy the catalog, even while it is in use, and return the path of the copy.

    :param target: a file that does not exist yet, or a folder. Default: beside the catalog, under a name with its
        version and the time.

    :raises CatalogError: the catalog does not exist, or has no file; the path of the copy exists already.
    :raises OSError: the copy cannot be written.
    """
    source = Target.from_url(settings.database_url)
    there = path_exists(source)
    if source.path is None:
        raise CatalogError(f"{source} has no file that could be copied. Use the server's own tool: `pg_dump`.")
    if not there:
        raise no_catalog(source)

    with transaction(engine_for(source), source, write=False) as connection:
        version = version_of(connection)
    name = f"{source.path.stem}.v{version}.{_stamp()}{source.path.suffix}"
    if target is None:
        target = source.path.with_name(name)
    elif target.is_dir():
        target = target / name
    if target.exists():
        raise CatalogError(f"{target} exists already; a backup overwrites nothing. Give another name.")

    # An incomplete copy must not look like a complete one.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with translated(source), closing(connect_readonly(source.path)) as reader, closing(_new(partial)) as copy:
            reader.backup(copy, progress=_impatient())
            copy.execute("PRAGMA journal_mode = DELETE")
        partial.rename(target)
    finally:
        for suffix in ("", *SUFFIXES):
            Path(f"{partial}{suffix}").unlink(missing_ok=True)

    return target


def _new(path: Path) -> sqlite3.Connection:
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "The folder for the backup is not there", str(path.parent))

    return sqlite3.connect(path, isolation_level=None)


def _stamp() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"


def _impatient() -> Callable[[int, int, int], None]:
    """Return a callback that ends a copy that waits for another process; the driver would wait forever."""
    end = time.monotonic() + BUSY_TIMEOUT_S

    def look(status: int, left: int, pages: int) -> None:
        if status in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) and time.monotonic() > end:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = status
            raise error

    return look


# --- restore ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """The result of a restore."""

    version: int
    """The version of the schema, perhaps older than that of this code."""
    backup: Path | None
    """The copy of what was there before; ``None`` if nothing was there."""


def restore(settings: Settings, file: Path) -> RestoreReport:
    """Replace the catalog, even one in use or damaged, with a backup. All or nothing.

    This checks the backup first, and keeps a copy of what it replaces beside it. SQLite itself overwrites the catalog,
    and so respects its log and the locks of other processes.

    :param file: a backup of a catalog, with its own log if it has one.

    :raises CatalogError: the file is not a good catalog, or the catalog has no file; nothing was changed.
    :raises CatalogOutdatedError: the backup is newer than this code.
    :raises FileNotFoundError: the file does not exist.
    :raises OSError: the catalog cannot be written.
    """
    target = Target.from_url(settings.database_url)
    if target.path is None:
        what = "is in memory" if target.is_sqlite else "is on a server, whose own tool is `pg_restore`"
        raise CatalogError(
            f"{target} has no file that a backup could take the place of: it {what}. "
            "Name a file in LADING_DATABASE_URL."
        )
    file = file.absolute()
    source = Target(url=URL.create("sqlite", database=str(file)), path=file)
    if not file.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    if peek(file) is not Found.CATALOG:
        raise CatalogError(
            f"{file} is expected to be a backup of a catalog, but is another kind of file. "
            "Give one that `lading db backup` made."
        )
    there = path_exists(target)
    if there and file.samefile(target.path):
        raise CatalogError(f"{target} is the catalog itself. Give the file of a backup: `lading db backup` makes one.")

    with translated(source), closing(connect_readonly(file)) as reader:
        version = _checked(source)
        target.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _keep(settings, target.path) if there else None
        with translated(target), closing(connect(target.path, "mode=rwc")) as writer:
            reader.backup(writer, progress=_impatient())
    set_journal_mode(target.path, patience_s=2.0)

    return RestoreReport(version=version, backup=kept)


def _checked(source: Target) -> int:
    """Check that a backup is complete and return its version."""
    with transaction(engine_for(source), source, write=False) as connection:
        version = _true_version(connection, source)
        problems = damage(connection) or lost_references(connection)
    if not version:
        problems = ["it holds no schema"]
    if problems:
        raise CatalogError(f"{source} is not a whole catalog: {problems[0]}. Nothing was changed; use another backup.")

    return version


def _keep(settings: Settings, path: Path) -> Path:
    """Copy the catalog before it is overwritten; move it and its logs away if it is too damaged for a copy."""
    if _is_legible(path):
        return backup(settings, None)

    kept = path.with_name(f"{path.stem}.damaged.{_stamp()}{path.suffix}")
    logs = {beside(path, suffix): Path(f"{kept}{suffix}") for suffix in SUFFIXES}
    # The file first: SQLite removes a log without a database beside it.
    path.rename(kept)
    for log, other in logs.items():
        if log.exists():
            log.rename(other)

    return kept


def _is_legible(path: Path) -> bool:
    """Return whether SQLite can work with a file at all."""
    try:
        with closing(connect(path, "mode=rw")) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.DatabaseError as error:
        # `SQLITE_ERROR` is a schema that cannot be parsed.
        return primary_code(error) not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
    except UnicodeDecodeError:
        return False

    return True


def damage(connection: Connection) -> list[str]:
    return [f"damage: {line}" for (line,) in connection.exec_driver_sql("PRAGMA integrity_check").all() if line != "ok"]


def lost_references(connection: Connection) -> list[str]:
    return [
        f"lost reference: row {row} of {table} refers to a missing row of {parent}"
        for table, row, parent, _ in connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    ]
