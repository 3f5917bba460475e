"""The checkpoint of a card: its place, its manifest, and its records in the catalog."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lading import formats
from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CheckpointRef
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore, StoredCheckpoint
from lading.checkpoints.address import address_of, require_access
from lading.checkpoints.card_digests import with_digests
from lading.checkpoints.checkpoint import (
    Checkpoint,
    LocalCheckpointFiles,
    header_checks,
    local_checkpoint,
    remote_checkpoint,
)
from lading.checkpoints.fetch_to_index import (
    FetchedCheckpoint,
    fetch_and_index,
    must_fetch_to_index,
    not_streamed_error,
)
from lading.checkpoints.local_copies import all_verified, copies_as_known, was_verified
from lading.checkpoints.names import find_card, path_title
from lading.checkpoints.pins import with_pins
from lading.checkpoints.published import PublishedCheckpoint, index_source
from lading.checkpoints.recording import record_manifest, stored_checkpoint
from lading.checkpoints.verification import record_rewritten
from lading.errors import (
    CheckpointNotFoundError,
    DigestMismatchError,
    InternalError,
    ModelGatedError,
)
from lading.formats.config_json import read_hf_config, refuse_quantized_config
from lading.system.uris import path_uri, shown_uri, uri_path


def card_checkpoint(
    card: AssetCard | Path,
    store: AssetStore,
    *,
    progress: bool = False,
    accept_others: bool = False,
    fetches: bool = True,
) -> Checkpoint:
    """Return the checkpoint of a card, with the catalog's manifest if that is still valid.

    This does not fetch a remote checkpoint: it reads the headers there, once, and pins the revision. Only a checkpoint
    of ``torch.save`` has to be fetched first (:mod:`lading.checkpoints.fetch_to_index`).

    :param card: a card, or the path of a checkpoint.
    :param progress: show a bar on stderr for that download.
    :param accept_others: accept files of other tensors than those that were verified, and do not record them.
    :param fetches: whether to fetch a checkpoint whose headers do not suffice; if not, that is an error.

    :raises ModelGatedError: the card names no checkpoint.
    :raises CheckpointNotFoundError: nothing is at the place that the card states.
    :raises FetchError: the source cannot be reached.
    :raises DigestMismatchError: other files have replaced those that were verified, or that the card pins; or the card
        publishes other digests than the recorded ones.
    :raises NotSupportedError: it is quantized.
    """
    if isinstance(card, Path):
        return _local_checkpoint(path_title(card), local_checkpoint(card), store, accept_others=accept_others)
    ref = address_of(card)
    path = uri_path(ref.uri)
    if path is None:
        checkpoint = _remote_checkpoint(card.title, ref, store, progress=progress, fetches=fetches)
        return with_digests(with_pins(checkpoint, card, store), card, store)

    require_access(card.title, ref)
    path = local_checkpoint(path, inner_path=ref.path)

    checkpoint = with_pins(_local_checkpoint(card.title, path, store, accept_others=accept_others), card, store)

    return checkpoint if accept_others else with_digests(checkpoint, card, store)


def local_paths(card: AssetCard | Path, store: AssetStore) -> list[Path]:
    """Return the path of a card's checkpoint on this machine: its folder or its file; else all of its files. Those of
    its adapters follow.

    :param card: a card, or the path itself.

    :raises ModelGatedError: the card names no checkpoint.
    :raises CheckpointNotFoundError: it is not on this machine.
    """
    if isinstance(card, Path):
        return [local_checkpoint(card)]
    adapters = [path for each in adapter_refs(card) for path in local_paths(each.card, store)]
    ref = address_of(card)
    path = uri_path(ref.uri)
    if path is not None:
        return [local_checkpoint(path, inner_path=ref.path), *adapters]

    stored = store.checkpoint(ref.key) if ref.uri else None
    files = None if stored is None else copies_as_known(stored)
    if stored is None or files is None:
        if ref.gated:
            raise ModelGatedError(card.title, ref.info_url)
        raise CheckpointNotFoundError(
            ref.shown,
            f"The checkpoint of {card.title!r} is at {ref.shown}, not on this machine. `lading pull {card.title}` "
            "fetches it.",
        )

    paths = [file.path for file in files]
    folders = {each.parent for each in paths}
    named = all(file.name == shard.name for file, shard in zip(paths, stored.manifest.shards, strict=True))

    return [*([folders.pop()] if len(paths) > 1 and len(folders) == 1 and named else paths), *adapters]


def index_checkpoint(
    target: AssetCard | str | Path,
    *,
    revision: str | None = None,
    restrict: bool = True,
    store: CardStore | None = None,
) -> StoredCheckpoint:
    """Read the manifest of a checkpoint, and write it to the catalog.

    For a remote checkpoint this reads only the current headers, a few megabytes. It takes files on this machine as they
    are now, and forgets the records of other bytes in their place.

    :param target: a card, or what :func:`lading.checkpoints.names.find_card` takes; likewise ``revision``.
    :param restrict: as :func:`lading.formats.index` takes it.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises AddressError: the address is invalid; in a card that is an ``AssetCardError``.
    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the file breaks the rules of its format.
    :raises RefusedPickleError: unpickling it would import what a state dict does not need.
    :raises FetchError: the source cannot be reached.
    :raises CatalogError: the catalog cannot be written.
    """
    store = open_store(store)
    found_card = find_card(target, store, revision=revision)
    if isinstance(found_card, Path):
        card_name, ref = None, CheckpointRef(uri=path_uri(found_card), gated=False, info_url=None)
    else:
        card_name, ref = found_card.title, address_of(found_card)
        require_access(found_card.title, ref)
    path = uri_path(ref.uri)
    if path is None:
        found = _published_or_fetched(ref, store, name=card_name, progress=False, restrict=restrict)
        contents = CheckpointContents(
            uri=ref.key,
            manifest=found.manifest,
            copies=found.copies if isinstance(found, FetchedCheckpoint) else (),
            revision=found.revision,
            accept=True,
        )
    else:
        path = local_checkpoint(path, inner_path=ref.path)
        here = LocalCheckpointFiles.read(path, cache=store.settings.cache_dir, restrict=restrict)
        contents = here.contents(accept=True)

    store.database.require_writable()
    record_checkpoint(store.database, contents, cards=[] if card_name is None else [card_name])
    if isinstance(found_card, AssetCard):
        indexed = remote_checkpoint(ref.shown, ref, contents.manifest, contents.revision)
        with_digests(replace(indexed, uri=contents.uri), found_card, store, accept=True)
    stored = store.checkpoint(contents.uri)
    if stored is None:
        raise InternalError(f"the manifest of {shown_uri(contents.uri)} was written to the catalog, but is not there")

    return stored


# --- remote -----------------------------------------------------------------------------------------------------------


def _remote_checkpoint(
    name: str, ref: CheckpointRef, store: AssetStore, *, progress: bool, fetches: bool
) -> Checkpoint:
    stored = stored_checkpoint(name, ref.key, store) if ref.uri else None
    files = None if stored is None else copies_as_known(stored)
    if files is None:  # files on this machine need no access
        require_access(name, ref)
    if stored is not None:
        known = remote_checkpoint(name, ref, stored.manifest, stored.revision)
        trusted = files is not None and all_verified(stored)
        return replace(known, files=files, trusted=trusted, published=stored.published)

    published = _published_or_fetched(ref, store, name=name, progress=progress, fetches=fetches)
    if isinstance(published, FetchedCheckpoint):
        return fetched_card_checkpoint(name, ref, published, store)
    refuse_quantized_config(published.hf_config, ref.shown)
    checkpoint = remote_checkpoint(name, ref, published.manifest, published.revision)
    record_manifest(checkpoint, (), store)

    return checkpoint


def _published_or_fetched(
    ref: CheckpointRef,
    store: AssetStore,
    *,
    name: str | None,
    progress: bool,
    restrict: bool = True,
    fetches: bool = True,
) -> PublishedCheckpoint:
    """Return the published checkpoint, by its headers; after a download, if they do not suffice.

    :raises NotSupportedError: they do not, and this must not fetch.
    """
    if not must_fetch_to_index(ref):
        try:
            return index_source(ref, settings=store.settings, name=name)
        except formats.NotByHeadersError:
            pass
    if not fetches:
        raise not_streamed_error(name or ref.shown, ref.shown)

    return fetch_and_index(ref, store=store, settings=store.settings, progress=progress, restrict=restrict, name=name)


def fetched_card_checkpoint(name: str, ref: CheckpointRef, fetched: FetchedCheckpoint, store: AssetStore) -> Checkpoint:
    """Return a card's checkpoint that was just fetched, and record it in the catalog."""
    checkpoint = remote_checkpoint(name, ref, fetched.manifest, fetched.revision)
    checkpoint = replace(checkpoint, files=fetched.files, trusted=True)
    # A source may publish it again under the same address: records of other bytes do not hold for these.
    record_manifest(checkpoint, fetched.copies, store, checks=fetched.checks, accept=True)
    if fetched.rewritten:
        record_rewritten(checkpoint, store)

    return checkpoint


