"""What a card says of its model: the family, and the configuration."""

from __future__ import annotations

from typing import Any

from lading.cards.card import AssetCard
from lading.cards.config import architecture_config, resolve_config
from lading.catalog.store import AssetStore
from lading.errors import AssetCardError, ModelArchitectureNotKnownError, ModelFamilyNotKnownError
from lading.models.family import Family, get_family


def family_of_card(card: AssetCard) -> Family[Any, Any]:
    """The family of a card.

    :raises AssetCardError: it is not registered, or the card names none.
    """
    name = card.field("model_family").as_(str)
    try:
        return get_family(name)
    except ModelFamilyNotKnownError as error:
        raise AssetCardError(card.name, f"The card {card.name!r} asks for the model family {name!r}. {error}") from None


def model_config(card: AssetCard, family: Family[Any, Any], store: AssetStore) -> Any:
    """The configuration of a card: the defaults of the family, its architecture's numbers, the card's overrides.

    :raises AssetCardError: the card is of another family, names an architecture that is not known, or states
        overrides that do not fit.
    """
    check_family(card, family)

    architecture = None
    arch = card.maybe_get_field("model_arch")
    if arch is not None:
        try:
            architecture = store.architecture(arch.as_(str), family.name)
        except ModelArchitectureNotKnownError as error:
            raise AssetCardError(card.name, f"The field 'model_arch' of the card {card.name!r}: {error}") from None

    return resolve_config(card, architecture, family.config_kls)


def check_family(card: AssetCard, family: Family[Any, Any]) -> None:
    """:raises AssetCardError: the card is of another family."""
    stated = card.field("model_family").as_(str)
    if stated != family.name:
        raise AssetCardError(
            card.name,
            f"The card {card.name!r} is expected to be of the family {family.name!r}, but its `model_family` is "
            f"{stated!r}.",
        )


def arch_config(arch: str, family: Family[Any, Any], store: AssetStore) -> Any:
    """The configuration of an architecture.

    :raises ModelArchitectureNotKnownError: the family has none of this name.
    """
    return architecture_config(store.architecture(arch, family.name), family.config_kls)
