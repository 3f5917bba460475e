"""The block digests of a checkpoint: those that are known, or taken now, and the document that publishes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lading import formats
from lading.cards.card import AssetCard
from lading.catalog.checkpoints.record import record_digests
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.locate import card_checkpoint
from lading.checkpoints.names import find_card
from lading.checkpoints.recording import BestEffort
from lading.checkpoints.verification import known_digests, shard_digest
from lading.errors import DigestMismatchError
from lading.formats.digest_document import dump_digests
from lading.formats.digests import Digests
from lading.operations.verify import dims_of, verify_model
from lading.system.display import counted, representation
from lading.system.filesystem import expand_home, write_text
from lading.transfer.hashing import hash_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class DigestReport:
    """The digests of a checkpoint."""

    name: str
    uri: str
    tensors: Mapping[str, str]
    """The digest of each tensor, in hexadecimal, by its name."""
    files: Mapping[str, str]
    """One digest for all tensors of each file, in hexadecimal, by the file's name, as ``lading verify`` shows it."""
    published: str = ""
    """The document from which the digests were taken; empty for those of bytes that were read here."""

    def __repr__(self) -> str:
        return representation(
            self,
            self.name,
            counted(len(self.files), "file"),
            counted(len(self.tensors), "tensor"),
            f"published by {self.published}" if self.published else "",
        )


def read_digests(
    name: AssetCard | str | Path,
    *,
    revision: str | None = None,
    progress: bool = True,
    store: CardStore | None = None,
) -> DigestReport:
    """Return the digests of a model's checkpoint: those that its card publishes or that were recorded.

    If there are none, or if files have changed since, this verifies the files, and takes and records their digests.

    :param name: as ``load_model`` takes it; likewise ``revision``.
    :param progress: show a bar on stderr.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises CheckpointNotFoundError: no digests are known, and the checkpoint is not on this machine.
    :raises DigestMismatchError: the files are not those that were published or recorded.
    :raises CorruptModelCheckpointError: a file breaks the rules of its format.
    """
    store = open_store(store)
    target = find_card(name, store, revision=revision, ask=False)

    return _report(*_known_or_taken(target, store, progress=progress))


def write_digests(
    name: AssetCard | str | Path,
    path: Path | str,
    *,
    revision: str | None = None,
    progress: bool = True,
    store: CardStore | None = None,
) -> DigestReport:
    """Write the document that publishes the digests of a model's checkpoint, and return what :func:`read_digests` does.

    The field ``digests`` of a card names such a document. Equal digests make equal documents.

    :param path: the file to replace, as a whole or not at all.

    :raises OSError: it cannot be written.
    """
    store = open_store(store)
    target = find_card(name, store, revision=revision, ask=False)
    checkpoint, digests = _known_or_taken(target, store, progress=progress)
    # The files that lading makes of others have names and sizes of their own.
    stored = store.checkpoint(checkpoint.uri)
    paths = [copy.path for copy in (() if stored is None else stored.copies)]
    rewritten = any(formats.is_rewritten(each, store.settings.cache_dir) for each in paths)
    write_text(expand_home(path), dump_digests(checkpoint.manifest, digests, shards=not rewritten))

    return _report(checkpoint, digests)


def _known_or_taken(of: AssetCard | Path, store: AssetStore, *, progress: bool) -> tuple[Checkpoint, Digests]:
    checkpoint = card_checkpoint(of, store, progress=progress)
    digests = known_digests(checkpoint, store)
    if digests is not None and digests.complete and (checkpoint.files is None or checkpoint.trusted):
        return checkpoint, digests

    report = verify_model(of, progress=progress, store=store)
    if not report.good:
        bad = next(check for check in report.checks if check.result == "mismatch")
        raise DigestMismatchError(
            bad.path,
            f"{bad.path} does not match its digests, so those of {checkpoint.name} are not given. {report.hint}",
            expected=str(bad.expected),
            found=str(bad.found),
        )
    checkpoint = card_checkpoint(of, store, progress=progress)
    digests = known_digests(checkpoint, store)
    if digests is None or not digests.complete:
        digests = hash_checkpoint(
            checkpoint.manifest, checkpoint.here(), dims_of(checkpoint, of, store), progress=progress
        )
        with BestEffort("the digests of %s are not in the catalog", checkpoint.name):
            record_digests(store.database, uri=checkpoint.uri, manifest=checkpoint.manifest, digests=digests)

    return checkpoint, digests


def _report(checkpoint: Checkpoint, digests: Digests) -> DigestReport:
    manifest = checkpoint.manifest
    roots = ("" if digest is None else digest.root for digest in digests.iter(manifest))

    return DigestReport(
        name=checkpoint.name,
        uri=checkpoint.uri,
        tensors=dict(zip(manifest.names, roots, strict=True)),
        files={shard.name: shard_digest(manifest, digests, i) for i, shard in enumerate(manifest.shards)},
        published="" if checkpoint.published is None else checkpoint.published.shown,
    )
