"""Names as users type them, wherever a name is taken.

========================================  ==============================================================================
the name                                  its meaning
========================================  ==============================================================================
``qwen3_0.6b``, ``qwen3_0.6b@user``       the card of that name, with the overlay of that environment
``./…``, ``../…``, ``~/…``, ``/…``        a path; likewise ``file:///…``, and ``folder/model`` if something is there
``hg://org/name[@revision][/inside]``     a repository of the hub; likewise addresses of other schemes, such as
                                          ``https://…`` and ``s3://…``
``org/name[@revision]``                   the same repository, if neither a card nor a file or folder has that name
========================================  ==============================================================================

A path or an address means the card that has this checkpoint. Without such a card, a path is taken as it is, and an
address becomes a card that names only the checkpoint, whose ``config.json`` then describes the model.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref, reads_as_path, split_name
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore
from lading.checkpoints.address import address_of
from lading.checkpoints.card_links import heads_of
from lading.checkpoints.recording import BestEffort
from lading.errors import (
    AssetNotFoundError,
    CheckpointNotFoundError,
    FetchError,
    ModelNotKnownError,
    NotSupportedError,
)
from lading.formats.folder import is_there
from lading.sources.hub.address import HubAddress, check_revision, is_repo_id
from lading.sources.open import HUB_SCHEMES, check_address, open_source
from lading.system.filesystem import expand_home, path_exists
from lading.system.uris import path_uri, shown_uri, uri_path


def find_card(
    target: AssetCard | str | Path,
    store: CardStore | None = None,
    *,
    revision: str | None = None,
    family: str | None = None,
    ask: bool = True,
) -> AssetCard | Path:
    """Return the card that a name, an address or a path means; of a path that no card has, the path itself.

    :param target: as the table of this module has it; a :class:`~pathlib.Path` is a path, however it begins.
    :param store: default: the default store.
    :param revision: a branch, a tag or a commit of a repository, instead of the one that its address names.
    :param family: of a path or an address, take only cards of this family.
    :param ask: whether to ask the hub if it has ``org/name``, unless the catalog knows that repository. Without it,
        every such name becomes a card.

    :raises ModelNotKnownError: it is not a card, a path, or a repository of the hub (offline: of its cache).
    :raises AddressError: the address or the revision is not valid.
    :raises NotSupportedError: ``revision``, for what has no revisions.
    :raises AssetCardError: the card that it means cannot be used.
    :raises FetchError: the hub cannot be reached.
    :raises TypeError: ``target`` is of another type.
    """
    path = as_path(target)
    if path is not None:
        return _at_path(path, store, revision, family)
    if not isinstance(target, str | AssetCard):
        raise TypeError(f"`card` must be an AssetCard, a name, or a Path, but is of type {type(target).__name__}")

    store = open_store(store)
    card = target if isinstance(target, AssetCard) else _named(target, store)
    if card is not None:
        return card if revision is None else _at_revision(card, revision)

    assert isinstance(target, str)
    if "://" in target:
        return _at_address(target, store, revision, family)
    if "/" in target and is_there(Path(target)):
        return _at_path(Path(target), store, revision, family)
    if (uri := _repository(target, revision)) is not None:
        card = _with_checkpoint(uri, store, family)
        if card is None and ask:
            _require_published(target, uri, store)
        return card or _made_for(uri)
    if "/" in target:
        return _at_path(Path(target), store, revision, family)  # nothing is there, which its reader says

    raise unknown_model(target, store)


def unknown_model(name: str, store: AssetStore) -> ModelNotKnownError:
    """Return the error for a name, a path or an address that is not in the catalog, with suggestions."""
    index = f" Run `lading index {shlex.quote(name)}` to record what is there."
    path = as_path(name)
    if path is not None:
        return ModelNotKnownError(name, index if is_there(path) else " The file or folder does not exist.")
    if path_exists(name):
        here = f" To use the file or folder of that name, write './{name}'."
        return ModelNotKnownError(name, index if "/" in name else here)
    near = store.suggest(split_name(name)[0])
    if not near and ("://" in name or _repository(name, None) is not None):
        return ModelNotKnownError(name, index)

    return ModelNotKnownError(name, f" Did you mean {' or '.join(map(repr, near))}?" if near else "")


def no_revisions_error(where: str, revision: str) -> NotSupportedError:
    """Return the error for a revision of something that is neither a repository nor in one."""
    return NotSupportedError(f"{where} has no revisions, but {revision!r} was requested. Name it without a revision.")


def as_path(target: object) -> Path | None:
    """Return the path that is meant by a :class:`~pathlib.Path` and by a text that begins as one; else ``None``."""
    if isinstance(target, Path):
        return expand_home(target)
    if not isinstance(target, str):
        return None
    if reads_as_path(target):
        return expand_home(target)

    return uri_path(target)


def _named(name: str, store: AssetStore) -> AssetCard | None:
    """Return the card of exactly this name; ``None`` if it does not exist."""
    try:
        return store.maybe_retrieve_card(name)
    except AssetNotFoundError as error:  # the card exists, but has no such overlay
        raise ModelNotKnownError(name, error.hint) from None


# --- paths -----------------------------------------------------------------------------------------------------------


def _at_path(path: Path, store: CardStore | None, revision: str | None, family: str | None) -> AssetCard | Path:
    if revision is not None:
        raise no_revisions_error(str(path), revision)

    # A path can be read without a catalog.
    with BestEffort("the catalog cannot be searched for a card of %s", path):
        return _with_checkpoint(path_uri(path), open_store(store), family) or path
    return path


# --- addresses -------------------------------------------------------------------------------------------------------


def _at_address(uri: str, store: AssetStore, revision: str | None, family: str | None) -> AssetCard:
    check_address(uri)
    if revision is not None:
        uri = _revised(uri, revision)

    return _with_checkpoint(uri, store, family) or _made_for(uri)


def _repository(name: str, revision: str | None) -> str | None:
    """Return the address that ``org/name[@revision]`` means; ``None`` if it has another form."""
    repo, at, stated = name.partition("@")
    if repo.count("/") != 1 or not is_repo_id(repo):
        return None
    if at:
        check_revision(stated, name)
    uri = HubAddress(repo=repo, revision=stated if at else None, inner=None).uri

    return uri if revision is None else _revised(uri, revision)


def _require_published(name: str, uri: str, store: AssetStore) -> None:
    """Require that the hub has a repository, unless the catalog knows it.

    :raises ModelNotKnownError: it has not; or offline, its cache has not.
    """
    if store.checkpoint(uri) is not None:
        return
    try:
        open_source(uri, inner_path=None, revision=None, settings=store.settings).snapshot()
    except (CheckpointNotFoundError, FetchError) as error:
        if isinstance(error, FetchError) and not store.settings.offline:
            raise
        raise ModelNotKnownError(name, f" {error}") from None


def _made_for(uri: str) -> AssetCard:
    """Return a card of a checkpoint that no card of the catalog has."""
    return AssetCard(shown_uri(uri), {"checkpoint": uri})


def _revised(uri: str, revision: str) -> str:
    """Return the address of a repository at another revision.

    :raises NotSupportedError: the address leads to something without revisions.
    """
    if uri.partition("://")[0] not in HUB_SCHEMES:
        raise no_revisions_error(shown_uri(uri), revision)
    check_revision(revision, uri)

    return replace(HubAddress.from_uri(uri), revision=revision).uri


def _at_revision(card: AssetCard, revision: str) -> AssetCard:
    """Return the card with another revision of its checkpoint, under the name of that: the catalog's card stays."""
    ref = address_of(card)
    uri = _revised(ref.uri, revision)
    checkpoint = f"{uri};gated=true" if ref.gated else uri

    return AssetCard(replace(ref, uri=uri).shown, {"checkpoint": checkpoint}, card)


