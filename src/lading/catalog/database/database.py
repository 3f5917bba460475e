"""The catalog's database as the rest of lading holds it: opened, up to date, with a way to read and a way to write."""

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
    """A catalog that was opened, and whose schema is the one that this code knows.

    It holds no connection, so it may be shared between threads and survives a fork; each transaction makes its own.
    """

    def __init__(self, target: Target, engine: Engine, *, writable: bool, settings: Settings) -> None:
        self._target = target
        self._engine = engine
        # A database in memory has one connection, which its users take in turns.
        self._turns: AbstractContextManager[object] = (
            threading.RLock() if target.is_sqlite and target.path is None else nullcontext()
        )
        self.writable = writable
        """Whether :meth:`write` can be called."""
        self.settings = settings
        """The settings that it was opened with."""

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

    @contextmanager
    def session(self, *, write: bool = False) -> Iterator[Session]:
        """Open a session in a transaction of its own, that of :meth:`read` or of :meth:`write`, whose errors it raises.

        The transaction ends with the session: there is nothing to commit, and where the body fails nothing is kept.
        """
        with self.write() if write else self.read() as connection, Session(connection) as session:
            yield session
            session.flush()
