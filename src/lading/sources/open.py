"""The choice of a source by the scheme of a URI."""

from __future__ import annotations

from urllib.parse import urlsplit

from lading.errors import InternalError, NotSupportedError, did_you_mean
from lading.sources.cloud.address import SCHEMES as CLOUD_SCHEMES
from lading.sources.cloud.address import CloudAddress
from lading.sources.hub.address import HubAddress
from lading.sources.source import Source
from lading.sources.web.address import WebAddress
from lading.system.settings import Settings
from lading.system.uris import shown_uri

HUB_SCHEMES = ("hg", "hf")
HTTP_SCHEMES = ("https", "http")
SCHEMES = ("file", *HUB_SCHEMES, *HTTP_SCHEMES, *CLOUD_SCHEMES)
"""The schemes of all addresses that lading reads."""


def check_address(uri: str) -> None:
    """Check the syntax of an address of the hub, of the web or of an object store; accept all others.

    :raises AddressError: the address is not valid.
    """
    scheme = uri.partition(":")[0].lower()
    if scheme in HUB_SCHEMES:
        HubAddress.from_uri(uri)
    elif scheme in HTTP_SCHEMES:
        WebAddress.from_uri(uri)
    elif scheme in CLOUD_SCHEMES:
        CloudAddress.from_uri(uri)


def has_folders(uri: str) -> bool:
    """Return whether an address leads to a source with folders, whose files are listed: the hub, or a folder of an
    object store. Any other leads to one file.

    :raises AddressError: the address of an object store is not valid.
    """
    scheme = uri.partition(":")[0].lower()

    return scheme in HUB_SCHEMES or (scheme in CLOUD_SCHEMES and not CloudAddress.from_uri(uri).is_file)


def open_source(uri: str, *, inner_path: str | None, revision: str | None, settings: Settings) -> Source:
    """Return the source of a remote checkpoint, without sending a request.

    :param inner_path: the checkpoint inside the source (``checkpoint_path`` of a card).
    :param revision: the revision; default: the one in ``uri``, else the latest.

    :raises NotSupportedError: the scheme is unknown, the package that reads it is missing, or the source has no
        revisions or no folders.
    :raises PolicyError: the path leads out of the source, or the scheme is refused.
    """
    scheme = urlsplit(uri).scheme
    require_readable(uri)

    # Imported here, as most commands send no requests.
    if scheme in HUB_SCHEMES:
        from lading.sources.hub.source import HubSource

        return HubSource(uri, inner_path=inner_path, revision=revision, offline=settings.offline)
    if scheme in (*HTTP_SCHEMES, *CLOUD_SCHEMES):
        from lading.sources.cache import Cache

        if revision is not None:
            raise NotSupportedError(
                f"{shown_uri(uri)} is on a web server or in an object store and has no revisions, but {revision!r} was "
                "requested."
            )
        if inner_path is not None and not has_folders(uri):
            raise NotSupportedError(
                f"{shown_uri(uri)} is a single file, without paths inside it, but `checkpoint_path` is {inner_path!r}."
            )
        cache = Cache(settings.cache_dir, catalog=settings.catalog_id)
        if scheme in CLOUD_SCHEMES:
            from lading.sources.cloud.source import CloudSource

            return CloudSource(uri, inner_path=inner_path, cache=cache, offline=settings.offline)

        from lading.sources.web.source import HttpSource

        return HttpSource(uri, cache=cache, offline=settings.offline)

    raise InternalError(f"{shown_uri(uri)} is not remote, so it has no source")


def require_readable(uri: str) -> None:
    """Require that lading reads addresses of a URI's scheme.

    :raises NotSupportedError: it does not, or not without another package.
    """
    scheme = uri.partition(":")[0].lower()
    if scheme in CLOUD_SCHEMES:
        from lading.sources.cloud.bucket import require_obstore

        require_obstore()
    if scheme not in SCHEMES:
        raise NotSupportedError(
            f"Expected a path, or an address that begins with {', '.join(f'{s}://' for s in SCHEMES)}; found "
            f"{shown_uri(uri)!r}, and no installed source reads {scheme}://.{did_you_mean(scheme, SCHEMES)} Download "
            "the checkpoint, and state its path."
        )
