"""Checkpoints that a load reads straight from their source, without files on this machine."""

from __future__ import annotations

import logging
import shutil
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from lading.cards.card import CheckpointRef, StreamMode
from lading.catalog.checkpoints.record import record_digests, record_files
from lading.catalog.records import UNVERIFIED, SourceCheck
from lading.catalog.store import AssetStore
from lading.checkpoints.address import source_of
from lading.checkpoints.checkpoint import Checkpoint
from lading.checkpoints.fetch import replaced_error
from lading.checkpoints.fetch_to_index import not_streamed_error, was_fetched_to_index
from lading.checkpoints.published import index_source, recorded_files
from lading.checkpoints.recording import BestEffort
from lading.checkpoints.verification import (
    Expected,
    Verify,
    known_digests,
    record_bad,
    refuse_different,
    require_match,
    seen_by_all,
    shards_of,
    tensor_checks,
)
from lading.errors import FetchError, InternalError, LadingError, NotSupportedError
from lading.formats.digests import Digests, differences
from lading.formats.manifest import Manifest
from lading.sources.hub.cache import hub_cache
from lading.sources.source import RemoteFile, Snapshot, Source
from lading.system.display import human_bytes, some
from lading.system.settings import Settings
from lading.transfer.stream import FileDigest, Stream, StreamedFile

if TYPE_CHECKING:
    from lading.gangs import Gang
    from lading.planning.plan import Plan
    from lading.transfer.move import LoadedTensors

log = logging.getLogger("lading")

_FEW = 16
"""The denominator of the part of a file that a load may leave out, and yet reads for the SHA-256 of the file."""


def files_to_stream(
    checkpoint: Checkpoint, mode: StreamMode, *, preferred: bool, settings: Settings, hosts: int
) -> Snapshot | None:
    """Return the files of a checkpoint at its source, one for each shard, if a load streams them.

    :param mode: ``True`` to stream; ``"auto"`` to stream if that is possible and the cache has no room for the files.
    :param preferred: with ``"auto"``, stream even if there is room.
    :param hosts: the number of hosts that load it. Files on the first are not on the others.

    :returns: ``None`` if the files are on this machine, or are to be fetched.

    :raises NotSupportedError: the checkpoint cannot be streamed; or its files have changed since it was indexed.
    :raises FetchError: the source cannot be reached, or offline, the files are not on this machine.
    """
    ref = checkpoint.ref
    if mode is False or ref is None or (checkpoint.files is not None and hosts == 1):
        return None
    if mode == "auto" and not preferred and (checkpoint.files is not None or _has_room(checkpoint, ref, settings)):
        return None
    try:
        _require_streamable(checkpoint, settings)
    except LadingError as error:
        if mode is True:
            raise
        log.info("%s is fetched: %s", checkpoint.name, error)
        return None

    return _published_files(checkpoint, ref, settings)


def _has_room(checkpoint: Checkpoint, ref: CheckpointRef, settings: Settings) -> bool:
    """Return whether the cache has room for the files."""
    source = source_of(ref, revision=checkpoint.revision, settings=settings)
    folder = hub_cache() if source.kind == "hub" else settings.cache_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    needed, free = sum(shard.size for shard in checkpoint.manifest.shards), shutil.disk_usage(folder).free
    if needed > free:
        log.info("%s has %s, and %s of %s are left", checkpoint.name, human_bytes(needed), human_bytes(free), folder)

    return needed <= free


def _require_streamable(checkpoint: Checkpoint, settings: Settings) -> None:
    if was_fetched_to_index(checkpoint.manifest):
        raise not_streamed_error(checkpoint.name, checkpoint.where)
    if settings.offline:
        raise FetchError(
            f"{checkpoint.where} is not on this machine, and LADING_OFFLINE or HF_HUB_OFFLINE is set, so it is not "
            f"streamed. Unset it, or run `lading pull {checkpoint.name}` where there is a network."
        )


def _published_files(checkpoint: Checkpoint, ref: CheckpointRef, settings: Settings) -> Snapshot:
    """Return the files as the source publishes them now, with the validators by which all ranges are of one content."""
    source = source_of(ref, revision=checkpoint.revision, settings=settings)
    files = recorded_files(checkpoint.manifest.shards, inner=source.inner)
    if not checkpoint.revision:  # nothing else pins the content
        now = _files_now(source, [file.name for file in files])
        if not all(_shown_same(file, now.get(file.name)) for file in files):
            # Only the headers can say it.
            published = index_source(ref, settings=settings, name=checkpoint.name)
            now = {file.name: file for file in published.snapshot.files}
            if not published.manifest.tensors_equal(checkpoint.manifest) or any(
                _shown_different(file, now.get(file.name)) for file in files
            ):
                raise replaced_error(checkpoint.where)
        files = tuple(replace(now[file.name], sha256=file.sha256 or now[file.name].sha256) for file in files)

    return Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=files)


