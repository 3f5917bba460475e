"""Which source a URI names."""

from __future__ import annotations

from urllib.parse import urlsplit

from lading.errors import NotSupportedError
from lading.sources.hub.address import HubAddress
from lading.sources.source import Source
from lading.sources.web.address import WebAddress
from lading.system.settings import Settings
from lading.system.uris import shown_uri

HUB_SCHEMES = ("hg", "hf")
HTTP_SCHEMES = ("https", "http")


def check_address(uri: str) -> None:
    """Whether an address of the hub or of the web is written as such a one. Others are not looked at.

    :raises AddressError: it is not, so that there is nobody to ask.
    """
    scheme = uri.partition(":")[0].lower()
    if scheme in HUB_SCHEMES:
        HubAddress.from_uri(uri)
    elif scheme in HTTP_SCHEMES:
        WebAddress.from_uri(uri)


def open_source(uri: str, *, inner_path: str | None, revision: str | None, settings: Settings) -> Source:
    """The source of a checkpoint that is elsewhere; nothing is asked of it yet.

    :param inner_path: the checkpoint inside the source (``checkpoint_path`` of a card).
    :param revision: default: the one that ``uri`` names, or what is published now.

    :raises NotSupportedError: a scheme that is not known here, or a source that has no revisions or no folders.
    :raises PolicyError: a path that leads out of the source, or a scheme that is refused.
    """
    scheme = urlsplit(uri).scheme

    # What speaks to servers is imported only by those who do.
    if scheme in HUB_SCHEMES:
        from lading.sources.hub.source import HubSource

        return HubSource(uri, inner_path=inner_path, revision=revision, offline=settings.offline)
    if scheme in HTTP_SCHEMES:
        from lading.sources.cache import Cache
        from lading.sources.web.source import HttpSource

        if revision is not None:
            raise NotSupportedError(
                f"{shown_uri(uri)} is a file of a web server and has no revisions, but {revision!r} was asked for."
            )
        if inner_path is not None:
            raise NotSupportedError(
                f"{shown_uri(uri)} is one file, of which lading reads no part by a path, but `checkpoint_path` is "
                f"{inner_path!r}."
            )
        return HttpSource(uri, cache=Cache(settings.cache_dir, catalog=settings.catalog_id), offline=settings.offline)

    raise NotSupportedError(
        f"{shown_uri(uri)} is of the scheme {scheme!r}, but checkpoints are read from paths, file://, https://, hg:// "
        "and hf://."
    )
