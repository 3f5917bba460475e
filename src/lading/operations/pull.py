"""The download of checkpoints ahead of their load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import CheckpointContents
from lading.catalog.store import AssetStore
from lading.checkpoints.address import address_of, require_access
from lading.checkpoints.card_digests import with_digests
from lading.checkpoints.checkpoint import Checkpoint, remote_checkpoint
from lading.checkpoints.extra_files import (
    RemoteTokenizer,
    TokenizerRef,
    same_source,
    tokenizer_beside,
    tokenizer_elsewhere,
    tokenizer_ref,
)
from lading.checkpoints.fetch import fetch_checkpoint
from lading.checkpoints.fetch_to_index import FetchedCheckpoint, fetch_and_index, must_fetch_to_index
from lading.checkpoints.locate import card_checkpoint, fetched_card_checkpoint
from lading.checkpoints.names import find_card, no_revisions_error
from lading.checkpoints.pins import with_pins
from lading.checkpoints.published import PublishedCheckpoint, index_source, name_in_source
from lading.checkpoints.recording import fetch_extra_files
from lading.checkpoints.verification import require_stated
from lading.errors import (
    AssetCardError,
    FetchError,
    ModelCheckpointMismatchError,
    NotSupportedError,
    PolicyError,
    TorchNotFoundError,
)
from lading.formats import NotByHeadersError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME
from lading.formats.config_json import CONFIG_NAME, refuse_quantized_config
from lading.models.fit import CheckReport, check_manifest, require_fit
from lading.models.resolve import family_of_card, resolve_model
from lading.sources.open import HUB_SCHEMES, has_folders, open_source
from lading.sources.source import FetchedFile, RemoteFile, Snapshot
from lading.sources.web.address import is_plain
from lading.system.display import counted, human_bytes, representation
from lading.system.uris import shown_uri, uri_path

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFile:
    """A file of a model, or one beside it."""

    name: str
    """The name within the source."""
    size: int | None
    """The size in bytes, if known."""
    path: Path | None
    """The path on this machine; ``None`` if it is not here."""
    fetched: bool
    """``True`` if this pull fetched it, or would."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullReport:
    """The result of a pull, or of a dry run."""

    name: str
    uri: str
    revision: str | None
    files: tuple[PulledFile, ...]

    def __repr__(self) -> str:
        fetched = sum(file.fetched for file in self.files)
        size = sum(file.size or 0 for file in self.files)

        return representation(
            self,
            self.name,
            f"revision {self.revision}" if self.revision else "",
            f"{counted(len(self.files), 'file')} of {human_bytes(size)}",
            f"{fetched} of them not here before",
        )


def pull_model(
    name: AssetCard | str | Path,
    *,
    revision: str | None = None,
    include: Sequence[str] = (),
    dry_run: bool = False,
    progress: bool = True,
    store: CardStore | None = None,
) -> PullReport:
    """Fetch the current checkpoint of a model, and its adapters, and record them in the catalog.

    This checks by the headers that it fits the model's architecture before it fetches a byte of a weight.

    :param name: as ``load_model`` takes it.
    :param revision: a branch, a tag or a commit of the source; default: the one that the address names, or the
        latest. Loads of the same name then use it until the next pull. Adapters have their own revisions.
    :param include: shell-style patterns of other files of the source; this always fetches its ``config.json`` and the
        tokenizer, from there or from the place that the card states. A web server lists no files: there they are names
        of files beside the checkpoint, and ``config.json`` comes if its family needs it.
    :param dry_run: only report what would be fetched.
    :param progress: show a bar on stderr.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises NotSupportedError: a path that no card has; ``revision`` for a source without revisions, or patterns for
        one that lists no files.
    :raises ModelGatedError: the publisher hands it out on request.
    :raises ModelCheckpointMismatchError: it does not fit the card's architecture; nothing was fetched.
    :raises FetchError: the source cannot be reached, or answers nonsense.
    :raises CatalogError: the pull has to fetch files, and the catalog cannot be written.
    :raises DigestMismatchError: the bytes are not those that are published.
    :raises OSError: the disk is full, or the cache cannot be written.
    """
    store = open_store(store)
    card = find_card(name, store)
    if isinstance(card, Path):
        raise NotSupportedError(
            f"Expected a model that can be fetched, found the path {card}, which no card has: it is on this machine. "
            "Run `lading add` to give it a card."
        )
    adapters = [
        _pull(ref.card, store, None, (ADAPTER_CONFIG_NAME,), dry_run=dry_run, progress=progress)
        for ref in adapter_refs(card)
    ]
    report = _pull(card, store, revision, include, dry_run=dry_run, progress=progress)
    added = [replace(file, name=f"adapter: {file.name}") for each in adapters for file in each.files]

    return replace(report, files=(*report.files, *added))


