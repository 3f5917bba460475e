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

    A path has one URI, however it is written (``.``, ``..``, a slash at the end). Links are not followed.
    """
    path = path.absolute()
    if ".." in path.parts:
        # `normpath` is wrong here: after a link to a folder, `..` is the parent of the link's target.
        end = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:end])), *path.parts[end:])

    return f"file://{path}"


def uri_path(uri: str) -> Path | None:
    """Return the path of a ``file://`` URI; ``None`` for any other URI."""
    return Path(uri.removeprefix("file://")) if uri.startswith("file://") else None
