"""Validation of the proxies that the environment names."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies_environment

from lading.errors import SettingsError

_SOCKS = ("socks5", "socks5h")


def require_proxies(library: Any) -> None:
    """Require that the HTTP client can use each proxy of the environment, as it refuses to start otherwise.

    :param library: ``httpx2`` or ``httpx``.

    :raises SettingsError: it cannot. The message names the variable, without the user and the password in it.
    """
    proxies = getproxies_environment()
    if "*" in [host.strip() for host in proxies.get("no", "").split(",")]:
        return  # no proxy is used

    for kind in ("http", "https", "all"):
        value = proxies.get(kind)
        if not value:
            continue
        variable = f"{kind}_proxy" if f"{kind}_proxy" in os.environ else f"{kind.upper()}_PROXY"
        url = value if "://" in value else f"http://{value}"
        if (problem := _problem(url, library)) is not None:
            raise SettingsError(f"{variable} is expected to be the URL of a proxy, `http://host:port`, but {problem}")


def _problem(url: str, library: Any) -> str | None:
    scheme = url.partition("://")[0].lower()
    if scheme not in ("http", "https", *_SOCKS):
        return f"its scheme is {scheme[:20]!r}. Name a proxy of http or https, or unset the variable."
    if scheme in _SOCKS and find_spec("socksio") is None:
        return (
            f"its scheme is {scheme!r}, for which the package socksio is not installed. `pip install socksio`, name a "
            "proxy of http or https, or unset the variable."
        )
    try:
        host = library.URL(url).host
    except (library.InvalidURL, ValueError):  # the message may quote a part of a password
        host = ""

    return None if host else "it is not a URL with a host and a port. Correct it, or unset the variable."