def _pull(
    card: AssetCard,
    store: AssetStore,
    revision: str | None,
    include: Sequence[str],
    *,
    dry_run: bool,
    progress: bool,
) -> PullReport:
    """Fetch one checkpoint, as :func:`pull_model`."""
    ref = address_of(card)
    require_access(card.title, ref)
    if uri_path(ref.uri) is not None:
        checkpoint = card_checkpoint(card, store)
        if revision is not None:
            raise no_revisions_error(checkpoint.where, revision)
        if not dry_run:
            require_stated(checkpoint, store, progress=progress)
        tokenizer = _tokenizer_elsewhere(card, ref, None, store)
        return _report(checkpoint, False, _bring(tokenizer, checkpoint, store, dry_run=dry_run, progress=progress))
    if ref.scheme not in HUB_SCHEMES:
        _require_without_revisions(ref, revision, include)

    published, missing = _published(ref, revision, store), False
    if published is None:
        if dry_run and store.checkpoint(ref.key) is None:
            file = PulledFile(name=ref.shown, size=None, path=None, fetched=True)
            return PullReport(name=card.name, uri=ref.key, revision=revision, files=(file,))
        if dry_run or store.settings.offline:
            checkpoint = card_checkpoint(card, store, progress=progress)
            _require_known_revision(checkpoint, revision)
        else:
            checkpoint, published, missing = _fetched_whole(card, ref, store, revision, progress=progress)
    else:
        refuse_quantized_config(published.hf_config, ref.shown)
        checkpoint = _as_checkpoint(card, ref, published, store)
    pinned = with_pins(checkpoint, card, store)
    missing = missing or checkpoint.files is None
    if missing and not dry_run:
        store.database.require_writable()  # before config.json is fetched
    _require_fit(card, checkpoint, published, store)

    companions = _companions(checkpoint, published, include, card, store)
    tokenizer = _tokenizer_elsewhere(card, ref, published, store)
    if dry_run:
        planned = _bring(tokenizer, checkpoint, store, dry_run=True, progress=progress)
        return _report(checkpoint, missing, [*map(_pulled, companions), *planned])

    if published is not None and not isinstance(published, FetchedCheckpoint):
        contents = CheckpointContents(uri=checkpoint.uri, manifest=checkpoint.manifest, revision=checkpoint.revision)
        record_checkpoint(store.database, contents, cards=[card.title])
    stated = with_digests(pinned, card, store)
    here = fetch_checkpoint(stated, store, settings=store.settings, progress=progress)
    require_stated(here, store, progress=progress)
    fetched = _fetch(checkpoint, companions, store, progress=progress)
    brought = _bring(tokenizer, checkpoint, store, dry_run=False, progress=progress)

    return _report(here, missing, [*map(_pulled, fetched), *brought])


def _published(ref: CheckpointRef, revision: str | None, store: AssetStore) -> PublishedCheckpoint | None:
    """Return the current checkpoint, by its headers; ``None`` if offline, or if its manifest takes a download."""
    if must_fetch_to_index(ref) or store.settings.offline:
        return None
    try:
        return index_source(ref, settings=store.settings, revision=revision)
    except NotByHeadersError:
        return None


def _fetched_whole(
    card: AssetCard, ref: CheckpointRef, store: AssetStore, revision: str | None, *, progress: bool
) -> tuple[Checkpoint, FetchedCheckpoint, bool]:
    """Return the current checkpoint after its download, and whether the catalog had other local files."""
    store.database.require_writable()
    known = None if store.checkpoint(ref.key) is None else card_checkpoint(card, store)
    whole = fetch_and_index(ref, store=store, settings=store.settings, progress=progress, revision=revision)
    checkpoint = fetched_card_checkpoint(card.title, ref, whole, store)

    return checkpoint, whole, known is None or known.files != checkpoint.files


