"""The tables, indexes, views and triggers of a SQLite catalog, compared with those that the migrations make.

Views and triggers are programs. Those of a stranger's file would run with the first query or the first write, so
lading checks them before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection

from lading.catalog.database.target import Target
from lading.errors import CatalogError

Objects = Mapping[tuple[str, str], str]
"""The kind and the name of an object → its definition in SQL, with no spaces or quotes; the parts of a table sorted."""

SCHEMA_DIGEST = "653d9b58b0220b11c2779096cf1d9204134150f391e5692f008f230e622707dd"
"""The digest of the objects that the migrations make, which saves running them to open a catalog."""

_LAYOUT = re.compile(r'[\s"`\[\]]+')
"""The layout, which differs between versions of SQLite and SQLAlchemy in a definition that means the same."""


def objects_of(connection: Connection) -> Objects:
    """Return what a SQLite database defines, SQLite's own tables apart."""
    rows = connection.exec_driver_sql(
        "SELECT type, name, sql FROM sqlite_master WHERE type IN ('view', 'trigger') OR name NOT LIKE 'sqlite~_%' "
        "ESCAPE '~'"
    )

    return {(str(kind), str(name)): _plain(str(kind), str(sql or "")) for kind, name, sql in rows}


def _plain(kind: str, sql: str) -> str:
    words = _LAYOUT.sub("", sql)
    # A migration that writes a table again puts its columns and constraints in another order.
    return ",".join(sorted(re.split(r"[(),]+", words))) if kind == "table" else words


def digest_of(objects: Objects) -> str:
    """Return a digest of all definitions."""
    lines = [f"{kind}\0{name}\0{sql}" for (kind, name), sql in sorted(objects.items())]

    return hashlib.sha256("\0\0".join(lines).encode()).hexdigest()


def differences(expected: Objects, found: Objects) -> list[str]:
    """Return the differences between the objects of a catalog and those expected, one line each."""
    problems = []
    for key in sorted(expected.keys() | found.keys()):
        kind, name = (word if word.isprintable() else ascii(word) for word in key)
        if key not in found:
            problems.append(f"the {kind} {name} is missing")
        elif key not in expected:
            problems.append(f"there is a {kind} {name}, which lading did not make")
        elif expected[key] != found[key]:
            problems.append(f"the {kind} {name} is not defined as it should be")

    return problems


def altered(target: Target, problems: Sequence[str]) -> CatalogError:
    """Return the error for a catalog whose objects differ from those that lading makes."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return CatalogError(
        f"{target} is damaged, or was changed by something other than lading: {problems[0]}{more}. It was left as it "
        "is. `lading db check` lists all; `lading db restore FILE` replaces it with a backup."
    )
