"""Errors of the catalog's database, translated into those of lading."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from sqlalchemy import exc

from lading.catalog.database.target import BUSY_TIMEOUT_S, Target
from lading.errors import CatalogError, InternalError, LadingError


@contextmanager
def translated(target: Target) -> Iterator[None]:
    """Translate the exceptions of the database's driver into those of lading.

    :raises CatalogError: the catalog is damaged, another process holds it, or it cannot keep a value.
    :raises OSError: the disk is full, or the file cannot be read or written.
    """
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        if isinstance(cause, sqlite3.Error):
            raise sqlite_failure(cause, target) from error
        raise CatalogError(f"{target} does not answer as expected: {target.without_secrets(cause)}".rstrip()) from error
    except UnicodeDecodeError as error:
        raise _damaged(error, target) from error
    except UnicodeEncodeError as error:
        raise CatalogError(f"{target} keeps Unicode text only, but was given {error.object!r}.") from error


def sqlite_failure(error: sqlite3.Error, target: Target) -> LadingError | OSError:
    """Return the error of lading for a failure of SQLite."""
    code = primary_code(error)
    path = target.path

    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_IOERR) and path is not None and (why := _lock_problem(path.parent)):
        return CatalogError(
            f"{target} is on a file system whose files cannot be locked ({why}), and a catalog needs locks. Set "
            "LADING_DATABASE_URL to one on a disk of this machine: `sqlite:////folder/catalog.sqlite`."
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        holders = _holders(path) if path is not None else ""
        return CatalogError(
            f"Another process has been writing to {target} for {BUSY_TIMEOUT_S:.0f} s{holders}. Try again when it is "
            "done."
        )
    # Without room for the shared memory of the write-ahead log, a catalog cannot even be read.
    if code == sqlite3.SQLITE_FULL or getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_IOERR_SHMSIZE:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return PermissionError(errno.EACCES, f"The catalog cannot be written ({error})", str(target))
    if code == sqlite3.SQLITE_CANTOPEN:
        if path is not None and not path.exists():
            return FileNotFoundError(errno.ENOENT, "The catalog, or the folder for it, is not there", str(target))
        return PermissionError(errno.EACCES, f"The catalog cannot be opened ({error})", str(target))
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({error})", str(target))

    if code == sqlite3.SQLITE_CONSTRAINT:
        return InternalError(f"{target} refuses a row that lading wrote: {error}")

    if "no such module" in str(error):
        return CatalogError(
            f"lading needs SQLite with full-text search, but that of this Python was built without it ({error})."
        )

    # No code distinguishes the rest: a missing table is as much damage as a missing page.
    return _damaged(error, target)


def _damaged(error: Exception, target: Target) -> CatalogError:
    return CatalogError(
        f"{target} is damaged: {error}. `lading db check` says more. `lading db restore FILE` replaces it with a "
        "backup; without one, move it away with the -wal file beside it: lading then makes a new one."
    )


def primary_code(error: sqlite3.Error) -> int:
    """Return SQLite's primary result code of an error."""
    # Errors that the Python module raises by itself have no code.
    return int(getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


def _lock_problem(folder: Path) -> str | None:
    """Return why files in ``folder`` cannot be locked; ``None`` if they can, or if this cannot find out."""
    try:
        # Never the catalog itself: closing it would drop the locks that this process has on it.
        file = TemporaryFile(dir=folder)  # noqa: SIM115 (its own error means something other than one of the lock)
    except OSError:
        return None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror

    return None


def _holders(path: Path) -> str:
    """Return, for a message, the processes of this machine that hold a lock on the database, if the system says so."""
    inodes = set()
    for name in (path, Path(f"{path}-shm")):
        try:
            inodes.add(os.stat(name).st_ino)
        except OSError:
            continue

    try:
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

    pids = {
        int(pid)
        for pid, inode in re.findall(r" (?:READ|WRITE) +(\d+) [0-9a-f]+:[0-9a-f]+:(\d+) ", locks)
        if int(inode) in inodes and int(pid) != os.getpid()
    }

    return f" (process {', '.join(map(str, sorted(pids)))})" if pids else ""
