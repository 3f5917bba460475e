"""The policy for requests and redirects: allowed schemes, hosts and addresses.

A server chooses the target of a redirect, and must not make this machine send requests to addresses that the server
itself cannot reach: a service on the loopback interface, the metadata address of a cloud, a printer in the office.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from lading.errors import PolicyError

if TYPE_CHECKING:
    from urllib3.util import Url

MAX_REDIRECTS = 10

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""Addresses that embed an IPv4 address, to which a translator forwards: https://www.rfc-editor.org/rfc/rfc6052."""


class AddressScope(IntEnum):
    """The part of the network from which an address is reachable; a larger value is a smaller part."""

    EVERYWHERE = 0
    """Public addresses, and unknown ones, which a proxy resolves."""
    NETWORK = 1
    """Private and reserved addresses."""
    MACHINE = 2
    """This machine or its link, on which the metadata services of clouds are."""


def reach(address: str) -> AddressScope:
    """Return the scope of an IP address; ``EVERYWHERE`` if it is not an IP address.

    Source: https://www.iana.org/assignments/iana-ipv4-special-registry, and the registry for IPv6.
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
    """Return whether the host of a URL is ``localhost`` or a loopback address."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin to which credentials are sent: a scheme, a host and a port.

    Source: https://www.rfc-editor.org/rfc/rfc6454, section 4.
    """

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: Url) -> Origin:
        return cls(url.scheme or "", url.host or "", url.port or (443 if url.scheme == "https" else 80))


def shown(url: Url | str) -> str:
    """Return a URL without its query and fragment, which hold the secret of a signed link."""
    return str(url).partition("#")[0].partition("?")[0]


def check_url(url: Url, *, came_from: Url | None = None, plain: bool = False) -> None:
    """Check that a request may be sent to ``url``, also as the target of a redirect from ``came_from``.

    :param plain: whether plain http to other machines is allowed.

    :raises PolicyError: it may not.
    """
    where = f"{shown(url)!r}" if came_from is None else f"{shown(url)!r}, to which {shown(came_from)!r} redirects"

    if url.auth:
        raise PolicyError(
            f"A URL on {url.host!r} holds a user name or a password, which would end up in catalogs and logs. Move "
            f"them to the file ~/.netrc (`machine {url.host} login … password …`)."
        )
    if url.scheme not in ("https", "http") or not url.host:
        raise PolicyError(f"Files are fetched over https only: {where} is refused.")
    if url.scheme == "http":
        if came_from is not None and came_from.scheme == "https":
            raise PolicyError(
                f"{where}: a redirect from https to http is refused, since anyone on the way could change the file."
            )
        if not plain and not is_loopback(url.host):
            raise PolicyError(
                f"{where}: plain http is refused, since anyone on the way could change the file. Use https; only the "
                "loopback interface of this machine is asked without it."
            )


class RedirectPolicy:
    """A policy that refuses redirects to a narrower address scope than that of the source's first request.

    It checks the address of each connection after it is made, not the address that a host name resolves to before: a
    name can resolve to one address for the check, and to another one for the connection.
    """

    def __init__(self, *, plain: bool = False) -> None:
        """:param plain: whether plain http to other machines is allowed."""
        self._plain = plain
        self._origin: AddressScope | None = None

    def check_address(self, url: Url, address: str) -> None:
        """Check the IP address that a connection for ``url`` was made to.

        :raises PolicyError: its scope is narrower than that of the first connection.
        """
        found = reach(address)
        if self._origin is None:
            self._origin = found
        if found > self._origin:
            raise PolicyError(
                f"{shown(url)!r} is at {address}, an address inside this network or machine. A redirect to it from an "
                "outside server is refused; if the file is there, name that URL in the card."
            )
        if not self._plain and url.scheme == "http" and found is not AddressScope.MACHINE:
            raise PolicyError(
                f"{shown(url)!r} is at {address}, and plain http is allowed on the loopback interface only. Use https."
            )

    def check_host(self, url: Url) -> None:
        """Check the host of ``url`` if a proxy makes the connection, so that its address is unknown.

        :raises PolicyError: the scope of the host is narrower than that of the first connection.
        """
        host = (url.host or "").strip("[]")
        self.check_address(url, "127.0.0.1" if is_loopback(host) else host)
