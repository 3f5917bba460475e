"""Search for checkpoints and their files in a folder, at any depth, mostly by name.

The content of a folder that a user names is not trusted. Links to folders are not followed. Links to files are followed
only if they are directly in that folder, lead to a file inside it, or belong to the layout of a Hugging Face cache.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lading.errors import CheckpointNotFoundError, LadingError, NotSupportedError, PolicyError
from lading.formats.artifacts import Artifact, ArtifactFiles, artifact_files, quantized_artifact, read_artifact
from lading.formats.config_json import CONFIG_NAME, QUANTIZATION_NAMES, quantization_of, read_hf_config
from lading.formats.files import open_file
from lading.formats.first_bytes import SIZE, is_checkpoint
from lading.formats.folder import (
    BIN_INDEX_NAME,
    BIN_NAME,
    DISTRIBUTED_SUFFIX,
    FILE_NAME,
    INDEX_NAME,
    METADATA_NAME,
    checkpoint_file,
    is_checkpoint_file,
    is_distributed,
    is_index,
    is_other_format,
    is_torch_format,
    is_training_state,
    some_names,
    without_index,
)
from lading.formats.gguf import GGUF
from lading.formats.local import index
from lading.formats.rank_parts import is_consolidated, is_fairseq2_sharded, part_files
from lading.formats.shard_index import read_index
from lading.sources.hub.address import is_commit
from lading.sources.hub.cache import repository_id
from lading.system.uris import path_uri

_USUAL = {INDEX_NAME, FILE_NAME, BIN_INDEX_NAME, BIN_NAME}
"""The names by which a folder is a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundCheckpoint:
    """A folder or a file that may be a checkpoint or an artifact, or a folder with several commits of a repository."""

    path: Path
    root: Path
    """The folder that the user named."""
    repo: str | None = None
    """The id of a repository, if ``path`` is its folder in a Hugging Face cache."""
    commit: str | None = None
    """The commit of the repository to use, if the user named its snapshot."""
    artifact: ArtifactFiles | None = None
    """The files of the artifact that it may be, which is then no checkpoint that lading loads."""
    problem: OSError | None = None
    """The error, if the folder cannot be read."""


def find_checkpoints(root: Path, *, depth: int | None = None) -> Iterator[FoundCheckpoint]:
    """Yield the checkpoints and the artifacts in ``root`` and the folders below it, in the order of names; or ``root``,
    if it is a file.

    ``torch.save`` files without a usual name are a checkpoint each, and so are files without a suffix whose first bytes
    are those of a checkpoint. A folder that is an artifact as a whole is not searched.

    :param root: an absolute path without links: a link to a folder is followed only if the user named it.
    :param depth: the number of levels of folders to search below ``root``; default: all.
    """
    if not root.is_dir():
        artifact = next(iter(artifact_files(root.parent, [root.name])), None)
        yield FoundCheckpoint(path=root, root=root.parent, artifact=artifact)
        return
    snapshots = root.parent
    if is_commit(root.name) and snapshots.name == "snapshots" and (repo := repository_id(snapshots.parent)):
        yield FoundCheckpoint(path=snapshots.parent, root=root, repo=repo, commit=root.name)
        return

    yield from _places(root, root, depth)


def find_at(path: Path) -> FoundCheckpoint:
    """Return what is at a path itself: a checkpoint or an artifact, a folder or a file."""
    found = next((each for each in find_checkpoints(path, depth=0) if each.path == path), None)

    return found or FoundCheckpoint(path=path, root=path)


def find_hub_repositories(cache: Path) -> Iterator[FoundCheckpoint]:
    """Yield the folders of model repositories in a Hugging Face cache."""
    folders, _, _ = _list_folder(cache)
    for folder in folders:
        repo = repository_id(folder)
        if repo is not None:
            yield FoundCheckpoint(path=folder, root=cache, repo=repo)


def find_in_snapshot(snapshot: Path) -> Iterator[FoundCheckpoint]:
    """Yield the checkpoints and the artifacts in a snapshot of a repository, and the folders below it."""
    yield from _places(snapshot, snapshot, None)


