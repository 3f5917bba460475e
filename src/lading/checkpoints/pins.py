"""The files of a checkpoint that its card pins by their SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lading import formats
from lading.cards.card import AssetCard, pinned_digests
from lading.catalog.checkpoints.record import last_digests
from lading.catalog.records import ORIGINAL, Check
from lading.catalog.store import AssetStore
from lading.checkpoints.address import address_of, file_in, split_inside
from lading.checkpoints.checkpoint import Checkpoint, local_checkpoint
from lading.checkpoints.recording import BestEffort, record_checks
from lading.errors import AssetCardError, DigestMismatchError
from lading.sources.open import open_source
from lading.sources.sha256 import sha256_file
from lading.system.uris import uri_path


def with_pins(checkpoint: Checkpoint, card: AssetCard, store: AssetStore) -> Checkpoint:
    """Return the checkpoint with the digests of its card as the expected ones.

    It is trusted only if its files were verified against these. For a rewritten file, the digest is that of the
    original, which this hashes once.

    :raises AssetCardError: the card pins a file without any of the tensors.
    :raises DigestMismatchError: another digest is published or recorded, or the original has another.
    """
    pins = pinned_digests(card)
    if not pins:
        return checkpoint
    cache = store.settings.cache_dir
    if checkpoint.files is not None and any(formats.is_rewritten(file.path, cache) for file in checkpoint.files):
        _require_originals(checkpoint, pins, card, store)
        return checkpoint

    shards = list(checkpoint.manifest.shards)
    numbers = {shard.name: i for i, shard in enumerate(shards)}
    if len(shards) == 1:
        numbers[""] = 0
    found = {numbers[name]: (name, digest) for name, digest in pins.items() if name in numbers}
    if len(found) < len(pins):
        raise _no_such_file(checkpoint, pins.keys() - numbers.keys(), card, [s.name for s in shards])

    trusted = checkpoint.trusted
    for i, (_, digest) in found.items():
        known = shards[i].sha256
        if known not in (None, digest):
            raise _mismatch(checkpoint, shards[i].name, digest, str(known), card)
        trusted = trusted and known is not None
        shards[i] = replace(shards[i], sha256=digest)

    return replace(
        checkpoint,
        manifest=replace(checkpoint.manifest, shards=tuple(shards)),
        trusted=trusted,
        pinned=tuple(sorted(found)),
    )


def _require_originals(checkpoint: Checkpoint, pins: Mapping[str, str], card: AssetCard, store: AssetStore) -> None:
    """Compare the digests of the files that a rewritten checkpoint was made of with the pins.

    The catalog has those of fetched files, and of others once they were hashed: another state of a file has another
    rewrite.

    :raises AssetCardError: the card pins another file.
    :raises DigestMismatchError: a file has another digest.
    """
    originals = _originals(checkpoint, card, store)
    names = list(originals)
    if len(names) == 1:
        pins = {name or names[0]: digest for name, digest in pins.items()}
    if unknown := pins.keys() - originals.keys():
        raise _no_such_file(checkpoint, unknown, card, names)

    known: Mapping[str, str] = {}
    with BestEffort("the catalog cannot say what %s was made of", checkpoint.name):
        known = last_digests(store.database, checkpoint.uri, ORIGINAL)
    checks = []
    for name in pins.keys() - known.keys():
        path = originals[name]
        found, stat = sha256_file(path)
        checks.append(Check(file=name, path=path, stat=stat, method=ORIGINAL, expected=pins[name], found=found))
    record_checks(checkpoint, checks, store)

    digests = {**known, **{check.file: str(check.found) for check in checks}}
    for name, digest in pins.items():
        if digests[name] != digest:
            raise _mismatch(checkpoint, name, digest, digests[name], card)


def _originals(checkpoint: Checkpoint, card: AssetCard, store: AssetStore) -> dict[str, Path]:
    """Return the files that a rewritten checkpoint was made of, by their names in the checkpoint."""
    ref = address_of(card)
    path = uri_path(ref.uri)
    if path is not None:
        return {each.name: each for each in formats.originals(local_checkpoint(path, inner_path=ref.path))}

    inner, member = split_inside(ref)
    source = open_source(ref.uri, inner_path=inner, revision=None, settings=store.settings)
    _, member = file_in(source.inner, member)
    stored = store.checkpoint(checkpoint.uri)
    extra = [copy.path for copy in (() if stored is None else stored.copies) if copy.file == str(copy.path)]
    made = {formats.rewritten(each, member=member, cache=store.settings.cache_dir): each for each in extra}
    shards = checkpoint.manifest.shards

    return {s.name: made.get(file.path, file.path) for s, file in zip(shards, checkpoint.here(), strict=True)}


def _no_such_file(checkpoint: Checkpoint, names: set[str], card: AssetCard, known: list[str]) -> AssetCardError:
    if names == {""}:
        what = (
            f"expected a mapping of file names to digests, as the checkpoint has {len(known)} files, found one digest"
        )
    else:
        what = f"expected names of files that hold tensors ({formats.folder.some_names(known)}), found {min(names)!r}"

    return AssetCardError(card.name, f"The field 'sha256' of the card {card.name!r}: {what}.")


def _mismatch(checkpoint: Checkpoint, name: str, expected: str, found: str, card: AssetCard) -> DigestMismatchError:
    return DigestMismatchError(
        checkpoint.where,
        f"{name} of {checkpoint.where} is not the file that the card {card.name!r} pins: expected the SHA-256 "
        f"{expected}, found {found}. If the card is right, put that file there and run `lading index {card.title}`.",
        expected=expected,
        found=found,
    )
