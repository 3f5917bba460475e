"""The search for checkpoints in a folder, at any depth, and for their files, mostly by their names.

A folder that a user names may hold anything. No link to a folder is followed; a link to a file is, where it lies right
in the folder that was named, leads to a place inside it, or is one of those of which a Hugging Face cache consists.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lading.errors import CheckpointNotFoundError, LadingError, PolicyError
from lading.formats.config_json import CONFIG_NAME
from lading.formats.files import open_file
from lading.formats.first_bytes import SIZE, is_checkpoint
from lading.formats.folder import (
    BIN_INDEX_NAME,
    BIN_NAME,
    FILE_NAME,
    INDEX_NAME,
    checkpoint_file,
    is_checkpoint_file,
    is_index,
    is_other_format,
    is_torch_format,
    some,
    without_index,
)
from lading.formats.rank_parts import consolidated_parts, fairseq2_parts, is_consolidated, is_fairseq2_sharded
from lading.formats.shard_index import read_index
from lading.sources.hub.address import is_commit
from lading.sources.hub.cache import repository_id


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """A folder or a file that may be a checkpoint, or a folder with several commits of a repository."""

    path: Path
    root: Path
    """The folder that the user named."""
    repo: str | None = None
    """The id of a repository, whose folder in a Hugging Face cache ``path`` is."""
    commit: str | None = None
    """The only commit of it that was asked for."""
    problem: OSError | None = None
    """Why nothing can be said of it."""


def find_places(root: Path) -> Iterator[FoundCheckpoint]:
    """The folders below ``root``, itself included, that hold a checkpoint by what they list; in the order of names.

    Files of ``torch.save`` under other names than the usual ones are a checkpoint each, and so are files whose names
    have no suffix and whose first bytes are those of a checkpoint.

    :param root: an absolute path.
    """
    snapshots = root.parent
    if is_commit(root.name) and snapshots.name == "snapshots" and (repo := repository_id(snapshots.parent)):
        yield FoundCheckpoint(path=snapshots.parent, root=root, repo=repo, commit=root.name)
        return

    yield from _places(root, root)


def hub_places(cache: Path) -> Iterator[FoundCheckpoint]:
    """The folders of repositories of models in a Hugging Face cache."""
    folders, _, _ = _listed(cache)
    for folder in folders:
        repo = repository_id(folder)
        if repo is not None:
            yield FoundCheckpoint(path=folder, root=cache, repo=repo)


def _places(path: Path, root: Path) -> Iterator[FoundCheckpoint]:
    # Not by recursion: how deep the folders are is the user's matter.
    left = [path]
    while left:
        path = left.pop()
        repo = repository_id(path)
        if repo is not None and (path / "snapshots").is_dir():
            yield FoundCheckpoint(path=path, root=root, repo=repo)
            continue
        folders, names, problem = _listed(path)
        if problem is not None:
            yield FoundCheckpoint(path=path, root=root, problem=problem)
            continue
        if is_fairseq2_sharded([folder.name for folder in folders]):
            yield FoundCheckpoint(path=path, root=root)
            folders = [folder for folder in folders if not folder.name.startswith("pp_")]
        else:
            yield from _in_folder(path, root, names)
        left += reversed(folders)


def _in_folder(path: Path, root: Path, names: list[str]) -> Iterator[FoundCheckpoint]:
    """The checkpoints in a folder, by the names of its files."""
    # Without a suffix, the first bytes tell: one small read, of files that no link leads to.
    bare = [name for name in names if "." not in name and _is_checkpoint(path / name)]
    found = [name for name in names if is_checkpoint_file(name) or name in bare]
    torch = [name for name in found if is_torch_format(name) or name in bare]
    usual = not {BIN_INDEX_NAME, BIN_NAME}.isdisjoint(names) or is_consolidated(names)
    if torch and not usual and all(name in torch or is_other_format(name) for name in found):
        # What an index names are its parts.
        for name in [name for name in torch if is_index(name)] or torch:
            yield FoundCheckpoint(path=path / name, root=root)
    elif found:
        yield FoundCheckpoint(path=path, root=root)


def _is_checkpoint(path: Path) -> bool:
    try:
        if path.is_symlink():
            return False
        with open_file(path) as file:
            return is_checkpoint(file.read(0, SIZE))
    except (LadingError, OSError):
        return False


def _listed(path: Path) -> tuple[list[Path], list[str], OSError | None]:
    """The folders in a folder, the names of all else, and why there are none."""
    try:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        return [], [], error

    folders = [Path(entry.path) for entry in listed if entry.is_dir(follow_symlinks=False)]

    return folders, [entry.name for entry in listed if not entry.is_dir(follow_symlinks=False)], None


def require_inside(path: Path, place: FoundCheckpoint) -> None:
    """See to it that the files of which the checkpoint at ``path`` is are ones that its place may have.

    :param path: a folder, a file, or an index.

    :raises PolicyError: a link leads elsewhere.
    :raises CheckpointNotFoundError: no checkpoint is there (also a ``FileNotFoundError``).
    :raises NotSupportedError: it is of a format that is not read here.
    :raises CorruptModelCheckpointError: its index breaks the rules of the format.
    """
    bounds = _Bounds(place)
    # A link that the user named is followed.
    folder = path if path.is_dir() and (path == place.root or not path.is_symlink()) else path.parent
    _require_no_links_between(folder, place)
    bounds.check(folder / CONFIG_NAME)
    for file in _files(path, folder):
        if file.parent != folder:
            _require_no_links_between(file.parent, place)
        bounds.check(file)
        if is_index(file.name):
            with open_file(file) as opened:
                names = list(read_index(opened).tensors)
            for name in names:
                bounds.check(folder / name)


def _files(path: Path, folder: Path) -> list[Path]:
    """The files by which the checkpoint at ``path`` is read."""
    if path != folder:
        return [path]
    names = [entry.name for entry in path.iterdir()]
    if not {INDEX_NAME, FILE_NAME} & set(names):
        if is_consolidated(names):
            return [path / name for name, _ in consolidated_parts(path)]
        if is_fairseq2_sharded(names):
            return [path / name for name, _ in fairseq2_parts(path)]

    _require_usual_name(path, names)

    return [path / checkpoint_file(names, where=path, torch=True)]


def _require_usual_name(path: Path, names: list[str]) -> None:
    found = [name for name in names if is_checkpoint_file(name) and not is_other_format(name)]
    if found and not {INDEX_NAME, FILE_NAME, BIN_INDEX_NAME, BIN_NAME} & set(names):
        raise CheckpointNotFoundError(
            path,
            without_index(path, found)
            or f"{path}: expected {INDEX_NAME} or {FILE_NAME}, by which a folder is adopted, found "
            f"{some(sorted(found))}. Give one of these to `lading index` by its path, or name it as the `checkpoint` "
            "of a card of your own.",
        )


def _require_no_links_between(folder: Path, place: FoundCheckpoint) -> None:
    for part in (folder, *folder.parents):
        if part in (place.path, place.root):
            return
        if part.is_symlink():
            raise PolicyError(f"{part} is a link to a folder, which is not followed. Give the path that it leads to.")


class _Bounds:
    """Where the links of a place may lead."""

    def __init__(self, place: FoundCheckpoint) -> None:
        self._root = place.root
        # Blobs lie beside the snapshots, or are themselves links to those that all repositories of a cache share.
        home = os.path.realpath(place.root if place.repo is None else place.path)
        allowed = [home] if place.repo is None else [f"{home}/blobs", f"{os.path.dirname(home)}/blobs"]
        self._allowed = tuple(folder + os.sep for folder in allowed)

    def check(self, path: Path) -> None:
        """:raises PolicyError: ``path`` is a link that leads elsewhere."""
        try:
            if not stat.S_ISLNK(os.lstat(path).st_mode):
                return
        except OSError:
            return  # whoever reads it says it better
        real = os.path.realpath(path)
        if real.startswith(self._allowed) or (path.parent == self._root and Path(real).is_file()):
            return

        raise PolicyError(
            f"{path} is a link that leads out of {self._root}, to {real}; it is not followed. Give the folder that "
            "holds the file, or name it in a card of your own."
        )
