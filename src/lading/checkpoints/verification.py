"""The verification of loaded bytes against published or recorded digests, prepared before the reads.

A checkpoint has two kinds of digests. Sources publish the SHA-256 of a whole file, which takes a pass over the file.
lading records the digests of blocks of tensors (:mod:`lading.formats.digests`) the first time that a load reads all
bytes, unless a card publishes them; the threads of the load take them. lading trusts a file that had the right digest
as long as its state (size, times, inode) is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal

from blake3 import blake3

from lading.catalog.checkpoints.record import record_digests, record_files
from lading.catalog.records import Check, SourceCheck
from lading.catalog.store import AssetStore
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.recording import BestEffort, record_checks
from lading.errors import DigestMismatchError, NotSupportedError
from lading.formats.digests import Digests, default_dims, differences, recorded
from lading.formats.manifest import Manifest
from lading.sources.sha256 import sha256_file
from lading.system.filesystem import FileStat
from lading.system.progress import byte_bar
from lading.transfer.files import ShardFile

if TYPE_CHECKING:
    from lading.gangs import Gang

Verify = Literal["auto", "always", "never"]
"""``auto`` checks the files that were not verified in the state that they are in, ``always`` checks all."""

VERIFY = ("auto", "always", "never")

Different = Sequence[tuple[int, tuple[int, ...]]]
"""The tensors that differ from the expected ones, by their positions in the manifest, and their differing blocks."""

_THREADS = 4
"""The number of files to hash at once."""


def require_mode(verify: str) -> None:
    """Check a mode of verification.

    :raises ValueError: it is not one of :data:`VERIFY`.
    """
    if verify not in VERIFY:
        raise ValueError(f"`verify` must be one of {', '.join(map(repr, VERIFY))}, but is {verify!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The expected digests of a load."""

    digests: Digests | None
    """The published or recorded digests; ``None`` if this load records them."""
    dims: array[int]
    """The dim along which to cut each tensor into blocks, type code ``b``; empty if only files are hashed."""
    whole: tuple[int, ...] = ()
    """The files, by their positions in the manifest, whose SHA-256 a stream takes."""


def prepare_verification(
    checkpoint: Checkpoint,
    store: AssetStore | None,
    mode: Verify,
    dims: Callable[[], array[int]],
    *,
    ranks: int = 1,
    progress: bool = False,
) -> Expected | None:
    """Return the expected digests of a load; ``None`` if nothing needs a check.

    This checks files with nothing but a SHA-256 at once.

    :param store: ``None`` for a checkpoint outside of the catalog.
    :param dims: returns for each tensor the dim along which to cut it, if it has no recorded digests.
    :param ranks: the number of ranks that load it. Several ranks do not record digests, as each sees only a part.

    :raises DigestMismatchError: a file is not the one that was published.
    :raises NotSupportedError: ``always`` without a catalog.
    """
    if mode == "never" or (mode == "auto" and (checkpoint.trusted or store is None)):
        return None
    if store is None:
        raise NotSupportedError(
            f"Nothing is known that {checkpoint.where} could be verified against. Name it in a card and load it by its "
            "name, or load it with `verify='auto'`."
        )

    digests = known_digests(checkpoint, store)
    # The recorded digests may be those of other bytes than the card pins.
    chosen = None if digests is None else checkpoint.pinned
    checks = check_files(checkpoint, chosen, progress=progress)
    if checks:
        record_checks(checkpoint, checks, store)
        require_match(checks)

    if digests is None and ranks > 1:
        return None

    return Expected(digests=digests, dims=dims() if digests is None else digests.dims)


def finish_verification(
    checkpoint: Checkpoint,
    expected: Expected,
    found: Digests,
    store: AssetStore | None,
    root: Gang,
    *,
    progress: bool = False,
) -> None:
    """Compare the bytes read with the expected digests, and record the result.

    Rank 0 reads the tensors that no rank has read completely, so that the result covers the whole checkpoint.

    :param found: the digests of this rank.
    :param store: the store that records it; only rank 0 has one.

    :raises DigestMismatchError: a tensor is not the one that was published or recorded.
    """
    manifest, files = checkpoint.manifest, checkpoint.here()
    different = [] if expected.digests is None else differences(expected.digests, found)
    answers = root.gather_objects((found.known, shards_of(manifest, different), files))
    # Each host may have its own disk at the same path: a check on one does not hold for another.
    mine = [(known, shards) for known, shards, theirs in answers if theirs == files]
    if any(shards for _, shards, _ in answers):
        bad = sorted(set().union(*(shards for _, shards in mine)))
        record_bad(checkpoint, expected.digests, bad, store)
        refuse_different(checkpoint, different)
        return  # another rank raises, and then all do

    if store is None:
        return
    if expected.digests is not None and root.size > 1:
        found = seen_by_all(expected.digests, [known for known, _ in mine])
    _conclude(checkpoint, expected, _completed(manifest, files, found, progress=progress), store)


