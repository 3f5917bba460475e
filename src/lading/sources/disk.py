"""The disk that caches are on: whether there is space left, and what to do where it cannot be written."""

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
    """:raises OSError: the disk has not ``needed`` bytes left; better said now than in an hour."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed} bytes are needed, {free} are left", str(folder)
        )


@contextmanager
def advised(variable: str) -> Iterator[None]:
    """Let an error of the disk say what to do about it.

    :param variable: of the environment, that names the folder of the cache.

    :raises OSError: the same one, with the advice in its message.
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