def _places(path: Path, root: Path, depth: int | None) -> Iterator[FoundCheckpoint]:
    # An explicit stack, as folders may be nested deeper than Python's recursion limit.
    left = [(path, 0)]
    while left:
        path, level = left.pop()
        repo = repository_id(path)
        if repo is not None and (path / "snapshots").is_dir():
            yield FoundCheckpoint(path=path, root=root, repo=repo)
            continue
        folders, names, problem = _list_folder(path)
        if problem is not None:
            yield FoundCheckpoint(path=path, root=root, problem=problem)
            continue
        names = [name for name in names if not is_training_state(name)]
        artifacts = artifact_files(path, names)
        for artifact in artifacts:
            yield FoundCheckpoint(path=artifact.path, root=root, artifact=artifact)
        if any(artifact.whole for artifact in artifacts):
            continue
        if is_fairseq2_sharded([folder.name for folder in folders]):
            yield FoundCheckpoint(path=path, root=root)
            folders = [folder for folder in folders if not folder.name.startswith("pp_")]
        else:
            taken = {name for artifact in artifacts for name in artifact.names}
            if any(artifact.path == path for artifact in artifacts):
                # Beside an adapter are states of its training.
                taken |= {name for name in names if name not in _USUAL}
            yield from _in_folder(path, root, [name for name in names if name not in taken])
        if level != depth:
            left += ((folder, level + 1) for folder in reversed(folders))


def _in_folder(path: Path, root: Path, names: list[str]) -> Iterator[FoundCheckpoint]:
    """Yield the checkpoints in a folder, by the names of its files."""
    # Files without a suffix are recognized by their first bytes, with one small read; links are not followed.
    heads = {name: _head(path / name) for name in names if "." not in name}
    for name in (name for name, head in heads.items() if head.startswith(GGUF)):
        artifact = ArtifactFiles(kind="gguf", folder=path, names=(name,))
        yield FoundCheckpoint(path=artifact.path, root=root, artifact=artifact)
    bare = [name for name, head in heads.items() if is_checkpoint(head)]
    found = [name for name in names if is_checkpoint_file(name) or name in bare]
    torch = [name for name in found if is_torch_format(name) or name in bare]
    ranks = is_distributed(names)
    usual = not {BIN_INDEX_NAME, BIN_NAME}.isdisjoint(names) or is_consolidated(names) or ranks
    if torch and not usual and torch == found:
        # The files that an index names are not checkpoints of their own.
        for name in [name for name in torch if is_index(name)] or torch:
            yield FoundCheckpoint(path=path / name, root=root)
    elif found or ranks:
        yield FoundCheckpoint(path=path, root=root)


def _head(path: Path) -> bytes:
    """Return the first bytes of a file; empty if it is a link, or cannot be read."""
    try:
        if path.is_symlink():
            return b""
        with open_file(path) as file:
            return file.read(0, SIZE)
    except (LadingError, OSError):
        return b""


def _list_folder(path: Path) -> tuple[list[Path], list[str], OSError | None]:
    """Return the folders in a folder, the names of its other entries, and the error if it cannot be read."""
    try:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        return [], [], error

    folders = [Path(entry.path) for entry in listed if entry.is_dir(follow_symlinks=False)]

    return folders, [entry.name for entry in listed if not entry.is_dir(follow_symlinks=False)], None


def storable_uri(path: Path) -> str:
    """Return the URI of a path.

    :raises NotSupportedError: the path is not valid Unicode, so the catalog cannot store it.
    """
    uri = path_uri(path)
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise NotSupportedError(f"{str(path)!r} is not valid Unicode. Rename it, as the catalog stores text.") from None

    return uri


def artifact_at(
    path: Path, place: FoundCheckpoint, files: ArtifactFiles | None = None, *, restrict: bool = True
) -> Artifact | None:
    """Return the artifact at a path; ``None`` if a checkpoint that lading loads may be there.

    :param place: the place that links may not leave.
    :param files: the files of an artifact, if the search recognized it by their names.
    :param restrict: as :func:`lading.formats.index` takes it.

    :raises PolicyError: a link among the files leads out of the place.
    :raises CheckpointNotFoundError: nothing is there that lading recognizes (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: it is damaged, or is not what the names of the files say.
    :raises NotSupportedError: it is quantized, and its tensors cannot be read.
    :raises OSError: it cannot be read.
    """
    if files is not None:
        paths = files.paths()
        require_inside(paths, place)
        return read_artifact(files.kind, paths)

    weights = _only_weights(path)
    require_links_inside(weights, place)
    scheme = quantization_of(read_hf_config(path))
    if scheme is not None:
        return quantized_artifact(scheme, index(weights, restrict=restrict))
    if weights != path:
        require_links_inside(path, place)  # weights that are not quantized need a usual name

    return None


