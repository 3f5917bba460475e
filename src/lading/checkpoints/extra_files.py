"""The extra files of weights: the configuration and the tokenizer, at the places that a card states."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref, split_gated
from lading.catalog.store import AssetStore
from lading.checkpoints.address import source_of
from lading.checkpoints.checkpoint import Checkpoint, local_checkpoint
from lading.checkpoints.published import name_in_source
from lading.checkpoints.recording import fetch_extra_files
from lading.errors import AddressError, AssetCardError, CheckpointNotFoundError, FetchError, InternalError
from lading.formats.config_json import CONFIG_NAME, read_config_json, read_hf_config
from lading.formats.folder import folder_of, is_checkpoint_file
from lading.sources.open import HUB_SCHEMES, check_address, has_folders, open_source
from lading.sources.source import FetchedFile, RemoteFile, Snapshot, Source
from lading.system.settings import Settings
from lading.system.uris import uri_path

log = logging.getLogger("lading")

TOKENIZER_JSON = "tokenizer.json"

SENTENCEPIECE_NAMES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""The names of sentencepiece models in repositories, the most common first."""

TOKENIZER_NAMES = frozenset(
    {
        TOKENIZER_JSON, *SENTENCEPIECE_NAMES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "tekken.json",
    }
)  # fmt: skip
"""The files in which transformers, tokenizers and sentencepiece find a tokenizer."""