def _conclude(checkpoint: Checkpoint, expected: Expected, found: Digests, store: AssetStore) -> None:
    """Compare the digests of all tensors with the expected ones, and record the result."""
    manifest = checkpoint.manifest
    if expected.digests is not None:
        different = differences(expected.digests, found)
        record_bad(checkpoint, expected.digests, shards_of(manifest, different), store)
        refuse_different(checkpoint, different)

    checks = list(tensor_checks(checkpoint, expected.digests, found))
    with BestEffort("the checks of %s are not in the catalog", checkpoint.name):
        if expected.digests is None:
            record_digests(store.database, uri=checkpoint.uri, manifest=manifest, digests=found)
        record_files(store.database, uri=checkpoint.uri, checks=checks)


def verify_whole(
    checkpoint: Checkpoint, store: AssetStore | None, mode: Verify, root: Gang, *, progress: bool = False
) -> None:
    """Verify a small checkpoint that every rank reads whole, before it is used. All ranks must call it.

    :param store: the store; only rank 0 has one.

    :raises DigestMismatchError: a file or a tensor is not the one that was published or recorded.
    """
    manifest = checkpoint.manifest
    expected = root.first(
        lambda: prepare_verification(checkpoint, store, mode, lambda: default_dims(manifest), progress=progress)
    )
    if expected is not None:
        from lading.transfer.hashing import hash_checkpoint  # imports numpy

        found = hash_checkpoint(manifest, checkpoint.here(), expected.dims)
        finish_verification(checkpoint, expected, found, store, root, progress=progress)


def shards_of(manifest: Manifest, different: Different) -> list[int]:
    """Return the positions of the files that hold different tensors."""
    several = (piece.shard for i, _ in different for piece in manifest.pieces.get(i, ()))

    return sorted({*(manifest.shard_ids[i] for i, _ in different), *several})


def record_bad(
    checkpoint: Checkpoint, expected: Digests | None, shards: Sequence[int], store: AssetStore | None
) -> None:
    """Record the wrong files in the catalog."""
    if store is None or expected is None or not shards:
        return

    manifest = checkpoint.manifest
    checks = [
        checkpoint.outcome(shard, "blake3", expected=shard_digest(manifest, expected, shard), found=None)
        for shard in shards
    ]
    record_checks(checkpoint, checks, store)


def refuse_different(checkpoint: Checkpoint, different: Different) -> None:
    """Refuse tensors that differ from the recorded ones.

    :raises DigestMismatchError: there is such a tensor.
    """
    if not different:
        return

    manifest = checkpoint.manifest
    shown = ", ".join(manifest.names[i] for i, _ in different[:5])
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    path = checkpoint.place(shards_of(manifest, different)[0])
    first, blocks = different[0]
    published = checkpoint.published
    origin = "were verified before" if published is None else f"{published.shown} publishes"
    raise DigestMismatchError(
        path,
        f"{path}: {len(different)} of {len(manifest)} tensors are not those that {origin}: {shown}{more}. "
        f"{remedy(checkpoint, files=len(shards_of(manifest, different)))}",
        expected=f"the {'recorded' if published is None else 'published'} digests of {manifest.names[first]}",
        found=f"others in blocks {', '.join(map(str, blocks))}",
    )


def remedy(checkpoint: Checkpoint, *, files: int = 1) -> str:
    """Return advice about ``files`` wrong files."""
    them = "it" if files == 1 else "them"
    if checkpoint.ref is not None and checkpoint.streamed is None:
        return f"`lading verify {checkpoint.name} --repair` fetches {them} again."

    if checkpoint.published is not None:
        return (
            f"Put what was published there. To publish what is there, remove the field `digests` from the card, run "
            f"`lading index {checkpoint.name}`, and write the digests again."
        )

    they = "it was" if files == 1 else "they were"

    return f"If {they} changed on purpose, run `lading index {checkpoint.name}` to accept {them}."


def record_rewritten(checkpoint: Checkpoint, store: AssetStore) -> None:
    """Record the digests of files that were just rewritten, as no source publishes any for them."""
    from lading.transfer.hashing import hash_checkpoint  # imports numpy

    with BestEffort("the digests of %s are not in the catalog", checkpoint.name):
        if not store.tensor_digests(checkpoint.uri):
            digests = hash_checkpoint(checkpoint.manifest, checkpoint.here())
            record_digests(store.database, uri=checkpoint.uri, manifest=checkpoint.manifest, digests=digests)


