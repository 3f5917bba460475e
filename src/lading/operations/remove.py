"""The removal of models from this machine: files that this catalog fetched, and revisions of the shared cache."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lading.cards.adapters import adapter_refs
from lading.cards.card import AssetCard, checkpoint_ref, split_name
from lading.catalog.artifacts import known_artifacts
from lading.catalog.checkpoints.holdings import held_checkpoints, releasing_copies
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import LocalCheckpoint, LocalCopy
from lading.catalog.store import AssetStore
from lading.checkpoints.card_links import catalog_uri, names_of
from lading.checkpoints.names import find_card, unknown_model
from lading.errors import PolicyError
from lading.formats import is_rewritten
from lading.operations.disk_usage import find_orphans, own_cache
from lading.sources.cache import Cache
from lading.sources.hub.address import SCHEMES
from lading.sources.hub.remove import HubRevision, delete_revisions, revision_of
from lading.sources.partial import sweep
from lading.system.display import counted, human_bytes, representation
from lading.system.uris import path_uri, shown_uri

_ADOPTED = "adopted, not fetched by lading"

_GRACE = 3_600
"""The seconds that a file of the cache may be without an entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedFile:
    """A file that stays, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The result of a removal, or of a dry run."""

    name: str
    freed: int
    """Bytes."""
    removed: tuple[Path, ...]
    """The removed files. The bytes of those that others need stay, and do not count."""
    kept: tuple[SkippedFile, ...] = ()
    """The files that stay; the catalog no longer knows them as the model's."""
    revisions: tuple[HubRevision, ...] = ()
    """The revisions deleted from the cache of Hugging Face's libraries, regardless of who fetched them."""
    also_of: tuple[str, ...] = ()
    """The other models of the same checkpoint, which lose it, too."""

    @property
    def nothing(self) -> bool:
        """``True`` if nothing of the model was on this machine."""
        return not (self.removed or self.kept or self.freed)

    def __repr__(self) -> str:
        return representation(
            self,
            self.name,
            f"{human_bytes(self.freed)} in {counted(len(self.removed), 'file')}",
            f"{counted(len(self.kept), 'file')} kept",
            f"{counted(len(self.revisions), 'revision')} of the Hugging Face cache" if self.revisions else "",
        )


def remove_model(
    name: AssetCard | str | Path, *, dry_run: bool = False, hub: bool = False, store: CardStore | None = None
) -> Removal:
    """Remove the files of a model from lading's cache and from that of Hugging Face's libraries; forget the others.

    This removes from lading's own cache the weights, their extra files, and those of earlier revisions, unless another
    model's checkpoint or another catalog needs them. The cache of Hugging Face's libraries belongs to huggingface_hub:
    there this deletes whole revisions, by its ``delete_revisions``, and only with ``hub``. The catalog keeps the
    manifest of the checkpoint, and a load fetches it again. Of a card with adapters this removes those, and the base if
    no other card has it.

    :param name: as ``load_model`` takes it; of a checkpoint that no card has, the catalog must know it.
    :param dry_run: only report what would be removed.
    :param hub: delete the model's revisions from the cache of Hugging Face's libraries.

    :raises ModelNotKnownError: the name is neither that of a card nor of a checkpoint in the catalog.
    :raises PolicyError: the removal would delete revisions, and ``hub`` is not set; nothing was removed.
    :raises CatalogError: the catalog cannot be written; nothing was removed.
    :raises OSError: a file cannot be removed. The catalog then has the same records as before, and missing files count
        as missing: remove the model again.
    """
    remover = Remover(open_store(store))
    planned = remover.plan(name)
    if dry_run:
        return planned.removal
    with remover.removing(hub=hub) as remove:
        return remove(planned)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRemoval:
    """A removal that was not done yet."""

    removal: Removal
    """The result of a dry run."""
    found: Sequence[tuple[str, str]]
    """The URIs of the checkpoints in the catalog, each with the one in lading's cache."""
    artifact: Path | None = None
    """The path of an artifact, which only the catalog forgets."""


