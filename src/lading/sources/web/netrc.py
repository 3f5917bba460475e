"""What a server is told of who asks: what the user's netrc file has for its host.

The file is the one that ``NETRC`` names, else ``~/.netrc``. A URI never holds credentials, as it is kept in catalogs
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
    """The value of an ``Authorization`` for ``host``, ``None`` where there is none.

    A ``default`` in the file is for no one, as it would be for everyone.
    """
    named = os.environ.get("NETRC", "").strip()
    path = expand_home(named or "~/.netrc")
    try:
        entry = netrc.netrc(path).hosts.get(host)
    except (OSError, UnicodeDecodeError):
        return None
    except netrc.NetrcParseError as error:
        # Its message may quote a password.
        _log.warning("%s is not used, as line %s of it is not understood.", path, error.lineno)
        return None
    if entry is None or host == "default":
        return None

    login, _, password = entry

    return "Basic " + base64.b64encode(f"{login}:{password or ''}".encode()).decode("ascii")
