"""Atomic creation of folders."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lading.system.filesystem import expand_home, sync_folder


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to ``folder`` when the block ends without an exception.

    Other processes see ``folder`` either as it was before, or complete. Temporary folders that a killed process left
    are removed by the next call for the same folder.

    :raises FileExistsError: ``folder`` exists, and is not an empty folder.
    :raises OSError: the disk is full, or cannot be written.
    """
    folder = Path(os.path.realpath(expand_home(folder)))  # keeps a link to an empty folder
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        _remove_abandoned(left)

    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    temporary.mkdir()
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)  # shows that this process is alive
        yield temporary
        os.fsync(fd)
        require_empty(folder)
        temporary.rename(folder)  # atomically replaces an empty folder
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # An error of `write` names no file, and the name of the removed temporary folder would not help.
            error.filename = str(folder)
        raise
    finally:
        os.close(fd)


def require_empty(folder: Path) -> None:
    """Require that ``folder`` does not exist, or is empty.

    :raises FileExistsError: it is something else.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "expected an empty folder, or none, but found something there", str(folder))


def _remove_abandoned(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # its process is alive
    finally:
        os.close(fd)
