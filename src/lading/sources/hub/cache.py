"""The cache that Hugging Face's libraries share, read without them and without a socket.

Its layout: ``models--ORG--NAME/refs/REVISION`` holds a commit, ``snapshots/COMMIT/…`` the files under their names,
mostly as links to ``blobs/ETAG``, where the tag is the SHA-256 of a large file and the git id of a small one.
https://huggingface.co/docs/huggingface_hub/guides/manage-cache

Other programs write to the folder, too. So lading uses only regular files in it, and ignores links that lead out.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from lading.sources.hub.address import is_commit, is_file_name, is_repo_id, is_sha256
from lading.sources.source import RemoteFile
from lading.system.filesystem import expand_home, storage_path

_PREFIX = "models--"
_DEPTH = 16
_LISTED = 100_000
"""The most files of one snapshot that lading looks at; no repository has more."""


def hub_cache() -> Path:
    """Return the folder of the cache: ``HF_HUB_CACHE``, else ``hub`` in ``HF_HOME``.

    huggingface_hub reads the environment at import; what it found then holds for the rest of the process.
    """
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return storage_path(str(constants.HF_HUB_CACHE))

    env = os.environ
    found = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{_home()}/hub"

    return storage_path(os.path.expandvars(found))


def _home() -> str:
    env = os.environ

    return env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"


def has_token() -> bool:
    """Return whether the user has a token for the hub: in ``HF_TOKEN``, or in the file of huggingface_hub's login."""
    env = os.environ
    if (env.get("HF_TOKEN") or env.get("HUGGING_FACE_HUB_TOKEN") or "").strip():
        return True
    path = expand_home(os.path.expandvars(env.get("HF_TOKEN_PATH") or f"{_home()}/token"))

    return path.is_file()


def folder_name(repo: str) -> str:
    """Return the name of a repository's folder in the cache."""
    return _PREFIX + repo.replace("/", "--")


def repository_id(folder: Path) -> str | None:
    """Return the id of the repository that a folder of a cache holds, by its name; ``None`` for any other folder."""
    repo = folder.name.removeprefix(_PREFIX).replace("--", "/")

    return repo if folder.name.startswith(_PREFIX) and is_repo_id(repo) else None


def repository_folders(*repos: str) -> list[tuple[str, Path]]:
    """Return the id and the folder of each repository with one of these ids, ignoring case; exact matches first."""
    wanted = {folder_name(repo).casefold() for repo in repos}
    found = [(repo, path) for repo, path in _folders() if path.name.casefold() in wanted]
    found.sort(key=lambda item: (item[0] not in repos, item[0]))

    return found


def snapshot_folders(folder: Path) -> list[Path]:
    """Return the snapshots in a repository's folder."""
    entries = sorted(_entries(folder / "snapshots"), key=lambda entry: entry.name)

    return [Path(entry.path) for entry in entries if is_commit(entry.name) and entry.is_dir(follow_symlinks=False)]


def snapshot_files(path: Path) -> tuple[RemoteFile, ...]:
    """Return the files in the folder of a snapshot, in the order of their names.

    Their digests and entity tags are those that the hub published when the files were fetched.
    """
    root = os.path.realpath(hub_cache())
    found: list[RemoteFile] = []
    for name in _names(path, "", _DEPTH):
        if len(found) == _LISTED:
            break
        seen = _regular(path / name, root)
        if seen is not None:
            tag = blob_tag(path / name)
            sha256 = tag if tag is not None and is_sha256(tag) else None
            found.append(RemoteFile(name=name, size=seen.st_size, sha256=sha256, etag=tag and f'"{tag}"'))

    return tuple(sorted(found, key=lambda file: file.name))


def cached_file(folder: Path, commit: str, name: str) -> Path | None:
    """Return the path of a file of a commit in a repository's folder; ``None`` if missing or outside of the cache."""
    if not is_commit(commit) or not is_file_name(name):
        return None

    path = folder / "snapshots" / commit / name

    return None if _regular(path, os.path.realpath(hub_cache())) is None else path


def cached_commit(folder: Path, revision: str) -> str | None:
    """Return the commit that a revision had at the last request; ``None`` if the cache does not say."""
    if is_commit(revision):
        return revision if (folder / "snapshots" / revision).is_dir() else None

    path = folder / "refs" / revision
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return None
        with path.open("rb") as file:
            text = file.read(41).decode("ascii", errors="replace").strip()
    except OSError:
        return None

    return text if is_commit(text) else None


def _folders() -> Iterator[tuple[str, Path]]:
    for entry in _entries(hub_cache()):
        repo = repository_id(Path(entry.path))
        if repo is not None and entry.is_dir(follow_symlinks=False):
            yield repo, Path(entry.path)


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:  # missing, or not readable for this user
        return []


def _names(path: Path, prefix: str, depth: int) -> Iterator[str]:
    """Yield the names below ``path`` that are not folders. It follows no link to a folder, so it ends."""
    for entry in _entries(path):
        name = prefix + entry.name
        if not is_file_name(name):
            continue
        if not entry.is_dir(follow_symlinks=False):
            yield name
        elif depth:
            yield from _names(Path(entry.path), f"{name}/", depth - 1)


def _regular(path: Path, root: str) -> os.stat_result | None:
    """Return the state of the regular file below ``root`` that ``path`` leads to."""
    real = os.path.realpath(path)
    try:
        seen = os.stat(real)
    except (OSError, ValueError):
        return None

    return seen if stat.S_ISREG(seen.st_mode) and real.startswith(root + os.sep) else None


def blob_tag(path: Path) -> str | None:
    """Return the entity tag of a file of a snapshot, as the hub gave it: the name of the blob behind the link."""
    try:
        name = path.readlink().name
    except OSError:
        return None

    return name if is_sha256(name) or is_commit(name) else None
