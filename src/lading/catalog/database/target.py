"""The place of a catalog, and what is there: nothing, a catalog of some version, or something else."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import struct
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Self
from urllib.parse import quote, quote_plus

from sqlalchemy import URL, exc, make_url

from lading.catalog.database.journal import HEADER_SIZE, read_header
from lading.errors import CatalogError, CatalogOutdatedError
from lading.system.filesystem import storage_path

SCHEMA_VERSION = 11
"""The version of the schema that this code works with: the number of the last migration."""

APPLICATION_ID = int.from_bytes(b"ldng", "big")
"""The mark in the header of a catalog file, which other databases lack."""

_HARMLESS = re.compile(r"[\w.+-]*(:/*)?[\w./~ -]*")
"""Text that cannot contain a password: it has no account, port or parameters."""

_SECRETS = re.compile(r"pass|secret|token", re.IGNORECASE)
"""Parameters of a URL whose values must stay hidden, such as ``password`` and ``sslpassword``."""

BUSY_TIMEOUT_S = 30.0
"""The longest wait of a connection for the lock of another one, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The place of a catalog."""

    url: URL = field(repr=False)
    path: Path | None
    """The file of a SQLite database; ``None`` for a server, and for one in memory."""

    @classmethod
    def from_url(cls, text: str | None) -> Self:
        """Read a database URL.

        :param text: ``None`` without a URL, as for a user without a home.

        :raises CatalogError: not a URL, or one that a driver would read differently. The message shows nothing that may
            be a password.
        """
        if text is None:
            raise CatalogError(
                "The place of the catalog is unknown: this user has no home folder. Set LADING_DATABASE_URL to a place "
                "that can be written, such as sqlite:////data/catalog.sqlite."
            )
        try:
            url = make_url(text)
        except (exc.ArgumentError, ValueError):  # the latter for a port that is not a number
            shown = repr(text) if _HARMLESS.fullmatch(text) else "something else, not shown as it may hold a password"
            raise CatalogError(
                f"LADING_DATABASE_URL is expected to be a URL such as sqlite:////data/catalog.sqlite or "
                f"postgresql+psycopg://user@host/lading, but is {shown}. Set it "
                "to one, or unset it."
            ) from None

        if url.get_backend_name() == "sqlite":
            return cls._sqlite(url, text)
        # Parsing takes parts of an unquoted password for the host, the database or a parameter, which messages show.
        if text.count("@") > 1:
            raise CatalogError(
                "LADING_DATABASE_URL is expected to have one `@`, before the host, but has more. Write those of a name "
                "or a password as %40."
            )

        return cls(url=url, path=None)

    @classmethod
    def _sqlite(cls, url: URL, text: str) -> Self:
        # A folder may have a `?` in its name, as that of the user's data may; SQLAlchemy takes it for parameters.
        shown, options, _ = text[text.rfind("/") :].partition("?")
        if options:
            raise CatalogError(
                f"A SQLite database URL takes no parameters, but that of {shown.lstrip('/') or url.drivername!r} has "
                "some behind the `?`. Set LADING_DATABASE_URL without them."
            )
        if url.host or url.username is not None or url.password is not None:
            raise CatalogError(
                "A SQLite database URL is expected to have three slashes before a relative path and four before an "
                "absolute one, but that of LADING_DATABASE_URL names a host or a user. "
                "Write it as sqlite:////data/catalog.sqlite."
            )
        database = text.partition(":///")[2]
        if database in ("", ":memory:"):
            return cls(url=url, path=None)

        return cls(url=url.set(database=database, query={}), path=storage_path(database))

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def shown_url(self) -> str:
        """The URL without a password, and without parameters, which may contain one."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)

        return "the catalog in memory" if self.is_sqlite else self.shown_url

    def without_secrets(self, message: object) -> str:
        """Return a driver's message, which may quote its arguments, without the secrets of the URL."""
        query = self.url.normalized_query
        secrets = [
            self.url.password or "",
            *(v for key, values in query.items() if _SECRETS.search(key) for v in values),
        ]
        words = str(message)
        for secret in filter(None, map(str, secrets)):
            for form in {secret, quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}:
                words = words.replace(form, "***")

        return words


