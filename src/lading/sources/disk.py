"""Checks of the disk that holds a cache, and advice in its errors."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def require_space(folder: Path, needed: int) -> None:
    """Require free space before a fetch starts, rather than fail at its end.

    :raises OSError: the disk has less than ``needed`` bytes left.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are left", str(folder)
        )


@contextmanager
def advised(variable: str) -> Iterator[None]:
    """Add advice to disk errors that are raised in the block.

    :param variable: the environment variable that names the folder of the cache.

    :raises OSError: the same error, with the advice in its message.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            advice = f"free some, or set {variable} to a folder on another disk"
        elif error.errno in _CLOSED:
            advice = f"set {variable} to a folder that you can write"
        else:
            raise
        raise OSError(error.errno, f"{error.strerror}; {advice}", error.filename) from error