def require_stated(checkpoint: Checkpoint, store: AssetStore, *, progress: bool = False) -> None:
    """Compare the files with the digests that the card pins or publishes, unless they were verified as they are.

    :raises DigestMismatchError: a file or a tensor has another digest.
    """
    if checkpoint.trusted:
        return
    if checkpoint.pinned:
        checks = check_files(checkpoint, checkpoint.pinned, progress=progress)
        record_checks(checkpoint, checks, store)
        require_match(checks)
    digests = None if checkpoint.published is None else known_digests(checkpoint, store)
    if digests is not None:
        from lading.transfer.hashing import hash_checkpoint  # imports numpy

        found = hash_checkpoint(checkpoint.manifest, checkpoint.here(), digests.dims, progress=progress)
        _conclude(checkpoint, Expected(digests=digests, dims=digests.dims), found, store)


def check_files(checkpoint: Checkpoint, chosen: Sequence[int] | None = None, *, progress: bool = False) -> list[Check]:
    """Hash the files whose SHA-256 is known.

    :param chosen: the positions of the files; default: all.
    """
    shards = checkpoint.manifest.shards
    known = [i for i, shard in enumerate(shards) if shard.sha256 is not None and (chosen is None or i in chosen)]
    total = sum(shards[i].size for i in known)
    hashed = hash_files([checkpoint.here()[i].path for i in known], total, "verify", progress=progress)

    return [
        replace(checkpoint.check(i, "sha256", expected=shards[i].sha256, found=found), stat=stat)
        for i, (found, stat) in zip(known, hashed, strict=True)
    ]


def hash_files(paths: Sequence[Path], total: int, title: str, *, progress: bool) -> list[tuple[str, FileStat]]:
    """Return the SHA-256 of each file and the state that has it, as :func:`lading.sources.sha256.sha256_file`.

    :param total: the size of all files in bytes, for the progress bar.
    """
    lock = Lock()

    def count(size: int) -> None:
        with lock:
            bar.update(size)

    with (
        byte_bar(total, title, shown=progress) as bar,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="lading-verify") as pool,
    ):
        return list(pool.map(lambda path: sha256_file(path, progress=count), paths))


def require_match(checks: Sequence[SourceCheck]) -> None:
    """Check the results of file checks.

    :raises DigestMismatchError: a file is not the one that was published or recorded.
    """
    for check in checks:
        if check.result == "mismatch":
            place = check.place or check.file
            raise DigestMismatchError(
                place,
                f"{place} is not the file that was published: expected the SHA-256 {check.expected}, found "
                f"{check.found}. It was not used.",
                expected=check.expected or "",
                found=check.found or "",
            )


def known_digests(checkpoint: Checkpoint, store: AssetStore) -> Digests | None:
    """Return the published or recorded digests of a checkpoint's tensors; ``None`` if there are none."""
    if checkpoint.digests is not None:
        return checkpoint.digests
    with BestEffort("the digests of %s cannot be read from the catalog", checkpoint.name):
        return store.digests(checkpoint.uri, checkpoint.manifest)
    return None


def seen_by_all(expected: Digests, seen: Sequence[bytes]) -> Digests:
    """Return the expected digests of the blocks that any rank has seen, by their masks."""
    known = bytes(reduce(or_, masks) for masks in zip(*seen, strict=True))

    return replace(expected, known=known)


def _completed(manifest: Manifest, files: Sequence[ShardFile], found: Digests, *, progress: bool) -> Digests:
    """Return ``found`` with the digests of missing tensors, after reading their bytes."""
    missing = [i for i in range(len(manifest)) if not found.is_complete(i)]
    if not missing:
        return found

    from lading.transfer.hashing import hash_checkpoint  # imports numpy

    rest = manifest.take(missing)
    more = hash_checkpoint(rest, files, [found.dims[i] for i in missing], progress=progress)
    rows: list[tuple[int, bytes] | None] = [
        None if digest is None else (digest.dim, digest.blocks) for digest in found.iter(manifest)
    ]
    for i, digest in zip(missing, more.iter(rest), strict=True):
        rows[i] = None if digest is None else (digest.dim, digest.blocks)

    return recorded(manifest, rows)


def tensor_checks(checkpoint: Checkpoint, expected: Digests | None, found: Digests) -> Iterator[SourceCheck]:
    """Yield the check of each file whose tensors were all read, by their digests.

    :param expected: the recorded digests; ``None`` if these are the first.
    """
    manifest = checkpoint.manifest
    for shard in range(len(manifest.shards)):
        if not all(map(found.is_complete, manifest.tensors_in(shard))):
            continue  # no rank has read all of it
        yield checkpoint.outcome(
            shard,
            "blake3",
            expected=None if expected is None else shard_digest(manifest, expected, shard),
            found=shard_digest(manifest, found, shard),
        )


def shard_digest(manifest: Manifest, digests: Digests, shard: int) -> str:
    """Return one digest for all tensors with bytes in a file, those included that continue in other files."""
    roots = (digests.of(manifest, i) for i in manifest.tensors_in(shard))

    return blake3("".join("-" if digest is None else digest.root for digest in roots).encode("ascii")).hexdigest()
