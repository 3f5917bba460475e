"""The read-only session for queries of the catalog's rows in Python.

It has two fences: the session refuses a flush, a commit and a statement that writes before they reach the database; and
the database itself refuses writes that do not come through the session, such as SQL as text.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, event, exc, inspect
from sqlalchemy.orm import ORMExecuteState, Session, UOWTransaction

from lading.catalog.database.failures import primary_code
from lading.catalog.own_store import CardStore, open_store
from lading.errors import PolicyError, QueryError

_CALLS = {
    "sources": "import_cards",
    "families": "import_cards",
    "architectures": "import_cards",
    "cards": "import_cards",
    "card_checkpoints": "index_checkpoint",
    "checkpoints": "index_checkpoint",
    "shards": "index_checkpoint",
    "tensors": "index_checkpoint",
    "pieces": "index_checkpoint",
    "validators": "index_checkpoint",
    "copies": "pull_model, adopt_checkpoints or remove_model",
    "artifacts": "adopt_checkpoints",
    "digests": "verify_model",
    "digest_documents": "index_checkpoint",
    "verifications": "verify_model",
}
"""The public functions that write each table."""


class ReadOnlySession(Session):
    """A session that refuses to write."""


@contextmanager
def session(store: CardStore | None = None) -> Iterator[Session]:
    """Open a session that queries the rows of the catalog.

    All queries of a session see one state of the catalog. The columns of a row stay available after the session;
    read its relationships within it.

    :param store: the catalog to query. Default: the one that the environment names.

    :raises PolicyError: a write; the message names the function that does it.
    :raises QueryError: the database does not understand SQL text.
    :raises CatalogError: the catalog is damaged, or another process holds it.
    """
    database = open_store(store).database
    with (
        database.read() as connection,
        _read_only(connection),
        ReadOnlySession(connection, join_transaction_mode="create_savepoint") as opened,
    ):
        yield opened
        opened.flush()  # changed rows that were never written are an error, too


@contextmanager
def _read_only(connection: Connection) -> Iterator[None]:
    on_sqlite = connection.dialect.name == "sqlite"
    connection.exec_driver_sql("PRAGMA query_only = ON" if on_sqlite else "SET TRANSACTION READ ONLY")
    try:
        yield
    except exc.DBAPIError as error:
        if _is_refused_write(error.orig):
            raise _refused(None) from error
        if isinstance(error, exc.ProgrammingError) or _is_unintelligible(error.orig):
            raise QueryError(f"{str(error.orig).rstrip('.')}. `docs/reference/sql.md` describes the tables.") from error
        raise
    finally:
        if on_sqlite:  # a catalog in memory uses its one connection again
            connection.exec_driver_sql("PRAGMA query_only = OFF")


def _is_refused_write(error: BaseException | None) -> bool:
    if isinstance(error, sqlite3.Error):
        return primary_code(error) == sqlite3.SQLITE_READONLY

    return getattr(error, "sqlstate", None) == "25006"


def _is_unintelligible(error: BaseException | None) -> bool:
    return isinstance(error, sqlite3.Error) and primary_code(error) == sqlite3.SQLITE_ERROR


def _refused(table: str | None) -> PolicyError:
    call = _CALLS.get(table or "")
    what = f"so {table} cannot be written with it" if table else "so this is refused"
    how = call or "import_cards, index_checkpoint, pull_model, verify_model or remove_model"

    return PolicyError(f"The session of `lading.catalog` only reads, {what}. Use {how} of `lading`.")


@event.listens_for(ReadOnlySession, "before_flush")
def _refuse_flush(session: Session, context: UOWTransaction, instances: object) -> None:
    row = next(iter([*session.new, *session.dirty, *session.deleted]))

    raise _refused(str(inspect(row).mapper.local_table))


@event.listens_for(ReadOnlySession, "before_commit")
def _refuse_commit(session: Session) -> None:
    session.flush()  # raises for changed rows, and names their table

    raise _refused(None)


@event.listens_for(ReadOnlySession, "do_orm_execute")
def _refuse_statement(state: ORMExecuteState) -> None:
    if state.is_insert or state.is_update or state.is_delete:
        raise _refused(str(getattr(state.statement, "table", "")))
