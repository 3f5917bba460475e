"""The address of a card's checkpoint, what it names inside of a file there, and the access to it."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.errors import AddressError, AssetCardError, ModelGatedError
from lading.formats.folder import is_torch_format
from lading.sources.hub.cache import has_token
from lading.sources.open import HUB_SCHEMES, check_address, open_source
from lading.sources.source import Source
from lading.system.settings import Settings


def address_of(card: AssetCard) -> CheckpointRef:
    """Return the address of a card's checkpoint, after a check that it is valid.

    :raises AssetCardError: it is not; or a field is not a string; or the card is not that of a model.
    """
    ref = checkpoint_ref(card)
    if not ref.uri and ref.info_url is None:
        card.field("model_family")  # data sets and tokenizers have cards, too, but no weights
    if ref.gated and ref.scheme not in HUB_SCHEMES:
        return ref  # lading does not request it; fairseq2's cards name the page where users request access
    try:
        check_address(ref.uri)
    except AddressError as error:
        raise AssetCardError(
            card.name, f"The field 'checkpoint' of the card {card.name!r} is not a valid address. {error}"
        ) from None

    return ref


def require_access(name: str, ref: CheckpointRef) -> None:
    """Check that lading can request a checkpoint.

    A gated repository of the hub may have admitted this user: the hub itself answers a user with a token.

    :raises ModelGatedError: it cannot; the message says where to request access.
    """
    if ref.gated and not (ref.scheme in HUB_SCHEMES and has_token()):
        raise ModelGatedError(name, ref.info_url)


_ARCHIVE = ".tar"


def has_inside(name: str) -> bool:
    """Return whether a path can lead into a file of this name: an archive, or a file of ``torch.save``."""
    return name.endswith(_ARCHIVE) or is_torch_format(name)


def split_inside(ref: CheckpointRef) -> tuple[str | None, str | None]:
    """Return the path inside the source, and what is inside the file there, if the address itself is a file."""
    if ref.path is not None and has_inside(urlsplit(ref.uri).path):
        return None, ref.path

    return ref.path, None


def file_in(inner: str | None, member: str | None = None) -> tuple[str | None, str | None]:
    """Return the file or folder within the source, and the member or the state dict in the file, if one is named.

    :param inner: the path inside the source.
    :param member: what is inside the file, if it is known.
    """
    if member is not None or inner is None:
        return inner, member

    parts = PurePosixPath(inner).parts
    for i, part in enumerate(parts[:-1]):
        if has_inside(part):
            return "/".join(parts[: i + 1]), "/".join(parts[i + 1 :])

    return inner, None


def source_of(ref: CheckpointRef, *, revision: str, settings: Settings) -> Source:
    """Return the source of a checkpoint, at its file or folder there, without what the path names in that file.

    Raises what :func:`~lading.sources.open.open_source` does.

    :param revision: empty for the one in the address, else the latest.
    """
    path, _ = file_in(*split_inside(ref))

    return open_source(ref.uri, inner_path=path, revision=revision or None, settings=settings)