class Remover:
    """The removal of several models, for which the catalog is read once."""

    def __init__(self, store: AssetStore) -> None:
        self._store = store
        self._cache = own_cache(store)
        self._look = _looking(self._cache)
        self._held = held_checkpoints(store.database)
        self._names = names_of(store, [checkpoint.uri for checkpoint in self._held])
        """The names of the models of each checkpoint. Found before the removal: only an existing rewrite is found."""

    def plan(self, target: AssetCard | str | Path) -> PlannedRemoval:
        """Return what the removal of a model would do.

        :raises ModelNotKnownError: the name is neither that of a card nor of a checkpoint in the catalog.
        """
        if (artifact := _artifact_of(target, self._store)) is not None:
            kept = (SkippedFile(path=artifact, reason=_ADOPTED),)
            removal = Removal(name=str(target), freed=0, removed=(), kept=kept)
            return PlannedRemoval(removal=removal, found=(), artifact=artifact)
        name, found = _checkpoints_of(target, self._store, self._held)
        if elsewhere := [uri for uri, _ in found if uri not in self._names]:
            self._names |= {uri: [] for uri in elsewhere} | names_of(self._store, elsewhere)
        also_of = {uri: tuple(n for n in self._names[uri] if n != split_name(name)[0]) for uri, _ in found}
        if len(found) > 1:  # without its adapters, the base is another model
            found = [(uri, entry) for uri, entry in found if not also_of[uri]]
        plans = [_plan(uri, entry, self._held, self._cache, self._look) for uri, entry in found]
        freed = sum(plan.carry_out(dry_run=True) for plan in plans)
        others = dict.fromkeys(other for uri, _ in found for other in also_of[uri])

        return PlannedRemoval(removal=_result(name, plans, freed, tuple(others)), found=found)

    @contextmanager
    def removing(self, *, hub: bool) -> Iterator[Callable[[PlannedRemoval], Removal]]:
        """Hold the catalog while the body removes models with the function that this yields.

        :raises CatalogError: the catalog cannot be written; nothing was removed.
        """
        with releasing_copies(self._store.database) as releases:

            def remove(planned: PlannedRemoval) -> Removal:
                if planned.artifact is not None:
                    releases.forget_artifact(planned.artifact)
                    return planned.removal
                first = [_plan(uri, entry, releases.held, self._cache, self._look) for uri, entry in planned.found]
                if not hub and (revisions := [each for plan in first for each in plan.revisions]):
                    raise _refused(planned.removal.name, revisions)
                plans, freed = [], 0
                for uri, entry in planned.found:
                    plan = _plan(uri, entry, releases.held, self._cache, self._look)
                    with releases.release(uri):
                        freed += plan.carry_out(dry_run=False)
                    plans.append(plan)
                return _result(planned.removal.name, plans, freed, planned.removal.also_of)

            yield remove


def _result(name: str, plans: Sequence[_Plan], freed: int, also_of: tuple[str, ...]) -> Removal:
    return Removal(
        name=name,
        freed=freed,
        removed=tuple(path for plan in plans for path in plan.paths),
        kept=tuple(kept for plan in plans for kept in plan.kept),
        revisions=tuple(revision for plan in plans for revision in plan.revisions),
        also_of=also_of,
    )


