"""Checkpoints on the hub that cards name, and their commits in a Hugging Face cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lading.cards.card import CheckpointRef
from lading.catalog.store import AssetStore, StoredCheckpoint
from lading.checkpoints.card_links import cards_with
from lading.errors import CheckpointNotFoundError, LadingError
from lading.operations.find_checkpoints import FoundCheckpoint
from lading.sources.hub.address import SCHEMES, HubAddress, is_file_name
from lading.sources.hub.cache import cached_commit, snapshot_folders

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCheckpoint:
    """A checkpoint on the hub, as cards name it."""

    uri: str
    revision: str | None = None
    """The branch, tag or commit in the address."""
    inner: str | None = None
    """The folder or the file in the repository; ``None`` for the whole repository."""
    cards: tuple[str, ...] = ()
    """The names of the cards."""


def hub_checkpoints(store: AssetStore) -> Mapping[str, Sequence[HubCheckpoint]]:
    """Return the hub checkpoints that cards name, by the case-folded id of their repository.

    Invalid addresses in cards are logged and skipped.

    :raises CatalogError: the catalog cannot be read.
    """
    found: dict[str, tuple[HubAddress, CheckpointRef, list[str]]] = {}
    for card, ref in cards_with(store, (), below=SCHEMES):
        try:
            address = HubAddress.from_uri(ref.uri)
        except LadingError as error:
            log.warning("the card %s names no repository: %s", card.name, error)
            continue
        found.setdefault(ref.key, (address, ref, []))[2].append(card.name)

    by_repo: dict[str, list[HubCheckpoint]] = {}
    for uri, (address, ref, cards) in found.items():
        inner = address.below(ref.path).inner
        if inner and not is_file_name(inner):
            log.warning("the checkpoint %s leads out of its repository", uri)
            continue
        by_repo.setdefault(address.repo.casefold(), []).append(
            HubCheckpoint(uri=uri, revision=address.revision, inner=inner, cards=tuple(cards))
        )

    return by_repo


def resolve_commit(place: FoundCheckpoint, revision: str | None, stored: StoredCheckpoint | None) -> str | None:
    """Resolve a revision to a commit in the folder of a repository; return ``None`` if it is not there.

    :param place: the folder, or one snapshot in it, which is then the only possible result.
    :param revision: ``None`` for the main branch, or the only commit that is there.
    :param stored: the indexed checkpoint, whose commit takes precedence over the branches in the cache.
    """
    if stored is not None and stored.revision and (place.path / "snapshots" / stored.revision).is_dir():
        commit: str | None = stored.revision
    else:
        commit = cached_commit(place.path, revision or "main")
        if commit is None and revision is None:
            snapshots = snapshot_folders(place.path)
            commit = snapshots[0].name if len(snapshots) == 1 else None
    if place.commit not in (None, commit):
        return place.commit if revision is None and stored is None else None

    return commit if commit is not None and (place.path / "snapshots" / commit).is_dir() else None


def no_snapshot_error(place: FoundCheckpoint) -> CheckpointNotFoundError:
    """Return the error for a repository without a snapshot, or with several and no main branch."""
    snapshots = [path.name for path in snapshot_folders(place.path)]
    found = f"found {', '.join(snapshots)}, but no reference to the main one" if snapshots else "found none"

    return CheckpointNotFoundError(
        place.path,
        f"{place.path}: expected a snapshot of the repository, {found}. "
        "Give the path of a snapshot, or fetch the repository again.",
    )
