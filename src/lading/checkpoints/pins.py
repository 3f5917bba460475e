"""The files of a checkpoint that its card pins by their SHA-256."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lading import formats
from lading.cards.card import AssetCard, pinned_digests
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.errors import AssetCardError, DigestMismatchError
from lading.sources.sha256 import sha256_file


def with_pins(checkpoint: Checkpoint, card: AssetCard, store: AssetStore) -> Checkpoint:
    """Return the checkpoint with the digests of its card as the expected ones.

    It is trusted only if its files were verified against these. For a rewritten file, the digest is that of the
    original, which this hashes.

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
    paths = _originals(checkpoint, pins, store)
    digests = {path: sha256_file(path)[0] for path in paths}
    for name, digest in pins.items():
        if digest not in digests.values():
            found = next(iter(digests.values()), "none")
            raise _mismatch(checkpoint, name or next((path.name for path in paths), "file"), digest, found, card)


def _originals(checkpoint: Checkpoint, pins: Mapping[str, str], store: AssetStore) -> list[Path]:
    """Return the originals of a rewritten checkpoint."""
    if checkpoint.ref is None:
        where = Path(checkpoint.where)
        container = formats.container_of(where)
        if container is not None or not where.is_dir():
            return [container or where]
        return [file for file in sorted(where.iterdir()) if file.is_file() and (file.name in pins or "" in pins)]

    stored = store.checkpoint(checkpoint.uri)

    return [] if stored is None else [copy.path for copy in stored.copies if copy.file == str(copy.path)]


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