def remove_orphans(*, dry_run: bool = False, older_than: float = _GRACE, store: CardStore | None = None) -> Removal:
    """Remove the files that this catalog fetched to lading's cache and no card names in any environment, and the
    remains of interrupted downloads.

    Files of other catalogs in a shared cache stay.

    :param dry_run: only report what would be removed.
    :param older_than: seconds; younger files without a known purpose stay.

    :raises CatalogError: the catalog cannot be written; nothing was removed.
    :raises OSError: a file cannot be removed.
    """
    store = open_store(store)
    # A catalog of another user does not show which files are orphans.
    store.database.require_writable()
    # No other process may give a file an owner between the search and the removal.
    with nullcontext() if dry_run else store.database.write():
        orphans = find_orphans(store, held_checkpoints(store.database))
        cache = orphans.cache
        strays = [path for path in orphans.strays if time.time() - os.lstat(path).st_ctime > older_than]
        paths = [*(path for _, paths in orphans.entries for path in paths), *strays]
        if dry_run:
            return Removal(name="", freed=_bytes(paths), removed=tuple(paths))

        freed = sum(cache.remove(entry, keep=orphans.needed) for entry, _ in orphans.entries)
        freed += _remove(strays) + sweep(cache.tmp)
        gone = tuple(path for path in paths if not path.exists())

    return Removal(name="", freed=freed, removed=gone)


def _bytes(paths: Sequence[Path]) -> int:
    return sum(os.lstat(path).st_size for path in set(paths) if path.exists())


def _remove(paths: Sequence[Path]) -> int:
    """Remove files and return the number of freed bytes."""
    freed = _bytes(paths)
    for path in paths:
        path.unlink(missing_ok=True)

    return freed


def _checkpoints_of(
    target: AssetCard | str | Path, store: AssetStore, held: Sequence[LocalCheckpoint]
) -> tuple[str, list[tuple[str, str]]]:
    """Return the name of a model, and the URIs of its checkpoint and of its adapters in the catalog, each with the one
    in lading's cache.
    """
    found = find_card(target, store, ask=False)
    if isinstance(found, AssetCard) and found.source:
        refs = [checkpoint_ref(each) for each in (found, *(ref.card for ref in adapter_refs(found)))]
        return found.title, [(catalog_uri(ref, store), ref.uri) for ref in refs if ref.uri]

    uri = path_uri(found) if isinstance(found, Path) else checkpoint_ref(found).key
    known = _known_as(uri, store, held)
    if known is None:
        raise unknown_model(str(target), store)

    return str(target), [(known, known)]


def _artifact_of(target: AssetCard | str | Path, store: AssetStore) -> Path | None:
    """Return the path of the artifact that the catalog knows at a path; ``None`` if it knows none, or a checkpoint."""
    found = find_card(target, store, ask=False)
    if not isinstance(found, Path) or store.checkpoint(uri := path_uri(found)) is not None:
        return None

    return next((each.path for each in known_artifacts(store.database) if path_uri(each.path) == uri), None)


def _refused(name: str, revisions: Sequence[HubRevision]) -> PolicyError:
    which = ", ".join(f"{revision.commit} of {revision.repo}" for revision in revisions)

    return PolicyError(
        f"{name} is in the cache of Hugging Face's libraries, which other programs use, too: {which} would be deleted. "
        f"Nothing was removed. `lading rm {name} --yes` deletes it (in Python `hub=True`)."
    )


def _known_as(uri: str, store: AssetStore, held: Sequence[LocalCheckpoint]) -> str | None:
    """Return the URI of the checkpoint that ``du`` shows as ``uri``; ``None`` for no checkpoint, or one of several.

    ``du`` does not show the secrets of an address.
    """
    if store.checkpoint(uri) is not None:
        return uri
    found = [checkpoint.uri for checkpoint in held if shown_uri(checkpoint.uri) == uri]

    return found[0] if len(found) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The files of a checkpoint to remove, and those that stay."""

    cache: Cache
    entry: str
    digests: tuple[str, ...]
    """The SHA-256 of files in lading's cache to remove."""
    needed: frozenset[str]
    """The SHA-256 of files that other checkpoints need."""
    revisions: tuple[HubRevision, ...]
    made: tuple[Path, ...]
    """The rewrites of other files in lading's cache."""
    paths: tuple[Path, ...]
    kept: tuple[SkippedFile, ...]

    def carry_out(self, *, dry_run: bool) -> int:
        """Remove the files and return the number of freed bytes."""
        if dry_run:
            removable = self.cache.removable(self.entry, also=self.digests, keep=self.needed)
            return _bytes([*removable, *self.made]) + delete_revisions(self.revisions, dry_run=True)

        freed = self.cache.remove(self.entry, also=self.digests, keep=self.needed) + delete_revisions(self.revisions)

        return freed + _remove(self.made)


