"""The block digests that a card publishes, in a document beside it or at a source."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lading.cards.card import AssetCard, digests_uri
from lading.catalog.checkpoints.record import record_digests
from lading.catalog.records import DigestDocument
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.published import PublishedFiles
from lading.checkpoints.recording import BestEffort
from lading.errors import (
    AddressError,
    AssetCardError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    DigestMismatchError,
)
from lading.formats.digest_document import most_bytes, parse_digests
from lading.formats.digests import Digests, differences
from lading.formats.files import refuse_lfs_pointer
from lading.formats.manifest import Manifest
from lading.sources.open import check_address, open_source, require_readable
from lading.system.filesystem import UnfitFileError, read_regular
from lading.system.settings import Settings
from lading.system.uris import shown_uri, uri_path

log = logging.getLogger("lading")


def with_digests(checkpoint: Checkpoint, card: AssetCard, store: AssetStore, *, accept: bool = False) -> Checkpoint:
    """Return the checkpoint with the digests that its card publishes as the expected ones, and record them.

    It is trusted only if its files were compared with these. A document at a source is read once; one on this machine
    whenever it has changed.

    :param accept: take the document even if the catalog has other digests.

    :raises AssetCardError: the field ``digests`` is neither a path nor the address of a file.
    :raises CheckpointNotFoundError: nothing is there.
    :raises CorruptModelCheckpointError: it is not a document of digests, or that of another checkpoint.
    :raises DigestMismatchError: the catalog has other digests.
    :raises FetchError: the source cannot be reached.
    """
    uri = digests_uri(card)
    if uri is None:
        return checkpoint
    try:
        check_address(uri)
    except AddressError as error:
        raise AssetCardError(
            card.name, f"The field 'digests' of the card {card.name!r} is not a valid address. {error}"
        ) from None

    where, known = shown_uri(uri), checkpoint.published
    path = uri_path(uri)
    is_known = known is not None and known.uri == where
    if is_known and path is None:
        return checkpoint
    try:
        data = _read(card, path or uri, checkpoint.manifest, store.settings)
    except (CheckpointNotFoundError, OSError) as error:
        if not is_known:
            raise
        log.info("the digests of %s are as they were read before: %s", checkpoint.name, error)
        return checkpoint
    document = DigestDocument(uri=where, sha256=hashlib.sha256(data).hexdigest())
    if known == document:
        return checkpoint

    digests = parse_digests(data, checkpoint.manifest, label=document.shown)
    if not accept:
        _require_same(checkpoint, card, document, digests, store)
    with BestEffort("the digests of %s are not in the catalog", checkpoint.name):
        record_digests(
            store.database, uri=checkpoint.uri, manifest=checkpoint.manifest, digests=digests, document=document
        )

    return replace(checkpoint, trusted=False, published=document, digests=digests)


def _read(card: AssetCard, place: Path | str, manifest: Manifest, settings: Settings) -> bytes:
    """Return the bytes of the document at a path or a URI."""
    most = most_bytes(manifest)
    if isinstance(place, Path):
        label = str(place)
        try:
            data = read_regular(place, at_most=most)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFoundError(place, _nothing(card, label)) from None
        except UnfitFileError as error:
            raise CorruptModelCheckpointError(
                place, f"{label}: {error.strerror}. The field 'digests' of the card {card.name!r} names it."
            ) from None
    else:
        label = shown_uri(place)
        data = _read_remote(card, place, most, settings)
    refuse_lfs_pointer(data, label)

    return data


def _read_remote(card: AssetCard, uri: str, most: int, settings: Settings) -> bytes:
    label = shown_uri(uri)
    require_readable(uri)
    source = open_source(uri, inner_path=None, revision=None, settings=settings)
    if source.inner is None:
        raise AssetCardError(
            card.name,
            f"The field 'digests' of the card {card.name!r}: expected the address of a file, found {label}. Add its "
            "path: `hg://org/name/digests.json`.",
        )
    snapshot = source.snapshot()
    files = PublishedFiles(source, snapshot)
    if source.inner not in files.names():
        raise CheckpointNotFoundError(label, _nothing(card, label))
    size = files.size(source.inner)
    if size > most:
        raise CorruptModelCheckpointError(
            label,
            f"{label}: expected a document of at most {most:,} bytes, found {size:,}. The field 'digests' of the card "
            f"{card.name!r} names it.",
        )

    return files.read(source.inner, 0, size)


def _nothing(card: AssetCard, label: str) -> str:
    return (
        f"{label}: expected the document of digests that the card {card.name!r} names, found nothing there. `lading "
        "digests NAME --write FILE` writes it where the checkpoint is."
    )


def _require_same(
    checkpoint: Checkpoint, card: AssetCard, document: DigestDocument, digests: Digests, store: AssetStore
) -> None:
    """Require that the catalog has no other digests, unless they are of an earlier state of the document.

    :raises DigestMismatchError: it has.
    """
    with BestEffort("the digests of %s cannot be read from the catalog", checkpoint.name):
        known = store.digests(checkpoint.uri, checkpoint.manifest)
        stored = None if known is None else store.checkpoint(checkpoint.uri)
        if known is None or stored is None or known == digests:
            return
        origin = stored.published
        if origin is not None and origin.uri == document.uri:
            return
        theirs = "those of bytes that were read here" if origin is None else f"those that {origin.shown} publishes"
        which, manifest = "along other dims", checkpoint.manifest
        with suppress(ValueError):
            which = f"for {manifest.names[differences(known, digests)[0][0]]!r}"
        raise DigestMismatchError(
            checkpoint.where,
            f"{document.shown}, which the card {card.name!r} names, has other digests of {checkpoint.where} than "
            f"the catalog, {which}: the catalog has {theirs}. If the document is right, run `lading index "
            f"{card.title}` to take its digests.",
            expected=f"those that {document.shown} publishes",
            found=theirs,
        )
