"""What fetches are about to bring into a cache that other programs use, too: written down before they begin.

When a process dies, what it had brought there looks like any other program's. That nothing was there before, and who
was about to change that, then tells whose it is. An intent ends when a copy is recorded at its path, which says so from
then on; or when the fetch ends and has not brought the file.

What another program brings to the same path after a process has died, and before the fetch is tried again, cannot be
told apart, and counts as lading's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from sqlalchemy import Connection, and_, delete, insert, select

from lading.catalog.database.database import Database
from lading.catalog.database.statements import chunks
from lading.catalog.records import now
from lading.catalog.schema import IntentRow
from lading.system.filesystem import location_id


def record_intents(database: Database, paths: Sequence[Path], *, uri: str) -> None:
    """Write down that files are about to be brought to paths at which nothing is.

    :param uri: of the checkpoint that they are of, or come along with. The catalog need not know it yet.

    :raises CatalogError: the catalog is damaged, or another process holds it.
    :raises OSError: the disk is full.
    """
    with database.write() as connection:
        end_intents(connection, paths)
        rows = [
            {"path": _key(path), "place": location_id(path.parent), "uri": uri, "recorded_at": now()} for path in paths
        ]
        connection.execute(insert(IntentRow), rows)


def forget_unmet(database: Database, paths: Sequence[Path]) -> None:
    """Drop the intents of files that did not come. Raises what :func:`record_intents` does."""
    unmet = [path for path in paths if not os.path.lexists(path)]
    if unmet:
        with database.write() as connection:
            end_intents(connection, unmet)


def end_intents(connection: Connection, paths: Iterable[Path]) -> None:
    """Drop the intents at paths: something else says whose the files there are."""
    for path in intended(connection, paths):
        same = and_(IntentRow.path == _key(path), IntentRow.place == location_id(path.parent))
        connection.execute(delete(IntentRow).where(same))


def intended(connection: Connection, paths: Iterable[Path]) -> set[Path]:
    """Those of the paths that lading brought a file to, or was about to."""
    keys = {_key(path): path for path in paths}
    found = set()
    for some in chunks(keys):
        statement = select(IntentRow.path, IntentRow.place).where(IntentRow.path.in_(some))
        found |= {keys[key] for key, place in connection.execute(statement) if place == location_id(keys[key].parent)}

    return found


def all_intents(connection: Connection) -> dict[str, list[Path]]:
    """The paths, on this machine, of all intents whose files have come, by the URI of the checkpoint."""
    found: dict[str, list[Path]] = {}
    statement = select(IntentRow.uri, IntentRow.path, IntentRow.place).order_by(IntentRow.uri, IntentRow.path)
    for uri, name, place in connection.execute(statement):
        path = Path(name)
        if place == location_id(path.parent) and os.path.lexists(path):
            found.setdefault(uri, []).append(path)

    return found


def _key(path: Path) -> str:
    """The path by which a file is known, whichever links lead to its folder; the file itself may be a link."""
    return str(Path(os.path.realpath(path.parent)) / path.name)
