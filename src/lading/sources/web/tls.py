"""Permanent TLS errors, which no retry would fix."""

from __future__ import annotations

import ssl

from lading.errors import causes_of

_OTHER_PROTOCOL = frozenset(
    {"WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "PACKET_LENGTH_TOO_LONG"}
)
"""OpenSSL's reasons for an answer that is not TLS."""

_NO_AGREEMENT = (
    "ALERT_HANDSHAKE_FAILURE", "ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_PROTOCOLS_AVAILABLE",
    "UNRECOGNIZED_NAME", "CERTIFICATE_REQUIRED", "ALERT_UNKNOWN_CA", "NO_SHARED_CIPHER",
)  # fmt: skip
"""Endings of OpenSSL's reasons if both sides speak TLS, but one of them refuses to continue."""


def lasting_fault(error: BaseException, host: str) -> str | None:
    """Return a description of a permanent TLS error, and its fix; ``None`` if a retry may succeed.

    On an established connection, the same errors may result from lost or corrupted bytes, which a retry fixes.

    :param error: the error of an attempt to connect to ``host``, with its chain of causes.
    """
    chain = list(causes_of(error))
    for each in chain:
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {host} cannot be verified: {each}. If your own authority signed it, set "
                "SSL_CERT_FILE to the certificate of that authority."
            )
    for each in chain:
        reason = (getattr(each, "reason", None) or "") if isinstance(each, ssl.SSLError) else ""
        if reason in _OTHER_PROTOCOL:
            return (
                f"the answer of {host} to https is not TLS ({reason}): it may be plain http, or another service. Check "
                "the port in the address."
            )
        if reason.endswith(_NO_AGREEMENT):
            return (
                f"{host} and this machine do not agree on the parameters of TLS ({reason}). Check the address; if it "
                "is right, the server requires another version of TLS, or a client certificate."
            )

    return None
