"""Where a request may go: schemes, hosts and addresses, of the first hop and of each one that a server sends it to.

A server chooses where a redirect leads, so that must be no way to make this machine ask what the server itself cannot
reach: a service that listens on loopback only, the metadata address of a cloud, the printer in the office.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from lading.errors import PolicyError

if TYPE_CHECKING:
    import httpx2 as httpx

MAX_REDIRECTS = 10

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Behind it stands an IPv4 address, to which a translator passes it on: https://www.rfc-editor.org/rfc/rfc6052."""


class AddressScope(IntEnum):
    """From where an address can be reached: the larger, the fewer can."""

    EVERYWHERE = 0
    """A public address; also one that is not known, since a proxy resolves it."""
    NETWORK = 1
    """A private network, or what is reserved."""
    MACHINE = 2
    """This machine, or the link it is on: there the metadata services of clouds are, too."""


def reach(address: str) -> AddressScope:
    """The reach of an IP address, ``EVERYWHERE`` for what is none.

    Source: https://www.iana.org/assignments/iana-ipv4-special-registry, and the one for IPv6 beside it.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return AddressScope.EVERYWHERE

    if isinstance(ip, ipaddress.IPv6Address):
        translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or translated or ip
    if ip.is_loopback or ip.is_link_local or ip.is_unspecified:
        return AddressScope.MACHINE

    return AddressScope.NETWORK if not ip.is_global or ip.is_multicast else AddressScope.EVERYWHERE


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine by its very name."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Origin:
    """What credentials are for: never another scheme, host or port.

    Source: https://www.rfc-editor.org/rfc/rfc6454, section 4.
    """

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx.URL) -> Origin:
        return cls(url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))


def shown(url: httpx.URL | str) -> str:
    """A URL as it may be shown: what is behind the ``?`` is a secret where links are signed."""
    return str(url).partition("#")[0].partition("?")[0]


def check_url(url: httpx.URL, *, came_from: httpx.URL | None = None) -> None:
    """Whether ``url`` may be asked at all, and as the target of a redirect from ``came_from``.

    :raises PolicyError: it may not.
    """
    where = f"{shown(url)!r}" if came_from is None else f"{shown(url)!r}, to which {shown(came_from)!r} redirects"

    if url.userinfo:
        raise PolicyError(
            f"A URL on {url.host!r} holds a user name or a password, which would end up in catalogs and logs. Put them "
            f"into the file ~/.netrc (`machine {url.host} login … password …`), and take them out of the URL."
        )
    if url.scheme not in ("https", "http") or not url.host:
        raise PolicyError(f"Files are fetched over https only: {where} is refused.")
    if url.scheme == "http":
        if came_from is not None and came_from.scheme == "https":
            raise PolicyError(
                f"{where}: a redirect from https to http is refused, since anyone on the way could change the file."
            )
        if not is_loopback(url.host):
            raise PolicyError(
                f"{where}: plain http is refused, since anyone on the way could change the file. Use https; only the "
                "loopback interface of this machine is asked without it."
            )


class RedirectPolicy:
    """Refuses to go further inward than where the first request of a source went.

    It is asked about the address of each connection as it is made, not about what a name resolves to before: a name
    can mean one address to who checks it and another one to who connects.
    """

    def __init__(self) -> None:
        self._origin: AddressScope | None = None

    def check_address(self, url: httpx.URL, address: str) -> None:
        """``address`` is what a connection for ``url`` was made to.

        :raises PolicyError: the first one was further out.
        """
        found = reach(address)
        if self._origin is None:
            self._origin = found
        if found > self._origin:
            raise PolicyError(
                f"{shown(url)!r} is at {address}, an address inside this network or machine, to which a server outside "
                "of it redirects. That is refused; if the file is there, name that URL in the card."
            )
        if url.scheme == "http" and found is not AddressScope.MACHINE:
            raise PolicyError(f"{shown(url)!r} is at {address}, and plain http is for the loopback interface only.")

    def check_host(self, url: httpx.URL) -> None:
        """A connection for ``url`` is made by a proxy: only what the URL itself says of the address is known.

        :raises PolicyError: the first one was further out.
        """
        self.check_address(url, "127.0.0.1" if is_loopback(url.host) else url.host)
