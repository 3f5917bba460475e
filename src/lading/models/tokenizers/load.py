"""The load of a tokenizer: from a card or a path to its file, its family and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lading.cards.card import AssetCard
from lading.catalog.own_store import CardStore, open_store
from lading.checkpoints.extra_files import tokenizer_card
from lading.checkpoints.names import find_card
from lading.checkpoints.tokenizer_file import TokenizerFile, card_tokenizer_file, local_tokenizer_file
from lading.errors import AssetCardError, NotSupportedError
from lading.models.tokenizers.families import ANY_FAMILY, TokenizerFamily, TokenizerLayout, get_tokenizer_family
from lading.models.tokenizers.hugging_face_model import HuggingFaceModel
from lading.models.tokenizers.sentencepiece_model import SentencePieceModel
from lading.models.tokenizers.tiktoken_model import TiktokenModel
from lading.models.tokenizers.tokenizer import Tokenizer
from lading.models.tokenizers.vocabulary import TokenModel

if TYPE_CHECKING:
    from lading.gangs import Gangs


def load_tokenizer(
    card: AssetCard | str | Path,
    *,
    revision: str | None = None,
    family: str | None = None,
    gangs: Gangs | None = None,
    config: object | None = None,
    progress: bool = True,
    store: CardStore | None = None,
) -> Tokenizer:
    """Load the tokenizer of a model.

    The card's ``tokenizer`` states its place, or that of the card that ``tokenizer_ref`` names; without either, it is
    beside the checkpoint. This fetches it if it is missing here. Its family, ``tokenizer_family``, states the control
    tokens around a text, and ``tokenizer_config`` configures that; without a family, ``encode`` puts nothing around a
    text.

    :param card: as ``load_model`` takes it, or the path of the tokenizer's file; likewise ``revision``.
    :param family: instead of the card's family; for a path, the only way to state one.
    :param gangs: only rank 0 reads the file, and the others get its content.
    :param config: instead of the card's configuration, an object of the family's class.
    :param progress: show a bar on stderr.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises AssetCardError: the card names an unknown family or a configuration that does not fit, references form a
        circle, or a field is of another type.
    :raises CheckpointNotFoundError: nothing is at the place of the tokenizer (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the file is not what its name says.
    :raises NotSupportedError: ``family`` is unknown, the tokenizer is not of a kind that the family uses, or the
        package that reads it is not installed (``pip install 'lading-hub[tokenizers]'``).
    :raises FetchError: its source cannot be reached.
    :raises TypeError: ``config`` is not of the family's class.
    """

    def read() -> tuple[str, TokenizerLayout, TokenizerFile]:
        found = find_card(card, store, revision=revision)
        if isinstance(found, Path):
            chosen, layout = _laid_out(family, config, None)
            return chosen.name, layout, local_tokenizer_file(found, layout.libraries)
        asked = open_store(store)
        chosen, layout = _laid_out(family, config, tokenizer_card(found, asked.retrieve_card))
        return chosen.name, layout, card_tokenizer_file(found, asked, layout.libraries, progress=progress)

    name, layout, file = read() if gangs is None else gangs.root.first(read)

    return Tokenizer(_model(file, layout), layout.control, family=name, label=file.label)


def _laid_out(
    asked: str | None, config: object | None, card: AssetCard | None
) -> tuple[TokenizerFamily, TokenizerLayout]:
    family = _family(asked, card)

    return family, family.layout(_config(config, family, card))


def _family(asked: str | None, card: AssetCard | None) -> TokenizerFamily:
    if asked is not None:
        return get_tokenizer_family(asked)
    stated = None if card is None else card.maybe_get_field("tokenizer_family")
    if card is None or stated is None:
        return ANY_FAMILY
    try:
        return get_tokenizer_family(stated.as_(str))
    except NotSupportedError as error:
        raise AssetCardError(
            card.name,
            f"The field 'tokenizer_family' of the card {card.name!r}: {error} To load the tokenizer as another family, "
            "pass `family=` to load_tokenizer.",
        ) from None


def _config(config: object | None, family: TokenizerFamily, card: AssetCard | None) -> object:
    if config is not None:
        if not isinstance(config, family.config_kls):
            raise TypeError(
                f"`config` must be a {family.config_kls.__name__} for the tokenizer family {family.name!r}, but is of "
                f"type {type(config).__name__}"
            )
        return config
    # The configuration of another family than the card's says nothing about this one.
    if card is None or (stated := card.maybe_get_field("tokenizer_family")) is None or stated.value != family.name:
        return family.config_kls()

    from lading.cards.config import tokenizer_config  # pydantic, which only cards need

    return tokenizer_config(card, family.config_kls)


def _model(file: TokenizerFile, layout: TokenizerLayout) -> TokenModel:
    match file.library:
        case "sentencepiece":
            return SentencePieceModel(file.data, file.label, first=layout.first, last=layout.last)
        case "tiktoken":
            return TiktokenModel(
                file.data,
                file.label,
                split_regex=layout.split_regex,
                special_tokens=layout.special_tokens,
                names=layout.names,
            )
        case "tokenizers":
            return HuggingFaceModel(file.data, file.label, config=file.config, names=layout.names)