def _require_known_revision(checkpoint: Checkpoint, revision: str | None) -> None:
    """Check that the requested revision is the known one, as lading may not ask the source.

    :raises FetchError: it is another one.
    """
    if revision is not None and revision != checkpoint.revision:
        known = checkpoint.revision or "one without a name"
        raise FetchError(
            f"The revision {revision!r} of {checkpoint.where} cannot be fetched offline; the known one is {known}. "
            "Pull without --revision, or with a network."
        )


def _require_without_revisions(ref: CheckpointRef, revision: str | None, include: Sequence[str]) -> None:
    """Check that a pull needs nothing that web servers and object stores lack.

    :raises NotSupportedError: it does.
    """
    if revision is not None:
        raise no_revisions_error(shown_uri(ref.uri), revision)
    if has_folders(ref.uri):
        return
    patterns = [name for name in include if not is_plain(name) or set(name) & set("*?[")]
    if patterns:
        raise NotSupportedError(
            f"{shown_uri(ref.uri)} is one file, whose server does not say what lies beside it: expected plain names of "
            f"files to include, such as tokenizer.json, found {patterns[0]!r}. Name each file."
        )


def _named_beside(ref: CheckpointRef, snapshot: Snapshot, names: Sequence[str], store: AssetStore) -> Snapshot:
    """Return the snapshot of a source that lists no files, with the files of these names."""
    source = open_source(ref.uri, inner_path=None, revision=None, settings=store.settings)
    more = source.with_siblings(snapshot, names)
    for name in names:
        if more.file(name) is None:
            log.warning("no file %r is beside %s", name, shown_uri(ref.uri))

    return more


def _as_checkpoint(
    card: AssetCard, ref: CheckpointRef, published: PublishedCheckpoint, store: AssetStore
) -> Checkpoint:
    """Return the published checkpoint, with the catalog's local files if they are the same."""
    fresh = remote_checkpoint(card.name, ref, published.manifest, published.revision)
    known = store.checkpoint(ref.key)
    if known is None or not known.manifest.tensors_equal(fresh.manifest):
        return fresh
    digests = all(shard.sha256 for shard in (*fresh.manifest.shards, *known.manifest.shards))
    # Without digests, another revision may have other values in the same tensors.
    if known.revision != fresh.revision and not digests:
        return fresh
    if not known.manifest.has_files_of(fresh.manifest):
        return fresh

    kept = card_checkpoint(card, store)
    if not digests and not fresh.revision and not _is_unchanged(kept, ref, published, store):
        return fresh

    return replace(kept, name=fresh.name, revision=fresh.revision)


def _is_unchanged(kept: Checkpoint, ref: CheckpointRef, published: PublishedCheckpoint, store: AssetStore) -> bool:
    """Return whether the files of a source without revisions are still those that are here.

    Their validators decide: size and tensors are the same after further training, too.
    """
    source = open_source(ref.uri, inner_path=ref.path, revision=None, settings=store.settings)
    names = [shard.name for shard in kept.manifest.shards]
    files = [published.snapshot.file(name_in_source(published.inner, name, shards=names)) for name in names]
    here = source.local(published.snapshot, [file for file in files if file is not None])

    return [file.path for file in kept.files or ()] == here


def _require_fit(
    card: AssetCard, checkpoint: Checkpoint, published: PublishedCheckpoint | None, store: AssetStore
) -> None:
    # A web server lists no files, so only a request shows whether one is beside the checkpoint.
    checkpoint = replace(checkpoint, hf_config=None if published is None else published.hf_config or None)
    try:
        report = _checked(card, checkpoint, store)
    except TorchNotFoundError as error:
        log.warning("the checkpoint of %s was not checked to fit: %s", card.title, error)
        return
    if report is not None:
        require_fit(report, path=checkpoint.where, name=card.title)


def _checked(card: AssetCard, checkpoint: Checkpoint, store: AssetStore) -> CheckReport | None:
    try:
        model = resolve_model(card, store, checkpoint=checkpoint)
    except (AssetCardError, ModelCheckpointMismatchError, NotSupportedError, PolicyError) as error:
        if isinstance(error, TorchNotFoundError) or _is_of_known_family(card):
            raise
        log.info("the checkpoint of %s was not checked to fit: %s", card.title, error)
        return None  # other programs may need it all the same

    return check_manifest(checkpoint.manifest, model.family, model.config, model.adapters)