def _files_now(source: Source, names: Sequence[str]) -> Mapping[str, RemoteFile]:
    """Return those of the files that the source has now, by name."""
    listed = source.snapshot() if source.lists else Snapshot(uri=source.uri, revision="", files=())

    return {file.name: file for file in source.with_siblings(listed, names).files}


def _shown_same(recorded: RemoteFile, now: RemoteFile | None) -> bool:
    """Return whether digest or validator show that the content is the recorded one."""
    if now is None or _shown_different(recorded, now):
        return False

    return now.sha256 == recorded.sha256 is not None or now.etag == recorded.etag is not None


def _shown_different(recorded: RemoteFile, now: RemoteFile | None) -> bool:
    """Return whether size, digest or validator show that the content is not the recorded one."""
    return (
        now is None
        or now.size != recorded.size
        or (None not in (now.sha256, recorded.sha256) and now.sha256 != recorded.sha256)
        or (None not in (now.etag, recorded.etag) and now.etag != recorded.etag)
    )


def open_stream(
    checkpoint: Checkpoint, snapshot: Snapshot, *, settings: Settings, root: Gang
) -> tuple[Checkpoint, Stream]:
    """Return the checkpoint with its files at the source, for this rank: the tokens are those of its own environment.

    :param snapshot: that of :func:`files_to_stream` on rank 0.
    """
    if checkpoint.ref is None:
        raise InternalError(f"the checkpoint {checkpoint.where} has no source to read from")
    source = source_of(checkpoint.ref, revision=checkpoint.revision, settings=settings)
    stream = Stream(source, snapshot, ranks=root.local_size, check=root.check)

    files = tuple(StreamedFile(stream=stream, file=file) for file in snapshot.files)

    return replace(checkpoint, files=None, trusted=False, streamed=files), stream


# --- verification -----------------------------------------------------------------------------------------------------


def prepare_streamed(
    checkpoint: Checkpoint,
    store: AssetStore | None,
    mode: Verify,
    dims: Callable[[], array[int]],
    planned: Plan,
    *,
    groups: int,
    root: Gang,
) -> Expected | None:
    """Return the expected digests of a streamed load; ``None`` if nothing is known of its bytes.

    :param dims: as :func:`~lading.checkpoints.verification.prepare_verification` takes it.
    :param planned: the reads of this rank.
    :param groups: the number of ranks, or of groups of ranks that read together; each sees only a part.
    :param root: the gang of all ranks. A rank that is alone can take the SHA-256 of a file, which it reads whole.

    :raises NotSupportedError: ``always``, or the card pins files, and nothing is known that the bytes could be
        compared with.
    """
    pinned = checkpoint.pinned
    if mode == "never" and not pinned:
        return None
    shards, digests = (
        checkpoint.manifest.shards,
        checkpoint.digests if store is None else known_digests(checkpoint, store),
    )
    left = _left_out(planned, [shard.size for shard in shards])
    lacking = _without_digests(checkpoint.manifest, digests)
    whole = tuple(
        i
        for i, shard in enumerate(shards)
        if root.size == 1 and shard.sha256 is not None and left[i] * _FEW <= shard.size
        if i in lacking or i in pinned
    )
    required = sorted({*pinned, *lacking}) if mode == "always" else pinned
    if unknown := [shards[i].name for i in required if i not in whole]:
        raise NotSupportedError(
            f"{checkpoint.where}: {'`verify` is always' if mode == 'always' else 'the card pins by `sha256`'}, so "
            f"digests of {some(unknown)} are expected that hold for what each rank reads, but none are known. Run "
            f"`lading pull {checkpoint.name}`, and load it without `stream`."
        )
    records = digests is None and groups == 1 and store is not None and store.database.writable
    if digests is None and not whole and not records:
        return None

    return Expected(
        digests=digests, dims=digests.dims if digests is not None else dims() if records else array("b"), whole=whole
    )


def _without_digests(manifest: Manifest, digests: Digests | None) -> set[int]:
    """Return the positions of the files that hold tensors without known digests of all blocks."""
    if digests is None:
        return set(range(len(manifest.shards)))

    return {shard for i, shard in enumerate(manifest.shard_ids) if not digests.is_complete(i)}


