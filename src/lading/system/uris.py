"""URIs of local paths, and URIs as they may be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path


def shown_uri(uri: str) -> str:
    """Return a URI as it may be shown and kept: of an address on the web without the user, the query and the fragment.

    Signed addresses hold their secrets there.
    """
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.lower() in ("file", "hg", "hf"):
        return uri
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")

    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def path_uri(path: Path) -> str:
    """Return the ``file://`` URI of an absolute path, unquoted: it is compared, shown, and read back by ``uri_path``.

    A path has one URI, whether or not it is written with ``.``, ``..`` or a slash at its end. Links keep their names.
    """
    path = path.absolute()
    if ".." in path.parts:
        # Not `normpath`: behind a link to a folder, `..` leads to where that folder is.
        behind = len(path.parts) - path.parts[::-1].index("..")
        path = Path(os.path.realpath(Path(*path.parts[:behind])), *path.parts[behind:])

    return f"file://{path}"


def uri_path(uri: str) -> Path | None:
    """The path of a ``file://`` URI; ``None`` for any other."""
    return Path(uri.removeprefix("file://")) if uri.startswith("file://") else None
