"""Adoption of checkpoints that are on this machine: they are added to the catalog in place, without copies."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from stat import S_ISREG
from typing import Literal

from lading.cards.documents.write_yaml import to_yaml
from lading.catalog.artifacts import record_artifacts
from lading.catalog.checkpoints.holdings import checkpoints_like
from lading.catalog.checkpoints.record import forget_checkpoint, record_checkpoint, record_files
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import Check, CheckpointContents, CopyKind, FoundArtifact, LocalCopy, now
from lading.catalog.store import AssetStore, StoredCheckpoint
from lading.checkpoints.card_links import names_of
from lading.checkpoints.checkpoint import LocalCheckpointFiles
from lading.checkpoints.local_copies import intact_copies
from lading.checkpoints.verification import hash_files
from lading.errors import (
    CatalogError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    LadingError,
    NotSupportedError,
    first_line,
)
from lading.formats import NonContiguousError
from lading.formats.adapter_config import ADAPTER_NAME
from lading.formats.artifacts import LORA, Artifact
from lading.formats.folder import DISTRIBUTED_SUFFIX, folder_of, is_checkpoint_file
from lading.formats.manifest import Manifest
from lading.operations.find_checkpoints import (
    FoundCheckpoint,
    artifact_at,
    find_checkpoints,
    find_hub_repositories,
    find_in_snapshot,
    storable_uri,
)
from lading.operations.hub_checkpoints import HubCheckpoint, hub_checkpoints, no_snapshot_error, resolve_commit
from lading.operations.moved import Move, MoveFinder
from lading.sources.hub.address import is_sha256
from lading.sources.hub.cache import blob_tag, hub_cache
from lading.system.display import human_bytes, representation
from lading.system.filesystem import FileStat, expand_home
from lading.system.uris import path_uri, uri_path

log = logging.getLogger("lading")

Status = Literal["adopted", "known", "moved", "unloadable", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """The result for one checkpoint that was found."""

    path: Path
    status: Status
    """``adopted`` now, ``known`` to the catalog before, ``moved`` from another path; ``unloadable`` for an artifact; or
    ``failed``."""
    kind: str = "checkpoint"
    """The kind: ``checkpoint``, or that of an artifact: ``gguf``, ``lora adapter``, ``quantized (awq)`` and so on."""
    checkpoint: str | None = None
    """The URI of the checkpoint in the catalog; that of its own path if it belongs to no card."""
    revision: str | None = None
    cards: tuple[str, ...] = ()
    """The names of the cards that load it."""
    moved_from: Path | None = None
    """The path at which it was before, if the catalog knows it from there and nothing is there any more."""
    left_behind: tuple[str, ...] = ()
    """The names of the cards that state ``moved_from``, and do not load it until they state the new path."""
    bytes: int = 0
    """The size of its files."""
    dtypes: tuple[str, ...] = ()
    """The dtypes of its tensors, that of the most elements first, as far as they are known."""
    verified: bool = False
    """True if its bytes were verified to be those of ``cards``; else the first load verifies them."""
    overlays: tuple[str, ...] = ()
    """Overlays with which cards that it may belong to would load it: YAML, one document each."""
    problem: str | None = None
    """The reason that lading does not load it."""
    error: LadingError | OSError | None = None
    """The error, if the adoption failed."""

    def __repr__(self) -> str:
        return representation(
            self,
            f"{self.path} {self.status}",
            "" if self.kind == "checkpoint" else self.kind,
            self.problem or human_bytes(self.bytes),
            f"of {', '.join(self.cards)}" if self.cards else "",
            "verified" if self.verified else "",
        )


def adopt_checkpoints(
    *paths: str | Path,
    dry_run: bool = False,
    restrict: bool = True,
    progress: bool = True,
    store: CardStore | None = None,
) -> tuple[Adoption, ...]:
    """Record the checkpoints that are on this machine in the catalog, in place; lading never deletes their files.

    A checkpoint in a Hugging Face cache belongs to the cards that name its repository, and is verified when it is first
    loaded. A checkpoint in another folder belongs to a card if its bytes have the digests that the catalog knows for
    the card's checkpoint; else it is known only by its path. What the catalog knows of a checkpoint moves with it to
    another path, unless cards state the earlier one. ``torch.save`` files are adopted if they have no safetensors file
    and their tensors are contiguous. Weights that lading does not load are recorded as artifacts, with what they are.

    :param paths: folders, searched at any depth; default: the cache of Hugging Face's libraries.
    :param dry_run: whether to change nothing, and only return the results.
    :param restrict: see :func:`lading.formats.index`.
    :param progress: whether to show a progress bar on stderr while files are hashed.

    :returns: a result for each checkpoint that was found, even if it cannot be used.

    :raises CheckpointNotFoundError: a path does not exist (also a ``FileNotFoundError``).
    :raises NotSupportedError: a path is not a folder.
    :raises CatalogError: the catalog cannot be read or written.
    """
    store = open_store(store)
    roots = [_root(path) for path in paths]
    if not dry_run:
        store.database.require_writable()

    places = [
        *(
            (place for root in roots for place in find_checkpoints(root))
            if paths
            else find_hub_repositories(hub_cache())
        )
    ]
    adopter = _Adopter(store, places, dry_run=dry_run, restrict=restrict, progress=progress)
    found: dict[tuple[Path, str | None, str], Adoption] = {}
    for place in places:
        for adoption in adopter.adopt(place):
            found.setdefault((adoption.path, adoption.checkpoint, adoption.kind), adoption)  # folders may overlap
    if not dry_run:
        record_artifacts(store.database, adopter.artifacts, searched=roots or [hub_cache()])

    return tuple(found.values())


def _root(path: str | Path) -> Path:
    root = expand_home(path).absolute()
    if not root.exists():
        raise CheckpointNotFoundError(root, f"The folder {root} does not exist.")
    if not root.is_dir():
        raise NotSupportedError(f"{root} is expected to be a folder to search, but is a file. Give its folder instead.")

    return root.resolve()


class _Adopter:
    """The adoption of several places, for which the catalog's cards are read once."""

    def __init__(
        self, store: AssetStore, places: Sequence[FoundCheckpoint], *, dry_run: bool, restrict: bool, progress: bool
    ) -> None:
        self._store = store
        self._dry_run = dry_run
        self._restrict = restrict
        self._progress = progress
        self._by_repo = hub_checkpoints(store)
        self._names = names_of(store, [path_uri(place.path) for place in places if place.repo is None])
        """The names of the cards that state the path of a place, by its URI."""
        self.artifacts: list[FoundArtifact] = []
        """The artifacts that were found."""
        self._moves = MoveFinder(store, progress=progress)

    def adopt(self, place: FoundCheckpoint) -> Iterator[Adoption]:
        """Adopt the checkpoints in a place, and yield the results."""
        if place.problem is not None:
            yield _failed(place.path, place.problem)
        elif place.artifact is not None:
            yield from self._artifact(place, place)
        elif place.repo is not None:
            yield from self._repository(place, place.repo)
        else:
            yield from self._attempt(place.path, lambda: self._folder(place))

    def _attempt(self, path: Path, take: Callable[[], list[Adoption]]) -> list[Adoption]:
        try:
            return take()
        except CatalogError:
            raise
        except (LadingError, OSError) as error:
            return [_failed(path, error)]

    # --- repositories of a Hugging Face cache -------------------------------------------------------------------------

    def _repository(self, place: FoundCheckpoint, repo: str) -> Iterator[Adoption]:
        commits: set[str] = set()
        found = list(self._revisions(place, repo, commits))
        places = [each for commit in sorted(commits) for each in find_in_snapshot(place.path / "snapshots" / commit)]
        if not places or any(each.artifact is None for each in places):
            yield from found  # else it has nothing but artifacts, and not a checkpoint that failed
        for each in places:
            if each.artifact is not None:
                yield from self._artifact(each, place)

    def _revisions(self, place: FoundCheckpoint, repo: str, commits: set[str]) -> Iterator[Adoption]:
        """Adopt the revisions of a repository that cards name, else the main one; add their commits to ``commits``."""
        wanted = self._by_repo.get(repo.casefold(), ())
        for checkpoint in wanted:
            stored = self._store.checkpoint(checkpoint.uri)
            commit = resolve_commit(place, checkpoint.revision, stored)
            if commit is not None:
                commits.add(commit)
                yield from self._snapshot(place, checkpoint, commit, stored)
        if commits:
            return

        # It belongs to no card, or only to cards of other revisions.
        commit = resolve_commit(place, None, None)
        if commit is None:
            yield _failed(place.path, no_snapshot_error(place))
            return
        commits.add(commit)
        pinned = f"@{commit}" if wanted else ""
        checkpoint = HubCheckpoint(uri=f"hg://{repo}{pinned}")
        yield from self._snapshot(place, checkpoint, commit, self._store.checkpoint(checkpoint.uri))

    def _snapshot(
        self, place: FoundCheckpoint, checkpoint: HubCheckpoint, commit: str, stored: StoredCheckpoint | None
    ) -> list[Adoption]:
        path = place.path / "snapshots" / commit / (checkpoint.inner or "")

        return self._attempt(path, lambda: [self._take_snapshot(place, path, checkpoint, commit, stored)])

    def _take_snapshot(
        self,
        place: FoundCheckpoint,
        path: Path,
        checkpoint: HubCheckpoint,
        commit: str,
        stored: StoredCheckpoint | None,
    ) -> Adoption:
        known = _known(path, stored, checkpoint.cards)
        if known is not None:
            return known
        if stored is not None and stored.revision != commit:
            raise CheckpointNotFoundError(
                path,
                f"The catalog has {checkpoint.uri} at the commit {stored.revision}, but the cache has the commit "
                f"{commit}. Run `lading index {(*checkpoint.cards, checkpoint.uri)[0]}` to use the latest commit, or "
                "run it with LADING_OFFLINE=1 to use the cached one.",
            )

        found = self._read(path, place)
        if isinstance(found, Artifact):
            return self._take_artifact(path, found)
        manifest, copies = found.manifest, found.copies()
        folder = folder_of(path)
        shards = tuple(replace(shard, sha256=_sha256_of_blob(folder / shard.name)) for shard in manifest.shards)
        manifest = replace(manifest, shards=shards)
        if stored is not None and not (
            stored.manifest.has_files_of(manifest) and stored.manifest.tensors_equal(manifest)
        ):
            raise CorruptModelCheckpointError(
                path,
                f"{path} has other files or tensors than those indexed for {checkpoint.uri} at this commit. "
                f"Run `lading index {(*checkpoint.cards, checkpoint.uri)[0]}` if the files are right.",
            )
        if not self._dry_run:
            if stored is None:
                contents = CheckpointContents(uri=checkpoint.uri, manifest=manifest, copies=copies, revision=commit)
                record_checkpoint(self._store.database, contents, cards=checkpoint.cards)
            else:
                record_files(self._store.database, uri=checkpoint.uri, copies=copies, cards=checkpoint.cards)

        return _adoption("adopted", path, checkpoint.uri, commit, checkpoint.cards, manifest, copies)

    # --- other folders ------------------------------------------------------------------------------------------------

    def _folder(self, place: FoundCheckpoint) -> list[Adoption]:
        path, uri = place.path, storable_uri(place.path)
        here = self._read(path, place)
        if isinstance(here, Artifact):
            return [self._take_artifact(path, here)]
        manifest, copies = here.manifest, here.copies()

        stored = self._store.checkpoint(uri)
        digests = _digests_as_known(stored, manifest)
        found, wanted = [], self._wanted(manifest, path)
        for other, cards in wanted:
            known = _known(path, other, cards)
            if known is not None:
                found.append(known)
                continue
            if digests is None:
                files = [folder_of(path) / shard.name for shard in manifest.shards]
                total = sum(shard.size for shard in manifest.shards)
                digests = hash_files(files, total, "hash", progress=self._progress)
            if [shard.sha256 for shard in other.manifest.shards] == [sha256 for sha256, _ in digests]:
                found.append(self._take_match(path, other, manifest, digests, cards))
        cards = tuple(self._names.get(uri, ()))
        if found:
            if stored is not None and not cards and not self._dry_run:
                forget_checkpoint(self._store.database, uri)  # it was known by its path before
            return found

        known = _known(path, stored, cards)
        move = self._moves.find(here) if stored is None else None
        if move is not None and not move.cards:
            known = self._take_moved(path, move, cards, manifest)
        if known is None:
            if digests is not None:
                shards = zip(manifest.shards, digests, strict=True)
                manifest = replace(manifest, shards=tuple(replace(s, sha256=sha256) for s, (sha256, _) in shards))
                seen = {stat for _, stat in digests}
                copies = [replace(copy, verified_at=now()) if copy.stat in seen else copy for copy in copies]
            if not self._dry_run:
                kind: CopyKind = "source" if cards else "adopted"
                owned = [replace(copy, kind=kind) for copy in copies]
                contents = CheckpointContents(uri=uri, manifest=manifest, copies=owned)
                record_checkpoint(self._store.database, contents, cards=cards)
            known = _adoption("adopted", path, uri, "", cards, manifest, copies)

        if move is not None:
            known = replace(known, moved_from=move.origin, left_behind=move.cards)

        return [known if cards else replace(known, overlays=self._overlays(path))]

    def _take_moved(self, path: Path, move: Move, cards: tuple[str, ...], manifest: Manifest) -> Adoption:
        if not self._dry_run:
            record_checkpoint(self._store.database, move.contents(manifest), cards=cards)
        moved = _adoption("moved", path, move.to, "", cards, manifest, move.copies)

        return replace(moved, verified=move.verified)

    def _wanted(self, manifest: Manifest, path: Path) -> list[tuple[StoredCheckpoint, tuple[str, ...]]]:
        """Return the checkpoints of cards that a folder may hold, except those that are elsewhere on this machine."""
        # A card that states a path loads what is there, and nothing else.
        uris = [uri for uri in checkpoints_like(self._store.database, manifest, hashed=True) if uri_path(uri) is None]
        names = names_of(self._store, uris) if uris else {}
        here = {folder_of(path) / shard.name for shard in manifest.shards}

        wanted = []
        for uri in uris:
            stored = self._store.checkpoint(uri)
            if stored is None or uri not in names:
                continue
            intact = intact_copies(stored)
            if intact is None or {copy.path for copy in intact} == here:
                wanted.append((stored, tuple(names[uri])))

        return wanted

    def _take_match(
        self,
        path: Path,
        stored: StoredCheckpoint,
        manifest: Manifest,
        digests: Sequence[tuple[str, FileStat]],
        cards: tuple[str, ...],
    ) -> Adoption:
        # The catalog knows the files by their names at the source, which may differ from the local ones.
        copies, checks = [], []
        for shard, here, (sha256, stat) in zip(stored.manifest.shards, manifest.shards, digests, strict=True):
            file = folder_of(path) / here.name
            copies.append(LocalCopy(file=shard.name, path=file, stat=stat, kind="adopted"))
            checks.append(
                Check(file=shard.name, path=file, stat=stat, method="sha256", expected=shard.sha256, found=sha256)
            )
        if not self._dry_run:
            record_files(self._store.database, uri=stored.uri, copies=copies, checks=checks, cards=cards)

        adopted = _adoption("adopted", path, stored.uri, stored.revision, cards, manifest, copies)

        return replace(adopted, verified=True)

    def _read(self, path: Path, place: FoundCheckpoint) -> LocalCheckpointFiles | Artifact:
        """Return the checkpoint at a path, whose links may not leave its place; an artifact, if it is quantized."""
        storable_uri(path)  # raises early if the catalog cannot store the path
        artifact = artifact_at(path, place, restrict=self._restrict)
        if artifact is not None:
            return artifact
        cache = self._store.settings.cache_dir
        try:
            found = LocalCheckpointFiles.read(path, cache=cache, restrict=self._restrict, rewrite=False)
        except NonContiguousError:
            raise NotSupportedError(
                f"{path} has tensors that are not contiguous, so it cannot be used in place. Load it by its path, or "
                "by a card of your own that names it, to rewrite it in lading's cache."
            ) from None

        return replace(found, kind="adopted")

    # --- artifacts ----------------------------------------------------------------------------------------------------

    def _artifact(self, found: FoundCheckpoint, place: FoundCheckpoint) -> list[Adoption]:
        """Record an artifact that the search recognized by the names of its files, and return the result.

        :param place: the place that its links may not leave.
        """

        def take() -> list[Adoption]:
            storable_uri(found.path)
            artifact = artifact_at(found.path, place, found.artifact)
            return [] if artifact is None else [self._take_artifact(found.path, artifact)]

        kind = "" if found.artifact is None else found.artifact.kind

        return [each if each.error is None else replace(each, kind=kind) for each in self._attempt(found.path, take)]

    def _take_artifact(self, path: Path, artifact: Artifact) -> Adoption:
        cards: tuple[str, ...] = ()
        if artifact.kind == LORA:
            uri = path_uri(path / ADAPTER_NAME)
            cards = tuple(names_of(self._store, [uri]).get(uri, ()))
        if not cards:
            self.artifacts.append(FoundArtifact(path=path, artifact=artifact))

        return Adoption(
            path=path,
            status="adopted" if artifact.kind == LORA else "unloadable",
            kind=artifact.kind,
            cards=cards,
            bytes=artifact.bytes,
            dtypes=artifact.dtypes,
            problem=None if cards else artifact.reason,
        )

    def _overlays(self, path: Path) -> tuple[str, ...]:
        """Return overlays for cards whose repository has the name of the folder; the user decides if it is right."""
        found = [
            name
            for repo, checkpoints in self._by_repo.items()
            if repo.rpartition("/")[2] == path.name.casefold()
            for checkpoint in checkpoints
            for name in checkpoint.cards
        ]

        return tuple(to_yaml([{"name": f"{name}@user", "checkpoint": str(path)}]) for name in sorted(found))


