"""The proxies that the environment names, and the connection pools of urllib3 behind them.

Source: https://everything.curl.dev/usingcurl/proxies/env.html
"""

from __future__ import annotations

import os
import ssl
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote
from urllib.request import getproxies_environment, proxy_bypass

from lading.errors import SettingsError
from lading.sources.web.redirects import is_loopback

if TYPE_CHECKING:
    from urllib3 import PoolManager
    from urllib3.util import Url

_SOCKS = ("socks5", "socks5h")
_CONNECTIONS = 64
"""The most idle connections to one server; more of them can be in use."""


def proxy_of(url: Url) -> str | None:
    """Return the URL of the proxy for requests to ``url``; ``None`` if they are sent directly."""
    proxies = _proxies()
    proxy = proxies.get(url.scheme or "") or proxies.get("all")
    if not proxy or proxy_bypass(url.netloc or "", proxies):
        return None
    if url.scheme == "http" and is_loopback(url.host or ""):
        return None

    return _with_scheme(proxy)


def require_proxies() -> None:
    """Require that each proxy of the environment can be used, by huggingface_hub, too.

    :raises SettingsError: one cannot. The message names the variable, without the user and the password in it.
    """
    proxies = _proxies()
    for kind in ("http", "https", "all"):
        if not (value := proxies.get(kind)):
            continue
        variable = f"{kind}_proxy" if f"{kind}_proxy" in os.environ else f"{kind.upper()}_PROXY"
        if (problem := _problem(_with_scheme(value))) is not None:
            raise SettingsError(f"{variable} is expected to be the URL of a proxy, `http://host:port`, but {problem}")


def new_manager(proxy: str | None, mixin: type) -> PoolManager:
    """Return the pools of the connections that go through ``proxy``.

    :param mixin: what the classes of the connections also derive from.

    :raises SettingsError: the environment names a proxy that cannot be used.
    """
    import urllib3
    from urllib3.util import make_headers, parse_url

    require_proxies()
    options: dict[str, Any] = {"maxsize": _CONNECTIONS, "ssl_context": _tls_context()}
    if proxy is None:
        manager = urllib3.PoolManager(**options)
    elif proxy.startswith(_SOCKS):
        manager = import_module("urllib3.contrib.socks").SOCKSProxyManager(proxy, **options)
    else:
        auth = parse_url(proxy).auth
        headers = None if auth is None else make_headers(proxy_basic_auth=unquote(auth, "latin-1"))
        manager = urllib3.ProxyManager(proxy, proxy_headers=headers, proxy_ssl_context=_tls_context(), **options)

    pools: dict[str, Any] = manager.pool_classes_by_scheme
    manager.pool_classes_by_scheme = {
        scheme: type(pool.__name__, (pool,), {"ConnectionCls": type("Connection", (mixin, pool.ConnectionCls), {})})
        for scheme, pool in pools.items()
    }

    return manager


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()  # reads SSL_CERT_FILE and SSL_CERT_DIR
    if not (os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR")):
        with suppress(ImportError):  # a container may have no certificates of its own
            context.load_verify_locations(import_module("certifi").where())

    return context


def _proxies() -> dict[str, str]:
    """Return the proxies by scheme; none if ``NO_PROXY`` holds a star."""
    proxies = getproxies_environment()

    return {} if "*" in [host.strip() for host in proxies.get("no", "").split(",")] else proxies


def _with_scheme(proxy: str) -> str:
    return proxy if "://" in proxy else f"http://{proxy}"


def _problem(url: str) -> str | None:
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    scheme = url.partition("://")[0].lower()
    if scheme not in ("http", "https", *_SOCKS):
        return f"its scheme is {scheme[:20]!r}. Name a proxy of http or https, or unset the variable."
    if scheme in _SOCKS and not (find_spec("socks") and find_spec("socksio")):
        return (
            f"its scheme is {scheme!r}, for which the packages PySocks and socksio are not both installed. `pip "
            "install PySocks socksio`, name a proxy of http or https, or unset the variable."
        )
    try:
        host = parse_url(url).host
    except LocationParseError:  # the message may quote a part of a password
        host = None

    return None if host else "it is not a URL with a host and a port. Correct it, or unset the variable."
