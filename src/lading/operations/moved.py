"""Checkpoints that moved: files at a new path that the catalog knows at another one, where nothing is any more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lading.catalog.checkpoints.holdings import checkpoints_like, gone_checkpoints
from lading.catalog.checkpoints.record import last_digests
from lading.catalog.records import HEADER, CheckpointContents, LocalCopy, SourceCheck
from lading.catalog.store import AssetStore, StoredCheckpoint
from lading.checkpoints.card_links import names_of
from lading.checkpoints.checkpoint import Checkpoint, LocalCheckpointFiles, header_checks
from lading.checkpoints.local_copies import best_copies
from lading.checkpoints.verification import check_files, tensor_checks
from lading.errors import InternalError
from lading.formats.manifest import Manifest
from lading.system.filesystem import FileStat
from lading.system.uris import uri_path
from lading.transfer.hashing import hash_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A checkpoint that is at another path than the one by which the catalog knows it."""

    uri: str
    """The URI of the earlier path."""
    to: str
    """The URI of the path at which it is now."""
    cards: tuple[str, ...]
    """The names of the cards that state the earlier path."""
    copies: tuple[LocalCopy, ...]
    """Its files at the new path."""
    checks: tuple[SourceCheck, ...]
    """The checks of these files against the digests that the catalog has of them."""
    verified: bool
    """``True`` if the bytes of all tensors are known to be those of recorded digests."""

    @property
    def origin(self) -> Path:
        """The earlier path."""
        path = uri_path(self.uri)
        if path is None:
            raise InternalError(f"{self.uri} moved, expected the URI of a path")

        return path

    def contents(self, manifest: Manifest) -> CheckpointContents:
        """Return it as the catalog records it: at the new path, with all that is known of it."""
        return CheckpointContents(
            uri=self.to, manifest=manifest, copies=self.copies, checks=self.checks, moved_from=self.uri
        )


class MoveFinder:
    """The search for moved checkpoints, for which the catalog is asked once which ones are gone, when that matters.

    A candidate is a checkpoint of the same tensors, all of whose files are gone, and which only this machine had. It is
    the same one if its files are in the state that the catalog recorded, as after a renaming; else if their bytes have
    the recorded digests; and if no digest is known, if they have the recorded sizes, times of modification and headers.
    Without the times, the next step of a training would be taken for the one that the training deleted.
    """

    def __init__(self, store: AssetStore, *, progress: bool = False) -> None:
        """Make the search.

        :param progress: whether to show a bar on stderr while files are hashed.
        """
        self._store = store
        self._progress = progress
        self._found: set[str] = set()

    @cached_property
    def _gone(self) -> frozenset[str]:
        return frozenset(gone_checkpoints(self._store.database))

    @cached_property
    def _cards(self) -> Mapping[str, Sequence[str]]:
        return names_of(self._store, self._gone)

    def find(self, here: LocalCheckpointFiles) -> Move | None:
        """Return the move of a checkpoint to the path of ``here``; ``None`` if none moved there.

        A checkpoint is found once.

        :raises CatalogError: the catalog cannot be read.
        :raises OSError: a file cannot be read.
        """
        checkpoint = here.checkpoint("")
        for stored in sorted(self._candidates(here), key=lambda stored: not _unchanged(stored, here)):
            checks = [] if _unchanged(stored, here) else self._matching(stored, here, checkpoint)
            if checks is None:
                continue
            self._found.add(stored.uri)
            verified = {copy.stat: copy.verified_at for copy in stored.copies}
            hashed = any(check.method != HEADER for check in checks)

            return Move(
                uri=stored.uri,
                to=checkpoint.uri,
                cards=tuple(self._cards.get(stored.uri, ())),
                copies=tuple(replace(copy, verified_at=verified.get(copy.stat)) for copy in here.copies()),
                checks=tuple(checks),
                verified=hashed or all(verified.get(file.stat) for file in checkpoint.here()),
            )

        return None

    def _candidates(self, here: LocalCheckpointFiles) -> Iterator[StoredCheckpoint]:
        """Yield the checkpoints that are gone and may be the one that is ``here``."""
        like = checkpoints_like(self._store.database, here.manifest) if self._gone else ()
        for uri in like:
            stored = self._store.checkpoint(uri) if uri in self._gone - self._found else None
            if stored is not None and _has_all_copies(stored) and _have_same_names(stored.manifest, here.manifest):
                yield stored

    def _matching(
        self, stored: StoredCheckpoint, here: LocalCheckpointFiles, checkpoint: Checkpoint
    ) -> list[SourceCheck] | None:
        """Return the checks of files against what the catalog has of them; ``None`` if they are other files."""
        known = last_digests(self._store.database, stored.uri, HEADER)
        headers: list[SourceCheck] = [*header_checks(checkpoint, _renamed(known, stored, here))]
        if any(check.result == "mismatch" for check in headers):
            return None

        pairs = zip(here.manifest.shards, stored.manifest.shards, strict=True)
        shards = tuple(replace(now, sha256=then.sha256) for now, then in pairs)
        if all(shard.sha256 for shard in shards):
            expected = replace(checkpoint, manifest=replace(here.manifest, shards=shards))
            checks: Sequence[SourceCheck] = check_files(expected, progress=self._progress)
        elif (digests := self._store.digests(stored.uri, stored.manifest)) is not None:
            found = hash_checkpoint(here.manifest, checkpoint.here(), digests.dims, progress=self._progress)
            checks = list(tensor_checks(checkpoint, digests, found))
        elif _times(_stats(stored)) == _times(file.stat for file in checkpoint.here()):
            return headers
        else:
            return None

        return None if any(check.result == "mismatch" for check in checks) else [*headers, *checks]


def may_have_changed(stored: StoredCheckpoint, here: LocalCheckpointFiles, store: AssetStore) -> bool:
    """Return whether files at a new path may have other bytes than a checkpoint had: no known digest can tell, and the
    times of modification are others.
    """
    manifest = stored.manifest
    if all(shard.sha256 for shard in manifest.shards) or store.digests(stored.uri, manifest) is not None:
        return False

    if not _has_all_copies(stored) or len(manifest.shards) != len(here.manifest.shards):
        return True
    now = [here.stats[shard.name] for shard in here.manifest.shards]

    return [(then.size, then.mtime_ns) for then in _stats(stored)] != [(stat.size, stat.mtime_ns) for stat in now]


def _has_all_copies(stored: StoredCheckpoint) -> bool:
    return {shard.name for shard in stored.manifest.shards} <= {copy.file for copy in stored.copies}


def _stats(stored: StoredCheckpoint) -> list[FileStat]:
    """Return the recorded states of the shards of a checkpoint, in their order."""
    known = best_copies(stored.copies)

    return [known[shard.name].stat for shard in stored.manifest.shards]


def _times(stats: Iterable[FileStat]) -> list[int]:
    return [stat.mtime_ns for stat in stats]


def _unchanged(stored: StoredCheckpoint, here: LocalCheckpointFiles) -> bool:
    return _stats(stored) == [here.stats[shard.name] for shard in here.manifest.shards]


def _have_same_names(before: Manifest, now: Manifest) -> bool:
    """Return whether the files of two manifests have the same names; one file alone may have another name."""
    return len(now.shards) == 1 or [s.name for s in before.shards] == [s.name for s in now.shards]


def _renamed(headers: dict[str, str], stored: StoredCheckpoint, here: LocalCheckpointFiles) -> dict[str, str]:
    """Return recorded digests by the names that the files have now."""
    names = zip(stored.manifest.shards, here.manifest.shards, strict=True)

    return {now.name: headers[then.name] for then, now in names if then.name in headers}
