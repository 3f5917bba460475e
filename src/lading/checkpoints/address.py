"""The address of a card's checkpoint, and the access to it."""

from __future__ import annotations

from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.errors import AddressError, AssetCardError, ModelGatedError
from lading.sources.hub.cache import has_token
from lading.sources.open import HUB_SCHEMES, check_address


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
