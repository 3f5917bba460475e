"""Folders that come to be all at once."""

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

from lading.system.filesystem import expand_home


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder``, under a name of its own, that becomes it when the block is left without an exception.

    Whoever looks at ``folder`` sees it as it was before, or complete. What a process that was killed left beside it is
    removed by the next one that makes the same folder.

    :raises FileExistsError: something is there, and is no empty folder.
    :raises OSError: the disk is full, or cannot be written.
    """
    folder = Path(os.path.realpath(expand_home(folder)))  # a link that leads to an empty folder stays one
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        _remove_abandoned(left)

    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    temporary.mkdir()
    fd = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(fd, fcntl.LOCK_EX)  # says that its process is alive
        yield temporary
        os.fsync(fd)
        require_empty(folder)
        temporary.rename(folder)  # an empty folder gives way, in one step
        _sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # A write does not say to what, and the name of what is gone again would help nobody.
            error.filename = str(folder)
        raise
    finally:
        os.close(fd)


def require_empty(folder: Path) -> None:
    """:raises FileExistsError: something is at ``folder``, and is no empty folder."""
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            errno.EEXIST, "expected nothing, or an empty folder, but something is there already", str(folder)
        )


def _remove_abandoned(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # at work
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