COMPANION_NAMES = TOKENIZER_NAMES | {
    CONFIG_NAME, "generation_config.json", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip
"""The files beside weights that users of a model need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerRef:
    """The ``tokenizer`` field of a card, or of the card that its ``tokenizer_ref`` leads to."""

    uri: str
    path: str | None
    """The ``tokenizer_path`` inside the source, if the card names one."""


def tokenizer_ref(card: AssetCard, retrieve: Callable[[str], AssetCard]) -> TokenizerRef | None:
    """Return the place of a card's tokenizer; ``None`` if the card states no source: then it is beside the checkpoint.

    The parameters and errors are those of :func:`tokenizer_card`; an invalid address is an ``AssetCardError``, too.
    """
    card = tokenizer_card(card, retrieve)
    field = card.maybe_get_field("tokenizer")
    if field is None:
        return None
    path = card.maybe_get_field("tokenizer_path")
    uri, gated = split_gated(field.as_uri())
    if gated and not _is_hub(uri):
        return None  # a page where users request the checkpoint, which includes the tokenizer
    try:
        check_address(uri)
    except AddressError as error:
        raise AssetCardError(
            card.name, f"The field 'tokenizer' of the card {card.name!r} is not a valid address. {error}"
        ) from None

    return TokenizerRef(uri=uri, path=None if path is None else path.as_(str))


def tokenizer_card(card: AssetCard, retrieve: Callable[[str], AssetCard]) -> AssetCard:
    """Return the card that describes the tokenizer of a card: itself, or the one to which ``tokenizer_ref`` leads.

    The nearest card of the chain that states ``tokenizer`` or ``tokenizer_ref`` counts; the latter is the name of the
    card with the tokenizer. A null as ``tokenizer`` undoes both, one as ``tokenizer_ref`` only that field.

    :param retrieve: returns the card of a name.

    :raises AssetCardError: references that form a circle, or a field of another type.
    :raises AssetNotFoundError: a reference to a card that is not in the catalog.
    """
    seen = [card.name]
    while True:
        reference = card.maybe_get_field("tokenizer_ref")
        stated = (c.metadata for c in card.chain() if "tokenizer" in c.metadata or c.metadata.get("tokenizer_ref"))
        if reference is None or "tokenizer" in next(stated, {}):
            return card
        name = reference.as_(str)
        if name in seen:
            raise AssetCardError(
                seen[0], f"The `tokenizer_ref` of the card {seen[0]!r} forms a cycle: {' → '.join([*seen, name])}."
            )
        seen.append(name)
        card = retrieve(name)


def same_source(tokenizer: TokenizerRef | None, ref: CheckpointRef) -> bool:
    """Return whether the tokenizer and the checkpoint come from the same source."""
    return tokenizer is None or _source_of(tokenizer.uri) == _source_of(ref.uri)


def _source_of(uri: str) -> str:
    """Return the part of a URI that identifies the source."""
    if not _is_hub(uri):
        return uri.rstrip("/")

    from lading.sources.hub.address import HubAddress

    return f"hub {HubAddress.from_uri(uri).repo.casefold()}"


def in_snapshot(snapshot: Snapshot, folder: str | None, names: frozenset[str]) -> list[RemoteFile]:
    """Return the files of a snapshot with one of ``names``, in the folder of ``folder`` (see
    :func:`lading.checkpoints.published.name_in_source`).
    """
    is_file = folder is not None and snapshot.file(folder) is not None
    shards = [folder.rpartition("/")[2]] if folder is not None and is_file else []
    wanted = {name_in_source(folder, name, shards=shards) for name in names}

    return [file for file in snapshot.files if file.name in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteTokenizer:
    """The files of a source other than the checkpoint's, at one revision, perhaps not fetched yet."""

    source: Source
    snapshot: Snapshot
    files: tuple[RemoteFile, ...]
    member: str | None = None
    """The member of the one file, if that is an archive."""

    def fetch(self, store: AssetStore, uri: str, *, progress: bool) -> list[FetchedFile]:
        """Fetch them as extra files of the checkpoint ``uri``. Raises what
        :func:`lading.checkpoints.recording.fetch_extra_files` does.
        """
        return fetch_extra_files(self.source, self.snapshot, self.files, store, uri, progress=progress)


def tokenizer_elsewhere(
    tokenizer: TokenizerRef, *, settings: Settings, revision: str | None = None
) -> RemoteTokenizer | None:
    """Return the files of a tokenizer in its source; ``None`` for one on this machine.

    :param revision: the revision of the source; default: the one that its address names, or the current one.

    Raises what :meth:`lading.sources.source.Source.snapshot` does.
    """
    if uri_path(tokenizer.uri) is not None:
        return None

    source = _open(tokenizer, settings, revision)
    snapshot = source.snapshot()
    files = tokenizer_files(snapshot, source.inner)

    return RemoteTokenizer(
        source=source,
        snapshot=snapshot,
        files=tuple(files),
        member=None if has_folders(tokenizer.uri) else tokenizer.path,
    )


def tokenizer_beside(
    tokenizer: TokenizerRef | None, snapshot: Snapshot, inner: str | None, *, settings: Settings
) -> list[RemoteFile]:
    """Return the files of a tokenizer from the source of the checkpoint.

    :param snapshot: the snapshot of their source.
    :param inner: the checkpoint within it.
    """
    if tokenizer is not None:
        inner = _open(tokenizer, settings, None).inner

    return tokenizer_files(snapshot, inner)


def tokenizer_files(snapshot: Snapshot, inner: str | None) -> list[RemoteFile]:
    """Return the file ``inner``; else those of the usual names in that folder, or beside that checkpoint."""
    named = None if inner is None or is_checkpoint_file(inner) else snapshot.file(inner)

    return [named] if named is not None else in_snapshot(snapshot, inner, TOKENIZER_NAMES)


def _open(tokenizer: TokenizerRef, settings: Settings, revision: str | None) -> Source:
    # Without folders, a path leads to a member of the archive at the address.
    inner = tokenizer.path if has_folders(tokenizer.uri) else None

    return open_source(tokenizer.uri, inner_path=inner, revision=revision, settings=settings)


def _is_hub(uri: str) -> bool:
    return uri.partition("://")[0] in HUB_SCHEMES


def files_beside(path: Path) -> dict[str, Path]:
    """Return the files beside a checkpoint on this machine, by their names.

    :param path: the folder or the file of the checkpoint.
    """
    folder = folder_of(path)

    return {name: file for name in COMPANION_NAMES if (file := folder / name).is_file()}


def companions(checkpoint: Checkpoint, card: AssetCard, store: AssetStore, *, progress: bool) -> Mapping[str, Path]:
    """Return the extra files of a card's checkpoint on this machine, by their plain names, after fetching missing ones.

    If a source cannot be reached, this returns those of an earlier download.
    """
    ref = checkpoint_ref(card)

    def beside(settings: Settings) -> Sequence[FetchedFile]:
        source = source_of(ref, revision=checkpoint.revision, settings=settings)
        if not source.lists:
            return ()
        snapshot = source.snapshot()
        files = in_snapshot(snapshot, source.inner, COMPANION_NAMES)
        return fetch_extra_files(source, snapshot, files, store, checkpoint.uri, progress=progress)

    path = uri_path(ref.uri)
    if path is None:
        found = _or_cached(beside, store.settings, ref.key)
    else:
        found = files_beside(local_checkpoint(path, inner_path=ref.path))

    tokenizer = tokenizer_ref(card, store.retrieve_card)
    if tokenizer is None or (tokenizer.path is None and same_source(tokenizer, ref)):
        return found

    def elsewhere(settings: Settings) -> Sequence[FetchedFile]:
        remote = tokenizer_elsewhere(tokenizer, settings=settings)
        return () if remote is None else remote.fetch(store, checkpoint.uri, progress=progress)

    path = uri_path(tokenizer.uri)
    if path is None:
        own = _or_cached(elsewhere, store.settings, tokenizer.uri)
    else:
        path = path if tokenizer.path is None else path / tokenizer.path
        own = files_beside(path) if path.is_dir() else {path.name: path}

    # Of two tokenizers, the card's wins, without any file of the other.
    found = {name: file for name, file in found.items() if name not in TOKENIZER_NAMES}

    return found | {name: file for name, file in own.items() if name in TOKENIZER_NAMES and file.is_file()}


def _or_cached(fetch: Callable[[Settings], Sequence[FetchedFile]], settings: Settings, where: str) -> dict[str, Path]:
    """Return the fetched files by their plain names; if the source cannot be reached, those of an earlier download."""
    for offline in dict.fromkeys((settings.offline, True)):
        try:
            return {file.name.rpartition("/")[2]: file.path for file in fetch(replace(settings, offline=offline))}
        except FetchError as error:
            if not offline:
                log.warning("the files beside the weights are as they were fetched before: %s", error)
    log.warning("no files beside the weights at %s are on this machine", where)

    return {}


def read_or_fetch_config(
    checkpoint: Checkpoint, store: AssetStore | None, name: str = CONFIG_NAME
) -> Mapping[str, object]:
    """Return the ``config.json`` beside a checkpoint, fetched if it is missing here; empty if it does not exist.

    :param name: another name of it.

    :raises FetchError: it cannot be fetched.
    :raises CorruptModelCheckpointError: it is not a JSON object.
    """
    if checkpoint.hf_config is not None and name == CONFIG_NAME:
        return checkpoint.hf_config
    ref = checkpoint.ref
    if ref is None:
        return read_hf_config(Path(checkpoint.where), name)
    if store is None:
        raise InternalError(f"the checkpoint {ref.shown} is elsewhere, but was found without a catalog")

    source, snapshot = _config_of(checkpoint, ref, store.settings, name)
    try:
        (fetched,) = fetch_extra_files(source, snapshot, snapshot.files, store, checkpoint.uri, progress=False)
    except CheckpointNotFoundError:
        return {}

    return read_config_json(fetched.path) or {}  # in lading's cache it has another name


def config_here(checkpoint: Checkpoint, store: AssetStore) -> Mapping[str, object] | None:
    """Return the ``config.json`` beside a checkpoint like :func:`read_or_fetch_config`, but ``None`` if that would have
    to be fetched.
    """
    if checkpoint.hf_config is not None or checkpoint.ref is None:
        return read_or_fetch_config(checkpoint, store)
    source, snapshot = _config_of(checkpoint, checkpoint.ref, replace(store.settings, offline=True))
    (path,) = source.local(snapshot, snapshot.files)

    return None if path is None else read_config_json(path)


def _config_of(
    checkpoint: Checkpoint, ref: CheckpointRef, settings: Settings, name: str = CONFIG_NAME
) -> tuple[Source, Snapshot]:
    """Return the source of a checkpoint, and a snapshot of the file ``name`` beside the checkpoint there."""
    source = source_of(ref, revision=checkpoint.revision, settings=settings)
    shards = [shard.name for shard in checkpoint.manifest.shards]
    file = RemoteFile(name=name_in_source(source.inner, name, shards=shards), size=None)

    return source, Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=(file,))
