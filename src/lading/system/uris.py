"""URIs of local paths, and URIs without their secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path


def shown_uri(uri: str) -> str:
    """Return ``uri`` without the user, the query and the fragment of a web address, so that it can be shown and kept.

    Signed addresses hold their secrets there.
    """
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.lower() in ("file", "hg", "hf"):
        return uri
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")

    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def path_uri(path: Path) -> str:
    """Return the ``file://`` URI of a path, unquoted, so that it can be compared, shown, and read by :func:`uri_path`.

    A folder has one URI, however its path is written: with ``.``, ``..``, a slash at the end, or links to folders. A
    file keeps its own name, even if it is a link: in the cache of Hugging Face's libraries all files are.
    """
    path = path.absolute()
    try:
        real = Path(os.path.realpath(path))
        if path.name != ".." and not os.path.isdir(real):  # noqa: PTH112 (`is_dir` raises in a folder that is locked)
            real = Path(os.path.realpath(path.parent), path.name)
    except ValueError:  # a NUL, so nothing is there
        real = path

    return f"file://{real}"


def uri_path(uri: str) -> Path | None:
    """Return the path of a ``file://`` URI; ``None`` for any other URI."""
    return Path(uri.removeprefix("file://")) if uri.startswith("file://") else None