def _sha256_of_blob(path: Path) -> str | None:
    tag = blob_tag(path)

    return tag if tag is not None and is_sha256(tag) else None


def _digests_as_known(stored: StoredCheckpoint | None, manifest: Manifest) -> list[tuple[str, FileStat]] | None:
    """Return the recorded digests and states of files that are verified and unchanged; ``None`` if some are not."""
    if stored is None or not stored.manifest.has_files_of(manifest) or (copies := intact_copies(stored)) is None:
        return None
    pairs = zip(stored.manifest.shards, copies, strict=True)
    known = [(shard.sha256, copy.stat) for shard, copy in pairs if shard.sha256 and copy.verified_at is not None]

    return known if len(known) == len(copies) else None


def _known(path: Path, stored: StoredCheckpoint | None, cards: tuple[str, ...]) -> Adoption | None:
    """Return the result for a checkpoint whose intact files the catalog knows; ``None`` if it does not."""
    if stored is None or (copies := intact_copies(stored)) is None:
        return None
    known = _adoption("known", path, stored.uri, stored.revision, cards, stored.manifest, copies)

    return replace(known, verified=all(copy.verified_at is not None for copy in copies))


def _adoption(
    status: Status,
    path: Path,
    uri: str,
    revision: str,
    cards: tuple[str, ...],
    manifest: Manifest,
    copies: Sequence[LocalCopy],
) -> Adoption:
    return Adoption(
        path=path,
        status=status,
        checkpoint=uri,
        revision=revision or None,
        cards=cards,
        bytes=sum(copy.stat.size for copy in copies),
        dtypes=tuple(manifest.dtype_counts),
    )


def _failed(path: Path, error: LadingError | OSError) -> Adoption:
    return Adoption(path=path, status="failed", bytes=_size_at(path), problem=first_line(error), error=error)


def _size_at(path: Path) -> int:
    """Return the size of a file, or of the files in a folder whose names are those of checkpoints; 0 if unknown."""

    def has_weights(name: str) -> bool:
        return is_checkpoint_file(name) or name.endswith(DISTRIBUTED_SUFFIX)

    try:
        files = [each for each in path.iterdir() if has_weights(each.name)] if path.is_dir() else [path]
        return sum(found.st_size for found in map(os.stat, files) if S_ISREG(found.st_mode))
    except OSError:
        return 0
