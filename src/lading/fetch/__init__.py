"""From a URI to files on this machine; one scheme a file."""

from __future__ import annotations

from pathlib import Path

from lading.card import uri_path
from lading.errors import FetchError
from lading.fetch.file import local_checkpoint


def fetch(uri: str, *, inner_path: str | None = None) -> Path:
    """The local path, a file or a folder, of the checkpoint at ``uri``.

    :param inner_path: a path inside the source (``checkpoint_path`` of a card).

    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    :raises FetchError: the source is remote.
    """
    path = uri_path(uri)
    if path is None:
        raise FetchError(
            f"The checkpoint is at {uri}, and this version of lading reads local files only. Download it with the tool "
            "of your choice and name its folder in a card of your own: `name: NAME@user` with `checkpoint: /path`."
        )

    return local_checkpoint(path, inner_path=inner_path)
