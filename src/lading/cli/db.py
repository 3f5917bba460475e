"""`lading db`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import Group
from lading.cli.failure import CATALOG
from lading.cli.options import GivenPath
from lading.cli.output import note, printable

if TYPE_CHECKING:
    from lading.system.settings import Settings


@click.group("db", cls=Group)
def db() -> None:
    """Maintain the catalog's database.

    For example: lading db check
    """


@db.command("path")
def path() -> None:
    """Print the path of the catalog, or its URL without the password.

    For example: sqlite3 "$(lading db path)" .tables
    """
    from lading.catalog.database.target import Target

    target = Target.from_url(_settings().database_url)
    # A path may not be valid text, so it is printed as bytes.
    click.echo(printable(target.shown_url) if target.path is None else os.fsencode(target.path))


@db.command("upgrade")
def upgrade() -> None:
    """Upgrade the schema to the version of this package, after a backup.

    For example: lading db upgrade
    """
    from lading.catalog.database import migrate

    report = migrate.upgrade(_settings())
    _say_backup(report.backup)
    if report.from_version == report.to_version:
        note(f"the catalog already has version {report.to_version}")
    else:
        note(f"from version {report.from_version} to {report.to_version}")


@db.command("downgrade")
@click.option("--to", "version", required=True, metavar="VERSION", help="The version of an older package.")
def downgrade(version: str) -> None:
    """Downgrade the schema to an older VERSION, after a backup.

    Data that the older schema cannot hold is lost.

    For example: lading db downgrade --to 1
    """
    from lading.catalog.database import migrate

    _say_backup(migrate.downgrade(_settings(), version))
    note(f"the catalog now has version {version}")


@db.command("check")
def check() -> None:
    """Check that the database is undamaged and has this package's schema.

    For example: lading db check
    """
    from lading.catalog.check import check_catalog

    problems = check_catalog(_settings())
    if not problems:
        click.echo("ok")
        return

    for problem in problems:
        click.echo(printable(problem))
    if not any("`lading db" in problem for problem in problems):
        note("`lading db restore FILE` replaces the catalog with a backup")
    click.get_current_context().exit(CATALOG)


@db.command("backup")
@click.argument("file", required=False, type=GivenPath(path_type=Path))
def backup(file: Path | None) -> None:
    """Copy the database, and print where the copy is.

    The database may be in use. FILE is a folder, or a file that does not exist; the default is a file beside the
    database.

    For example: lading db backup catalog-backup.sqlite
    """
    from lading.catalog.database import migrate

    click.echo(str(migrate.backup(_settings(), file)))


@db.command("restore")
@click.argument("file", type=GivenPath(path_type=Path))
def restore(file: Path) -> None:
    """Replace the catalog with a backup, after a check of the backup.

    The catalog may be in use or damaged; a copy of it is kept. Do not copy a backup over the catalog by hand: SQLite's
    log beside the catalog can undo that.

    For example: lading db restore catalog-backup.sqlite
    """
    from lading.catalog.database import migrate
    from lading.catalog.database.target import SCHEMA_VERSION

    report = migrate.restore(_settings(), file)
    _say_backup(report.backup)
    note(f"restored {printable(str(file))}, of version {report.version}")
    if report.version < SCHEMA_VERSION:
        note("`lading db upgrade` brings it up to date")


def _settings() -> Settings:
    from lading.system.settings import Settings

    return Settings.from_environment()


def _say_backup(path: Path | None) -> None:
    if path is not None:
        note(f"the old catalog is in {printable(str(path))}")