def _only_weights(path: Path) -> Path:
    """Return the only safetensors file of a folder without one of a usual name, as quantized weights may have another;
    else the path itself.
    """
    names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    found = [name for name in names if name.endswith(".safetensors")]

    return path / found[0] if len(found) == 1 and not _USUAL & set(names) else path


def require_links_inside(path: Path, place: FoundCheckpoint) -> None:
    """Require that no link among the files of the checkpoint at ``path`` leads out of its place.

    :param path: a folder, a file, or an index.

    :raises PolicyError: a link leads out of the place.
    :raises CheckpointNotFoundError: no checkpoint is there (also a ``FileNotFoundError``).
    :raises NotSupportedError: its format is not supported.
    :raises CorruptModelCheckpointError: its index breaks the rules of the format.
    """
    folder = path if path.is_dir() and not path.is_symlink() else path.parent
    _require_no_links_between(folder, place)
    for name in (CONFIG_NAME, *QUANTIZATION_NAMES):
        _require_inside(folder / name, place)
    for file in _files(path, folder):
        require_inside([file], place)
        if is_index(file.name):
            with open_file(file) as opened:
                names = list(read_index(opened).tensors)
            for name in names:
                _require_inside(folder / name, place)


def require_inside(paths: Iterable[Path], place: FoundCheckpoint) -> None:
    """Require that none of ``paths`` is a link that leads out of a place, or is in a folder that is one.

    :raises PolicyError: one is.
    """
    for path in paths:
        _require_no_links_between(path.parent, place)
        _require_inside(path, place)


def _files(path: Path, folder: Path) -> list[Path]:
    """Return the files that a reader of the checkpoint at ``path`` opens first."""
    if path != folder:
        return [path]
    names = [entry.name for entry in path.iterdir()]
    if not {INDEX_NAME, FILE_NAME} & set(names) and (parts := part_files(path, names)):
        return [path / name for name, _ in parts]
    if not {INDEX_NAME, FILE_NAME} & set(names) and is_distributed(names):
        return [path / name for name in names if name == METADATA_NAME or name.endswith(DISTRIBUTED_SUFFIX)]

    _require_usual_name(path, names)

    return [path / checkpoint_file(names, where=path, torch=True)]


def _require_usual_name(path: Path, names: list[str]) -> None:
    found = [name for name in names if is_checkpoint_file(name) and not is_other_format(name)]
    if found and not _USUAL & set(names):
        raise CheckpointNotFoundError(
            path,
            without_index(path, found)
            or f"{path}: expected {INDEX_NAME} or {FILE_NAME}, without which a folder is not adopted, found "
            f"{some_names(sorted(found))}. Give one of these to `lading index` by its path, or name it as the "
            "`checkpoint` of a card of your own.",
        )


def _require_no_links_between(folder: Path, place: FoundCheckpoint) -> None:
    for part in (folder, *folder.parents):
        if part in (place.path, place.root):
            return
        if part.is_symlink():
            raise PolicyError(f"{part} is a link to a folder, which is not followed. Give the path of its target.")


def _require_inside(path: Path, place: FoundCheckpoint) -> None:
    """Require that a path, if it is a link, does not lead out of a place."""
    try:
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            return
    except OSError:
        return  # the reader of the file reports it
    # Blobs are next to the snapshots, or are links to the blobs that all repositories of the cache share.
    home = os.path.realpath(place.root if place.repo is None else place.path)
    allowed = (f"{home}/",) if place.repo is None else (f"{home}/blobs/", f"{os.path.dirname(home)}/blobs/")
    real = os.path.realpath(path)
    if real.startswith(allowed) or (path.parent == place.root and Path(real).is_file()):
        return

    raise PolicyError(
        f"{path} is a link that leads out of {place.root}, to {real}; it is not followed. Give the folder that holds "
        "the file, or name it in a card of your own."
    )