def _is_of_known_family(card: AssetCard) -> bool:
    try:
        return family_of_card(card) is not None
    except AssetCardError:
        return False


def _companions(
    checkpoint: Checkpoint,
    published: PublishedCheckpoint | None,
    include: Sequence[str],
    card: AssetCard,
    store: AssetStore,
) -> tuple[RemoteFile, ...]:
    """Return the extra files to fetch with the weights."""
    if published is None:
        return ()

    manifest = checkpoint.manifest
    shards = [shard.name for shard in manifest.shards]
    beside = [name for name in (CONFIG_NAME, manifest.index_name) if name is not None]
    weights = {name_in_source(published.inner, name, shards=shards) for name in shards}
    always = {name_in_source(published.inner, name, shards=shards) for name in beside}
    ref, snapshot = checkpoint_ref(card), published.snapshot
    if include and not has_folders(ref.uri):
        snapshot = _named_beside(ref, snapshot, include, store)
    tokenizer = tokenizer_ref(card, store.retrieve_card)
    if same_source(tokenizer, ref):
        always |= {
            file.name for file in tokenizer_beside(tokenizer, snapshot, published.inner, settings=store.settings)
        }

    return tuple(
        file
        for file in snapshot.files
        if file.name not in weights
        and (file.name in always or any(fnmatchcase(file.name, pattern) for pattern in include))
    )


def _tokenizer_elsewhere(
    card: AssetCard, ref: CheckpointRef, published: PublishedCheckpoint | None, store: AssetStore
) -> RemoteTokenizer | None:
    """Return the files of the tokenizer, if they are neither on this machine nor among those beside the weights."""
    tokenizer = tokenizer_ref(card, store.retrieve_card)
    if tokenizer is None and has_folders(ref.uri):
        tokenizer = TokenizerRef(uri=ref.uri, path=ref.path)
    if tokenizer is None or store.settings.offline:
        return None
    if same_source(tokenizer, ref) and (published is not None or not has_folders(ref.uri)):
        return None  # in the archive of the checkpoint, or beside it

    return tokenizer_elsewhere(tokenizer, settings=store.settings)


def _bring(
    tokenizer: RemoteTokenizer | None, checkpoint: Checkpoint, store: AssetStore, *, dry_run: bool, progress: bool
) -> list[PulledFile]:
    if tokenizer is None:
        return []
    files = tokenizer.files if dry_run else tokenizer.fetch(store, checkpoint.uri, progress=progress)
    where = shown_uri(tokenizer.source.uri)

    return [replace(_pulled(file), name=f"{where}: {file.name}") for file in files]


def _pulled(file: RemoteFile | FetchedFile) -> PulledFile:
    if isinstance(file, FetchedFile):
        return PulledFile(name=file.name, size=file.stat.size, path=file.path, fetched=True)

    return PulledFile(name=file.name, size=file.size, path=None, fetched=True)


def _fetch(
    checkpoint: Checkpoint, files: tuple[RemoteFile, ...], store: AssetStore, *, progress: bool
) -> list[FetchedFile]:
    ref = checkpoint.ref
    if not files or ref is None:
        return []

    # The names of files begin at the top of the source, regardless of the place of the checkpoint in it.
    source = open_source(ref.uri, inner_path=None, revision=checkpoint.revision or None, settings=store.settings)
    snapshot = Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=files)

    return fetch_extra_files(source, snapshot, files, store, checkpoint.uri, progress=progress)


def _report(checkpoint: Checkpoint, missing: bool, beside: Sequence[PulledFile]) -> PullReport:
    shards = checkpoint.manifest.shards
    paths = [None] * len(shards) if checkpoint.files is None else [file.path for file in checkpoint.files]
    files = [
        PulledFile(name=shard.name, size=shard.size, path=path, fetched=missing)
        for shard, path in zip(shards, paths, strict=True)
    ]

    return PullReport(
        name=checkpoint.name, uri=checkpoint.uri, revision=checkpoint.revision or None, files=(*files, *beside)
    )
