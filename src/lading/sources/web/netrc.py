"""Credentials for web servers, from the user's netrc file.

The file is the one that ``NETRC`` names, else ``~/.netrc``. URIs never hold credentials, as they are kept in catalogs
and shown in logs.
"""

from __future__ import annotations

import base64
import logging
import netrc
import os

from lading.system.filesystem import expand_home

_log = logging.getLogger("lading")


def authorization(host: str) -> str | None:
    """Return the value of the ``Authorization`` header for ``host``; ``None`` if the file has no entry for it.

    The ``default`` entry is ignored, as it would send the credentials to every host.
    """
    named = os.environ.get("NETRC", "").strip()
    path = expand_home(named or "~/.netrc")
    try:
        entry = netrc.netrc(path).hosts.get(host)
    except (OSError, UnicodeDecodeError):
        return None
    except netrc.NetrcParseError as error:
        # Its message may quote a password.
        _log.warning("%s is not used, as its line %s is not valid.", path, error.lineno)
        return None
    if entry is None or host == "default":
        return None

    login, _, password = entry

    return basic(login, password or "")


def basic(login: str, password: str) -> str:
    """Return the value of the ``Authorization`` header for a user name and a password."""
    return "Basic " + base64.b64encode(f"{login}:{password}".encode()).decode("ascii")
