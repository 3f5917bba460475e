"""The check of a catalog: undamaged, with the schema that the migrations make, its columns up to date."""

from __future__ import annotations

import warnings

from sqlalchemy import Connection, exc
from sqlalchemy.orm import Session

from lading.catalog.database.connection import transaction
from lading.catalog.database.migrate import (
    VERSION_TABLE,
    alterations,
    damage,
    engine_for,
    lost_references,
    path_exists,
    version_of,
)
from lading.catalog.database.target import (
    SCHEMA_VERSION,
    Target,
    no_catalog,
)
from lading.catalog.importing.derived import stale_columns
from lading.catalog.search import is_not_index, stale_index
from lading.errors import CatalogError
from lading.system.settings import Settings


def check_catalog(settings: Settings) -> list[str]:
    """Return the problems of the catalog, one line each: damage, lost references, a schema or columns that drifted.

    :raises CatalogError: the catalog does not exist, or the file is something else.
    """
    target = Target.from_url(settings.database_url)
    if (target.path is not None or not target.is_sqlite) and not path_exists(target):
        raise no_catalog(target)

    try:
        with transaction(engine_for(target), target, write=False) as connection:
            version = version_of(connection)
            if version != SCHEMA_VERSION:
                return [
                    f"the schema is of version {version}, but this version of lading works with {SCHEMA_VERSION}"
                    + ("; `lading db upgrade` brings it up to date" if version < SCHEMA_VERSION else "")
                ]

            # Each check makes sense only if the one before it found nothing.
            return (
                # Definitions first: a search for damage evaluates the expressions of tables and indexes.
                _drift(connection)
                or (damage(connection) if target.is_sqlite else [])
                or (lost_references(connection) if target.is_sqlite else [])
                or stale_columns(Session(connection))
                or stale_index(connection)
            )
    except CatalogError as error:
        return [error.message]


def _drift(connection: Connection) -> list[str]:
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from lading.catalog.schema import Row

    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "include_name": is_not_index}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exc.SAWarning)  # about foreign indexes that it cannot compare
        problems = [f"drift: {difference}" for difference in compare_metadata(context, Row.metadata)]
    if connection.dialect.name == "sqlite":
        # The comparison above covers neither views nor triggers nor check constraints.
        problems += [f"drift: {line}" for line in alterations(connection)]

    return problems