def _plan(uri: str, entry: str, held: Sequence[LocalCheckpoint], cache: Cache, look: Callable[[Path], _Place]) -> _Plan:
    copies = [copy for checkpoint in held if checkpoint.uri == uri for copy in checkpoint.copies]
    by_name = {copy.path: shown_uri(each.uri) for each in held if each.uri != uri for copy in each.copies}
    places = {path: look(path) for path in by_name}
    others = {places[path].real: other for path, other in by_name.items()}
    needed = frozenset(place.digest for place in places.values() if place.digest is not None)
    revisions_of_others = {
        revision: other for path, other in by_name.items() if (revision := places[path].revision) is not None
    }

    digests: list[str] = []
    revisions: set[HubRevision] = set()
    made: list[Path] = []
    kept: list[SkippedFile] = []
    for copy in copies:
        digest, other = _digest(cache, copy.path), others.get(os.path.realpath(copy.path))
        # Bytes of another source may be there, too: they are not a reason to delete a revision.
        revision = revision_of(copy.path) if uri.startswith(SCHEMES) else None
        if revision is not None:
            other = revisions_of_others.get(revision)
        if not os.path.lexists(copy.path) and copy.kind not in ("cache", "hub"):
            continue
        if copy.kind == "cache" and digest is not None and other is None:
            digests.append(digest)
        elif revision is not None and other is None:
            revisions.add(revision)
        elif is_rewritten(copy.path, cache.folder) and other is None:
            made.append(copy.path)
        elif os.path.lexists(copy.path):  # in a cache of another catalog, it may be gone
            kept.append(SkippedFile(path=copy.path, reason=_reason(copy, other)))

    # The entry in the cache may have files that the catalog lacks: those of an interrupted download.
    removable = cache.removable(entry, also=digests, keep=needed)
    kept += [
        SkippedFile(path=copy.path, reason="fetched for another address or by another catalog, too")
        for copy in copies
        if copy.kind == "cache" and _digest(cache, copy.path) in set(digests) - {path.name[:64] for path in removable}
        if os.path.lexists(copy.path)
    ]
    paths = [*removable, *(path for revision in sorted(revisions) for path in revision.files()), *made]

    return _Plan(
        cache=cache,
        entry=entry,
        digests=tuple(digests),
        needed=needed,
        revisions=tuple(revision for revision in sorted(revisions) if revision.path.is_dir()),
        made=tuple(made),
        paths=tuple(path for path in paths if os.path.lexists(path)),
        kept=tuple(kept),
    )


class _Place(NamedTuple):
    """The place of a file, looked up once: each removal compares its files with those of all other checkpoints."""

    real: str
    digest: str | None
    """The SHA-256 of a file in lading's cache."""
    revision: HubRevision | None


def _looking(cache: Cache) -> Callable[[Path], _Place]:
    """Return a function that looks up the place of a file once."""

    @functools.cache
    def look(path: Path) -> _Place:
        real = os.path.realpath(path)
        return _Place(real=real, digest=_digest(cache, Path(real)), revision=revision_of(path))

    return look


def _digest(cache: Cache, path: Path) -> str | None:
    return cache.digest_of(path) or cache.digest_of(Path(os.path.realpath(path)))


def _reason(copy: LocalCopy, other: str | None) -> str:
    match copy.kind:
        case "source":
            return "the card's own file"
        case "adopted":
            return _ADOPTED
        case _ if other is not None:
            return f"a file of {other}, too"
        case _:
            return "not in a cache that lading knows; LADING_CACHE_DIR or HF_HUB_CACHE may name another one"
