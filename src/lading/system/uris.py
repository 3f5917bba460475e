"""URIs of local paths, and URIs without their secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lading.system.filesystem import path_text, text_path

_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d{0,5})?")
"""A host of a web address, with or without a port."""


_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,30}://"
_ADDRESS = re.compile(rf'{_SCHEME}(?:(?!{_SCHEME})(?:[^"\\\n]|\\.))*')
"""An address in a text: up to a quote, as in JSON, the end of the line, or the next address."""


def shown_uri(uri: str) -> str:
    """Return ``uri`` without the user, the query and the fragment of a web address, so that it can be shown and kept.

    Signed addresses hold their secrets there. A part that looks like an unquoted password is not shown, either.
    """
    scheme, _, rest = uri.partition("://")
    if not rest or scheme.lower() in ("file", "hg", "hf"):
        return uri
    shown = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = shown.partition("/")
    host = host.rpartition("@")[2]
    # A password with a ?, # or / ends the host early, at "user:pass": the rest of it, with an @, follows.
    behind = rest[len(shown) :]
    if ("@" in behind and not slash) or ("@" in path + behind and not _HOST.fullmatch(host)):
        return f"{scheme}://…"

    return f"{scheme}://{host}{slash}{path}"


def shown_name(uri: str) -> str:
    """Return the name of a checkpoint without a card: its path, or its address as :func:`shown_uri` shows it."""
    path = uri_path(uri)

    return shown_uri(uri) if path is None else str(path)


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

    return f"file://{path_text(real)}"


def uri_path(uri: str) -> Path | None:
    """Return the path of a ``file://`` URI; ``None`` for any other URI."""
    return text_path(uri.removeprefix("file://")) if uri.startswith("file://") else None


def without_secrets(text: str) -> str:
    """Return a text, such as JSON or a message, with each address in it as :func:`shown_uri` shows it.

    An address with a user, a query or a fragment may take the rest of its line with it.
    """
    return _ADDRESS.sub(lambda found: shown_uri(found[0]), text) if "://" in text else text
