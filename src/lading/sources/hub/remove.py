"""Revisions and files taken out of huggingface_hub's cache by huggingface_hub itself, to which the cache belongs.

What no other revision needs goes with a revision, also what other programs fetched of it.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lading.sources.hub.address import is_commit
from lading.sources.hub.cache import hub_cache, repository_id, snapshot_files

if TYPE_CHECKING:
    from huggingface_hub import HFCacheInfo


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HubRevision:
    """A commit of a repository in the cache."""

    repo: str
    """The id of the repository."""
    commit: str
    path: Path
    """The folder of its snapshot."""

    def files(self) -> list[Path]:
        """Return the files of it that are there."""
        return [self.path / file.name for file in snapshot_files(self.path)]


def revision_of(path: Path) -> HubRevision | None:
    """Return the revision of a file, by its path; ``None`` for a file that is in no snapshot of the cache."""
    for cache in (hub_cache(), hub_cache().resolve()):
        if not path.is_relative_to(cache):
            continue
        folder, *rest = path.relative_to(cache).parts or ("",)
        repo = repository_id(Path(folder))
        if repo is not None and ".." not in rest and len(rest) > 2 and rest[0] == "snapshots" and is_commit(rest[1]):
            return HubRevision(repo=repo, commit=rest[1], path=cache.joinpath(folder, *rest[:2]))

    return None


def delete_revisions(revisions: Sequence[HubRevision], *, dry_run: bool = False) -> int:
    """Delete revisions by huggingface_hub's ``delete_revisions``; those that are gone are passed over.

    :param dry_run: only say what would be freed.

    :returns: the bytes that are freed.
    :raises OSError: one cannot be deleted, or huggingface_hub does not find it, as its repository is damaged.
    """
    there = [revision for revision in revisions if revision.path.is_dir()]
    if not there:
        return 0

    info, freed = _scanned(), 0
    for folder in dict.fromkeys(revision.path.parent.parent for revision in there):
        commits = [revision.commit for revision in there if revision.path.parent.parent == folder]
        # Of one repository at a time: commits of two may have one name, in copies of a cache.
        repos = frozenset(repo for repo in info.repos if repo.repo_path.resolve() == folder.resolve())
        found = {revision.commit_hash for repo in repos for revision in repo.revisions}
        if missing := [commit for commit in commits if commit not in found]:
            reasons = "; ".join(str(warning) for warning in info.warnings if str(folder.resolve()) in str(warning))
            raise OSError(
                errno.EIO,
                f"huggingface_hub does not find the revision, so it cannot delete it ({reasons or 'no reason given'})",
                str(folder / "snapshots" / missing[0]),
            )
        strategy = replace(info, repos=repos).delete_revisions(*commits)
        if outside := [blob for blob in strategy.blobs if not blob.is_relative_to(folder.resolve())]:
            # A link in a snapshot may lead anywhere, and huggingface_hub deletes what it leads to.
            raise OSError(errno.EPERM, "a link in the repository leads to this file outside of it", str(outside[0]))
        freed += strategy.expected_freed_size
        if not dry_run:
            strategy.execute()

    left = [revision.path for revision in there if not dry_run and revision.path.exists()]
    if left:  # huggingface_hub only logs it
        raise PermissionError(errno.EACCES, "huggingface_hub could not delete the revision", str(left[0]))

    return freed


def delete_file(path: Path) -> None:
    """Delete a file of a snapshot by huggingface_hub's ``delete_files``, where this version has that.

    What a link leads to outside of the repository stays.
    """
    info, path = _scanned(), path.parent.resolve() / path.name  # the scan resolves the folder of the cache
    for repo in info.repos:
        files = [file for revision in repo.revisions for file in revision.files if file.file_path == path]
        if files and hasattr(info, "delete_files"):
            strategy = info.delete_files(*files)
            if all(blob.is_relative_to(repo.repo_path) for blob in strategy.blobs):
                strategy.execute()


def _scanned() -> HFCacheInfo:
    from huggingface_hub import scan_cache_dir

    return scan_cache_dir(hub_cache().resolve())
