"""The logs that SQLite keeps beside a catalog's file, and the handling of those that are foreign or unreadable.

SQLite takes any file of that name for the log of the database. So when a backup is copied over a catalog, the old log
brings back the rows that the backup should undo; and if SQLite cannot use the log, it reads the file without the last
committed rows.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from lading.errors import CatalogError

_log = logging.getLogger("lading")

SUFFIXES = ("-wal", "-shm", "-journal")
"""The endings of the files that SQLite keeps beside a database."""

# https://www.sqlite.org/fileformat2.html: the rollback journal, the database header
_JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")
_ROLLBACK_MODE = b"\1\1"


HEADER_SIZE = 100
"""The size of the header in bytes, see https://www.sqlite.org/fileformat2.html#the_database_header."""

_MOST_OPEN = 32
"""The databases that stay open after a read of their header."""

_open: OrderedDict[tuple[int, int], int] = OrderedDict()
_open_lock = threading.Lock()


def read_header(path: Path) -> bytes:
    """Return the first bytes of a database, as many as there are.

    The file stays open: when a process closes any descriptor of a file, SQLite's connections in that process lose their
    locks on it (https://www.sqlite.org/howtocorrupt.html, section 2.2).

    :raises OSError: the file cannot be read.
    """
    with _open_lock:
        found = os.stat(path)
        key = (found.st_dev, found.st_ino)
        if key not in _open:
            _open[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(_open) > _MOST_OPEN:
                os.close(_open.popitem(last=False)[1])
        _open.move_to_end(key)

        return os.pread(_open[key], HEADER_SIZE, 0)


def has_stale_log(path: Path) -> bool:
    """Return whether there is a write-ahead log beside a database that does not use one.

    SQLite turns the mode on in the file before it makes the log, and off after it removed the log. So such a log
    belongs to a file that was replaced by this one, as when a backup is copied over a catalog.
    """
    log = beside(path, "-wal")

    # Two looks at the size: another process may end the mode in between.
    return _size(log) > 0 and _mode(path) == _ROLLBACK_MODE and _size(log) > 0


def set_stale_log_aside(path: Path) -> None:
    """Rename a write-ahead log that belongs to another file, so that its rows do not come back.

    :raises CatalogError: it cannot be renamed.
    """
    if not has_stale_log(path):
        return

    log = beside(path, "-wal")
    aside = log.with_name(f"{log.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    try:
        with _held(log) as stale:
            # Another process may have been first, and a log that the catalog needs may be there by now.
            if not stale or not has_stale_log(path):
                return
            log.rename(aside)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CatalogError(
            f"{log} is the log of another file than {path}, which a backup was copied over, and it cannot be renamed "
            f"({error.strerror}). Move it away: with it, the rows come back that the backup undid."
        ) from error
    _log.warning(
        "%s was the log of another file than the catalog beside it, which a backup was copied over; it is %s now, so "
        "that its rows do not come back. Restore backups with `lading db restore FILE`.", log, aside,
    )  # fmt: skip


def refuse_left_log(path: Path) -> None:
    """Refuse to read a database that needs a log that this user cannot use.

    :raises CatalogError: there is such a log.
    """
    for log in (beside(path, "-wal"), beside(path, "-journal")):
        if _size(log) > 0 and (log.name.endswith("-wal") or _begins(log, _JOURNAL_MAGIC)):
            raise CatalogError(
                f"{path} cannot be read without its log {log}, which another process left there, and to use that takes "
                "write access to both and to their folder. Run `lading list` once as a user who has it, or copy both "
                "files to a folder of yours and set LADING_DATABASE_URL."
            )


def beside(path: Path, suffix: str) -> Path:
    """Return the path where SQLite keeps a log: beside the file that links lead to."""
    return Path(f"{os.path.realpath(path)}{suffix}")


@contextmanager
def _held(log: Path) -> Iterator[bool]:
    """Keep other processes from renaming a log; yield whether it is still the file of that name.

    :raises OSError: it cannot be opened.
    """
    with open(log, "rb") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield os.path.samestat(os.fstat(file.fileno()), os.stat(log))
        except FileNotFoundError:
            yield False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mode(path: Path) -> bytes:
    try:
        return read_header(path)[18:20]
    except OSError:
        return b""


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(magic)) == magic
    except OSError:  # unreadable, so it may begin with it
        return True
