"""Files taken out of huggingface_hub's cache: those of one model, and nothing else of its snapshot.

huggingface_hub itself removes whole commits, with what other programs fetched of them, and looks at the whole cache for
it. Here only the files that were named are removed, by operations that cannot leave the folder of their repository:
each folder is opened from the one above it, and no link is followed.

First the blob goes, then the link to it. A link that leads nowhere is no file to any program, and is found again when
the process dies in between; a blob without link would be found by nobody.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lading.fetch.hf_cache import hub_cache, repository_id
from lading.fetch.hf_names import is_commit, is_file_name

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_DEPTH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFile:
    """A file of a snapshot in the cache."""

    repository: Path
    """The folder of its repository."""
    name: str
    """Below that folder: ``snapshots/COMMIT/…``."""

    @property
    def commit(self) -> str:
        return self.name.split("/")[1]


def snapshot_file(path: Path) -> SnapshotFile | None:
    """The file of a snapshot that ``path`` is by its name; ``None`` for any other, and for one of another cache."""
    for cache in (hub_cache(), hub_cache().resolve()):
        if not path.is_relative_to(cache):
            continue
        folder, *rest = path.relative_to(cache).parts
        name = "/".join(rest)
        if (
            repository_id(Path(folder)) is not None
            and len(rest) > 2
            and rest[0] == "snapshots"
            and is_commit(rest[1])
            and is_file_name(name)
        ):
            return SnapshotFile(repository=cache / folder, name=name)

    return None


def remove_files(files: Sequence[SnapshotFile], *, dry_run: bool = False) -> int:
    """Remove files, and the blobs that no other file of their repositories is a link to.

    What is gone already is no error. Folders that get empty go, too, and so does what named a commit of which nothing
    is left.

    :param dry_run: only say what would be freed.

    :returns: the bytes that were freed.
    :raises OSError: a file cannot be removed.
    """
    freed = 0
    for repository in dict.fromkeys(file.repository for file in files):
        mine = [file for file in files if file.repository == repository]
        try:
            with _opened(repository) as folder:
                freed += _remove(folder, mine, dry_run=dry_run)
                if not dry_run:
                    _tidy(folder, {file.commit for file in mine})
        except FileNotFoundError:
            continue
        except OSError as error:
            # What was opened from a folder is named from there on.
            error.filename = str(repository / (error.filename or ""))
            raise
        if not dry_run:
            _remove_empty(repository)

    return freed


def _remove(repository: int, files: Sequence[SnapshotFile], *, dry_run: bool) -> int:
    names = {file.name for file in files}
    others = {blob for name in _links(repository) if name not in names if (blob := _blob(repository, name))}

    freed = 0
    for name in sorted(names):
        blob = _blob(repository, name)
        if blob is not None and blob not in others:
            freed += _unlink(repository, blob, dry_run=dry_run)
            others.add(blob)  # two names of one content count once
        freed += _unlink(repository, name, dry_run=dry_run)

    return freed


def _unlink(repository: int, name: str, *, dry_run: bool) -> int:
    """Remove a file or a link; returns the bytes that were freed."""
    *folders, last = name.split("/")
    try:
        with _below(repository, folders) as folder:
            found = os.stat(last, dir_fd=folder, follow_symlinks=False)
            if not dry_run:
                os.unlink(last, dir_fd=folder)
    except FileNotFoundError:
        return 0
    except OSError as error:
        error.filename = name
        raise

    # A blob that is a link is one of those that repositories share: huggingface_hub keeps the books of them.
    return found.st_size if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 else 0


def _blob(repository: int, name: str) -> str | None:
    """The blob that a name in a snapshot is a link to, below the folder of the repository."""
    *folders, last = name.split("/")
    try:
        with _below(repository, folders) as folder:
            target = os.readlink(last, dir_fd=folder)
    except OSError:  # it is gone, or no link
        return None
    found = posixpath.normpath(posixpath.join(*folders, target))

    return found if posixpath.dirname(found) == "blobs" else None


def _links(repository: int) -> Iterator[str]:
    """The names of all that is no folder in any snapshot."""
    left = ["snapshots"]
    while left:
        at = left.pop()
        try:
            with _below(repository, at.split("/")) as folder, os.scandir(folder) as entries:
                listed = [(f"{at}/{entry.name}", entry.is_dir(follow_symlinks=False)) for entry in entries]
        except (FileNotFoundError, NotADirectoryError):
            continue
        for name, is_folder in listed:
            if not is_folder:
                yield name
            elif name.count("/") < _DEPTH:
                left.append(name)


# --- folders ---------------------------------------------------------------------------------------------------------


def _tidy(repository: int, commits: set[str]) -> None:
    """Remove the empty folders of snapshots, and what names those that are gone."""
    for commit in commits:
        if _remove_tree(repository, ["snapshots", commit], files=False):
            _remove_tree(repository, [".no_exist", commit], files=True)
            _remove_refs(repository, ["refs"], commit)


def _remove_tree(repository: int, folders: list[str], *, files: bool) -> bool:
    """Remove a folder, if it is empty or holds only empty folders; returns whether it is gone.

    :param files: whether files of no bytes count as nothing, too.
    """
    try:
        with _below(repository, folders) as folder, os.scandir(folder) as entries:
            listed = list(entries)
            for entry in listed:
                if entry.is_dir(follow_symlinks=False):
                    _remove_tree(repository, [*folders, entry.name], files=files)
                elif files and entry.stat(follow_symlinks=False).st_size == 0:
                    os.unlink(entry.name, dir_fd=folder)
        with _below(repository, folders[:-1]) as above:
            os.rmdir(folders[-1], dir_fd=above)
    except FileNotFoundError:
        return True
    except OSError:  # something is in it, or it is no folder
        return False

    return True


def _remove_refs(repository: int, folders: list[str], commit: str) -> None:
    """Remove the names of a commit of which nothing is left: to huggingface_hub, they would be damage."""
    with suppress(FileNotFoundError, NotADirectoryError), _below(repository, folders) as folder:
        with os.scandir(folder) as entries:
            listed = list(entries)
        for entry in listed:
            if entry.is_dir(follow_symlinks=False):
                _remove_refs(repository, [*folders, entry.name], commit)
            elif entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_size <= 41:
                fd = os.open(entry.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
                with open(fd, "rb") as file:
                    named = file.read(41).strip() == commit.encode()
                if named:
                    os.unlink(entry.name, dir_fd=folder)


def _remove_empty(repository: Path) -> None:
    """Remove the folder of a repository in which nothing is left."""
    try:
        with _opened(repository) as folder:
            if next(_links(folder), None) is not None or not _remove_tree(folder, ["blobs"], files=False):
                return
            for name in ("refs", ".no_exist", "snapshots"):
                _remove_tree(folder, [name], files=False)
        repository.rmdir()
    except OSError:  # something is in it: it stays
        return


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, _FOLDER)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _below(folder: int, names: Sequence[str]) -> Iterator[int]:
    """A folder below another one, opened step by step: none of the steps may be a link."""
    fd = os.dup(folder)
    try:
        for name in names:
            fd, above = os.open(name, _FOLDER, dir_fd=fd), fd
            os.close(above)
        yield fd
    finally:
        os.close(fd)