# --- on this machine --------------------------------------------------------------------------------------------------


def _local_checkpoint(name: str, path: Path, store: AssetStore, *, accept_others: bool) -> Checkpoint:
    refuse_quantized_config(read_hf_config(path), path)

    stored = stored_checkpoint(name, path_uri(path), store)
    known = None if stored is None else LocalCheckpointFiles.as_known(path, stored)
    if stored is not None and known is not None:
        return replace(known.checkpoint(name, trusted=all_verified(stored)), published=stored.published)

    found = LocalCheckpointFiles.read(path, cache=store.settings.cache_dir)
    if found.path != path:  # a rewrite in the cache, which the catalog may know
        made = _local_checkpoint(name, found.path, store, accept_others=accept_others)
        return replace(made, where=str(path))
    checkpoint = found.checkpoint(name)
    same = stored is not None and found.manifest.tensors_equal(stored.manifest)
    if stored is not None and same and found.manifest.has_files_of(stored.manifest):
        # The records of the expected bytes hold for these, too.
        manifest = replace(found.manifest, shards=stored.manifest.shards)
        checkpoint = replace(checkpoint, manifest=manifest, published=stored.published)
    if stored is not None and not same and was_verified(stored, store):
        if accept_others:
            return checkpoint
        raise DigestMismatchError(
            path,
            f"{path} is not the checkpoint that was verified: it has other files or tensors now. If you changed "
            f"it on purpose, run `lading index {name}` to accept it.",
            expected=f"{len(stored.manifest)} tensors",
            found=f"{len(found.manifest)} tensors",
        )
    # Bytes outside of tensors get digests at once, tensors when a load reads all bytes.
    record_manifest(checkpoint, found.copies(), store, checks=header_checks(checkpoint, {}) if stored is None else ())

    return checkpoint