# --- the card of a checkpoint ----------------------------------------------------------------------------------------


def _with_checkpoint(uri: str, store: AssetStore, family: str | None) -> AssetCard | None:
    """Return the card that has a checkpoint, and no adapters to merge into it. Of several, the one with the fewest
    bases counts, then the first by name: a card that is based on another has the same checkpoint with changes.
    """
    wanted = _identity(CheckpointRef(uri=uri, gated=False, info_url=None))
    cards = [
        card
        for card in store.cards_at(_spellings(uri))
        if _identity(checkpoint_ref(card)) == wanted and not adapter_refs(card)
    ]
    if family is not None:
        cards = [card for card in cards if (of := card.maybe_get_field("model_family")) is None or of.value == family]

    return min(cards, key=lambda card: (sum(1 for _ in card.chain()), card.name), default=None)


def _identity(ref: CheckpointRef) -> str:
    """Return a text that is equal for all spellings of the place of a checkpoint."""
    path = uri_path(ref.uri)
    if path is not None:
        return path_uri(path if ref.path is None else path / ref.path)
    if ref.scheme not in HUB_SCHEMES:
        return ref.key.rstrip("/")
    address = HubAddress.from_uri(ref.uri).below(ref.path)

    return replace(address, repo=address.repo.casefold()).uri


def _spellings(uri: str) -> list[str]:
    """Return the URIs by which a card may state a checkpoint, apart from upper case."""
    heads = heads_of(uri)
    if uri.partition("://")[0] not in HUB_SCHEMES:
        return heads

    return [f"{scheme}://{head.partition('://')[2]}" for head in heads for scheme in HUB_SCHEMES]


def path_title(path: Path) -> str:
    """Return a path as commands take it, for hints: with a slash."""
    return str(path) if "/" in str(path) else f"./{path}"