def connect(path: Path, parameters: str, *, patience_s: float | None = None) -> sqlite3.Connection:
    """Connect to a SQLite file in autocommit mode.

    :param parameters: of the URI, such as ``mode=ro``.
    :param patience_s: seconds to wait for the lock of another connection. Default: :data:`BUSY_TIMEOUT_S`.
    """
    return sqlite3.connect(
        f"file:{quote(os.fsencode(path))}?{parameters}",
        uri=True,
        timeout=BUSY_TIMEOUT_S if patience_s is None else patience_s,
        isolation_level=None,
        check_same_thread=False,
    )


class Found(Enum):
    """The kind of a file, seen before opening it as a database."""

    NOTHING = auto()
    """No file, or an empty one, which an interrupted creation leaves behind."""
    CATALOG = auto()
    FOREIGN = auto()


def peek(path: Path) -> Found:
    """Look at the file's header and touch nothing: not even a journal appears beside a foreign file.

    :raises CatalogError: ``path`` is a folder or another thing that is not a file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return Found.NOTHING
    if not stat.S_ISREG(mode):
        raise CatalogError(
            f"The catalog is expected to be a file, but {path} is {'a folder' if stat.S_ISDIR(mode) else 'not one'}. "
            "Name a file in LADING_DATABASE_URL."
        )

    header = read_header(path)
    if not header:
        return Found.NOTHING
    if len(header) == HEADER_SIZE and not any(header):
        # A big transaction writes other pages before the first one; a journal shows that one was under way.
        return Found.NOTHING if Path(f"{path}-journal").exists() else Found.FOREIGN
    if len(header) < HEADER_SIZE or not header.startswith(b"SQLite format 3\0"):
        return Found.FOREIGN

    (application_id,) = struct.unpack_from(">i", header, 68)
    if application_id == APPLICATION_ID:
        return Found.CATALOG
    if application_id != 0 or Path(f"{path}-wal").exists():
        return Found.FOREIGN

    try:
        with closing(connect(path, "mode=ro&immutable=1")) as connection:
            (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except (sqlite3.Error, UnicodeDecodeError):  # the latter for a message that quotes damaged text
        return Found.FOREIGN

    return Found.FOREIGN if objects else Found.NOTHING


def foreign(target: Target) -> CatalogError:
    """Return the error for a file that is something else."""
    return CatalogError(
        f"{target} is expected to be a catalog of lading, but is another kind of file; it was left as it is. Move it "
        "away, or set LADING_DATABASE_URL to another place."
    )


def no_catalog(target: Target) -> CatalogError:
    """Return the error for a place without a catalog."""
    return CatalogError(f"No catalog exists at {target} yet. `lading list` makes one.")


def check_version(found: int, target: Target) -> None:
    """Check the schema's version.

    :raises CatalogOutdatedError: it is not :data:`SCHEMA_VERSION`.
    """
    if found == SCHEMA_VERSION:
        return

    what = f"The schema of {target} is of version {found}, but this version of lading works with {SCHEMA_VERSION}."
    todo = (
        "Upgrade lading: `pip install --upgrade lading-hub`."
        if found > SCHEMA_VERSION
        else "`lading db upgrade` brings it up to date, after a backup."
    )
    raise CatalogOutdatedError(f"{what} {todo}", expected=SCHEMA_VERSION, found=found)


def writable(path: Path) -> bool:
    """Return whether this process can write the catalog file, and a journal beside it."""
    # With the effective user's rights if the system knows them: those decide about `open`.
    effective = os.access in os.supports_effective_ids

    return os.access(path, os.W_OK, effective_ids=effective) and os.access(
        path.parent, os.W_OK | os.X_OK, effective_ids=effective
    )
