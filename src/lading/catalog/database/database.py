"""The catalog's database, open and up to date, with transactions that read and write."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session

from lading.catalog.database.connection import transaction
from lading.catalog.database.target import Target
from lading.errors import CatalogError
from lading.system.settings import Settings


class Database:
    """An open catalog with the schema of this code.

    It keeps no connection, so threads may share it and it survives a fork; each transaction makes its own.
    """

    def __init__(self, target: Target, engine: Engine, *, writable: bool, settings: Settings) -> None:
        self.target = target
        self._engine = engine
        # A database in memory has one connection, whose users take turns.
        self._turns: AbstractContextManager[object] = (
            threading.RLock() if target.is_sqlite and target.path is None else nullcontext()
        )
        self.writable = writable
        """``True`` if :meth:`write` works."""
        self.settings = settings
        """The settings that it was opened with."""

    @property
    def url(self) -> str:
        """The URL of the database, without a password and without parameters."""
        return self.target.shown_url

    @property
    def path(self) -> Path | None:
        """The file of the database; ``None`` for a server, and for one in memory."""
        return self.target.path

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the catalog.

        :raises CatalogError: the catalog is damaged, or another process holds it.
        :raises OSError: the file cannot be read.
        """
        with self._turns, transaction(self._engine, self.target, write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Open a transaction that may write, and has the write lock from its beginning. All or nothing.

        :raises CatalogError: the catalog cannot be written or is damaged, or another process holds it.
        :raises OSError: the disk is full.
        """
        self.require_writable()
        with self._turns, transaction(self._engine, self.target, write=True) as connection:
            yield connection

    def require_writable(self) -> None:
        """Require that the catalog can be written, before work whose result it is to keep.

        :raises CatalogError: it cannot.
        """
        if not self.writable:
            raise CatalogError(
                f"The catalog {self.url} cannot be written. Check the permissions of the file and its folder, or name "
                "another one in LADING_DATABASE_URL."
            )

    @contextmanager
    def session(self, *, write: bool = False) -> Iterator[Session]:
        """Open a session in its own transaction, that of :meth:`read` or of :meth:`write`, whose errors it raises.

        The transaction ends with the session: the body need not commit, and a failure of the body undoes everything.
        """
        with self.write() if write else self.read() as connection, Session(connection) as session:
            yield session
            session.flush()