def _left_out(planned: Plan, sizes: Sequence[int]) -> list[int]:
    """Return the number of bytes of each file that a plan does not read."""
    left, rows = list(sizes), planned.rows
    for shard, size in zip(planned.shards, planned.sizes, strict=True):
        left[shard] -= size
    for shard, length, count in zip(rows.shards, rows.lengths, rows.counts, strict=True):
        left[shard] -= length * count

    return left


def require_vouched(checkpoint: Checkpoint, expected: Expected | None, unvouched: Sequence[int]) -> None:
    """Check that the bytes of all tensors can be verified.

    :param unvouched: the tensors, by their positions, whose blocks are not all read whole.

    :raises NotSupportedError: those of some cannot.
    """
    if not (tensors := _unverified(checkpoint, expected, unvouched)):
        return
    raise NotSupportedError(
        f"{checkpoint.where}: `verify='always'` asks for a check of all bytes, but a stream cannot verify the parts of "
        f"{some([checkpoint.manifest.names[i] for i in tensors])} that are read, as they are not whole blocks with "
        f"known digests. Run `lading pull {checkpoint.name}`, and load it without `stream`."
    )


def _unverified(checkpoint: Checkpoint, expected: Expected | None, unvouched: Sequence[int]) -> list[int]:
    if expected is None:
        return list(unvouched)
    whole, shard_ids = set(expected.whole), checkpoint.manifest.shard_ids

    return [i for i in unvouched if shard_ids[i] not in whole]


@contextmanager
def taking_sha256(checkpoint: Checkpoint, expected: Expected | None) -> Iterator[Mapping[int, FileDigest]]:
    """Take the SHA-256 of the expected files while the block streams them; yield the digests by shard."""
    if expected is None or not expected.whole or checkpoint.streamed is None:
        yield {}
        return
    files = checkpoint.streamed
    digests = {i: FileDigest(files[i].file.size or 0) for i in expected.whole}
    with files[0].stream.hashing({files[i].file.name: digest for i, digest in digests.items()}):
        yield digests


def finish_streamed(
    checkpoint: Checkpoint,
    expected: Expected | None,
    moved: LoadedTensors,
    sha256: Mapping[int, FileDigest],
    store: AssetStore | None,
    root: Gang,
) -> bool:
    """Compare the streamed bytes with the expected digests, and record the result.

    :param moved: the tensors of this rank.
    :param sha256: the digests of the whole files that this rank has read.
    :param store: the store that records it; only rank 0 has one.

    :returns: whether all bytes that any rank read were compared with a digest.

    :raises DigestMismatchError: a file or a tensor is not the one that was published or recorded.
    """
    manifest = checkpoint.manifest
    files = [
        checkpoint.outcome(i, "sha256", expected=manifest.shards[i].sha256, found=digest.hexdigest())
        for i, digest in sha256.items()
    ]
    digests, found = None if expected is None else expected.digests, moved.digests
    different = [] if digests is None or found is None else differences(digests, found)
    unverified = _unverified(checkpoint, expected, moved.unvouched if digests is not None else moved.wanted)
    if digests is not None:
        unverified += _unverified(checkpoint, expected, [i for i in moved.wanted if not digests.is_complete(i)])
    answers = root.gather_objects((None if found is None else found.known, shards_of(manifest, different), unverified))

    wrong = sorted(set().union(*(shards for _, shards, _ in answers)))
    record_bad(checkpoint, digests, wrong, store)
    _record(checkpoint, files, store)
    require_match(files)
    refuse_different(checkpoint, different)
    if wrong:
        return False  # another rank raises, and then all do

    open_questions = {i for _, _, tensors in answers for i in tensors}
    if store is None:
        return not open_questions
    checks: list[SourceCheck] = []
    if found is not None:
        known = [mask for mask, _, _ in answers if mask is not None]
        seen = found if digests is None else seen_by_all(digests, known)
        checks += tensor_checks(checkpoint, digests, seen)
        if digests is None and all(map(found.is_complete, range(len(manifest)))):
            with BestEffort("the digests of %s are not in the catalog", checkpoint.name):
                record_digests(store.database, uri=checkpoint.uri, manifest=manifest, digests=found)
    for i in sorted({manifest.shard_ids[tensor] for tensor in open_questions}):
        checks.append(checkpoint.outcome(i, UNVERIFIED, expected=None, found=None))
    _record(checkpoint, checks, store)

    return not open_questions


def _record(checkpoint: Checkpoint, checks: Sequence[SourceCheck], store: AssetStore | None) -> None:
    if store is not None and checks:
        with BestEffort("the checks of %s are not in the catalog", checkpoint.name):
            record_files(store.database, uri=checkpoint.uri, checks=checks)
