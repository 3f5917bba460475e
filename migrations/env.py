"""Alembic's entry to the migrations, for lading, on a connection that it gives, or for a developer's `alembic`."""

from __future__ import annotations

from typing import Any

from alembic import context
from alembic.migration import MigrationContext
from sqlalchemy import Connection

from lading.catalog.database.connection import file_engine, server_engine, transaction
from lading.catalog.database.migrate import VERSION_TABLE
from lading.catalog.database.target import APPLICATION_ID, Target
from lading.catalog.schema import Row
from lading.catalog.search import is_not_index
from lading.system.settings import Settings


def stamp(ctx: MigrationContext, **event: Any) -> None:
    """Write the version where opening a catalog can read it without Alembic: in the header of the file."""
    if ctx.dialect.name == "sqlite":
        version = max((int(head) for head in event["heads"]), default=0)
        ctx.execute(f"PRAGMA user_version = {version}")
        ctx.execute(f"PRAGMA application_id = {APPLICATION_ID}")


def number(ctx: MigrationContext, revision: Any, directives: list[Any]) -> None:
    """Number a new revision: 0001, 0002 and so on. The last number is lading's SCHEMA_VERSION."""
    head = context.script.get_current_head()
    directives[0].rev_id = f"{int(head or 0) + 1:04d}"


def run(connection: Connection | None, **options: Any) -> None:
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        version_table=VERSION_TABLE,
        include_name=is_not_index,
        # Alembic takes SQLite for a database that cannot undo a change of the schema. It can.
        transactional_ddl=True,
        transaction_per_migration=False,
        render_as_batch=True,
        on_version_apply=stamp,  # type: ignore[arg-type]  # which gives it by keyword
        process_revision_directives=number,
        **options,
    )
    with context.begin_transaction():
        if connection is None or connection.dialect.name != "sqlite":
            context.run_migrations()
            return

        # SQLite changes a table by writing a new one and renaming it; views that name the table would forbid that.
        connection.exec_driver_sql("PRAGMA legacy_alter_table = ON")
        try:
            context.run_migrations()
        finally:
            connection.exec_driver_sql("PRAGMA legacy_alter_table = OFF")


given: Connection | None = context.config.attributes.get("connection")

if given is not None:
    run(given)
elif context.is_offline_mode():
    run(None, url=Settings.from_environment().database_url, literal_binds=True)
else:
    target = Target.from_url(Settings.from_environment().database_url)
    engine = server_engine(target) if target.path is None else file_engine(target.path, create=True, foreign_keys=False)
    with transaction(engine, target, write=True) as own:
        run(own)
