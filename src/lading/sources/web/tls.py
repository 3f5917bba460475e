"""What is wrong with a connection over TLS that no further attempt would make."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

_OTHER_PROTOCOL = frozenset(
    {"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "PACKET_LENGTH_TOO_LONG"}
)
"""What OpenSSL says of an answer that is no TLS at all."""

_NO_AGREEMENT = (
    "ALERT_HANDSHAKE_FAILURE", "ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE",
    "UNRECOGNIZED_NAME", "CERTIFICATE_REQUIRED", "ALERT_UNKNOWN_CA", "NO_SHARED_CIPHER",
)  # fmt: skip
"""Ends of what it says where both speak TLS, and one of them does not want to go on."""


def lasting_fault(error: BaseException, host: str) -> str | None:
    """What is wrong with the TLS of ``host``, and what to do; ``None`` where it may go well another time.

    :param error: of a request, with its causes behind it.
    """
    chain = list(_chain(error))
    for each in chain:
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                f"{host} cannot be trusted to be {host}: {each}. If it is signed by an authority of your own, name "
                "that one's certificate in SSL_CERT_FILE."
            )

    # Within a connection that stood, the same may come of a byte that was lost on the way.
    if not any(type(each).__name__ == "ConnectError" for each in chain):
        return None
    for each in chain:
        reason = (getattr(each, "reason", None) or "") if isinstance(each, ssl.SSLError) else ""
        if reason in _OTHER_PROTOCOL:
            return (
                f"{host} answers https with something that is no TLS ({reason}): it is plain http perhaps, or another "
                "service. Look whether the port in the address is that of https."
            )
        if reason.endswith(_NO_AGREEMENT):
            return (
                f"{host} and this machine do not agree on a way to speak TLS ({reason}). Look whether the address is "
                "right; if it is, its server wants another version of TLS, or a certificate of who asks."
            )

    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
