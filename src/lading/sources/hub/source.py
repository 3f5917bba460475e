"""Repositories of models on the Hugging Face hub: ``hg://`` and ``hf://``, which mean the same.

huggingface_hub does the protocol: its endpoint (``HF_ENDPOINT``), its tokens (``HF_TOKEN``, the file of its login), its
cache (``HF_HUB_CACHE``, ``HF_HOME``), so that weights already there are found and those that come serve other programs
too. It checks sizes alone, so all that comes from it is hashed here before it counts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from lading.errors import FetchError, PolicyError
from lading.sources.disk import advised
from lading.sources.hub.address import (
    HubAddress,
    check_file_name,
    check_revision,
    is_commit,
    is_file_name,
    is_repo_id,
    is_sha256,
)
from lading.sources.hub.cache import (
    CachedFile,
    cached_commit,
    cached_file,
    folder_name,
    hub_cache,
    repository_folders,
    snapshot_files,
    snapshot_folders,
)
from lading.sources.hub.client import describe, read_range
from lading.sources.hub.files import fetch_files, offline_error
from lading.sources.source import FetchedFile, Known, RemoteFile, Snapshot

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_log = logging.getLogger("lading.sources")


class HubSource:
    """A repository on the hub; a :class:`~lading.sources.source.Source`."""

    kind: Literal["cache", "hub"] = "hub"
    lists: bool = True

    def __init__(
        self, uri: str, *, inner_path: str | None = None, revision: str | None = None, offline: bool = False
    ) -> None:
        """
        :param uri: ``hg://[org/]name[@revision][/path/inside]``, or the same with ``hf://``.
        :param inner_path: the checkpoint inside what ``uri`` names.
        :param revision: a branch, a tag or a commit, instead of the one in ``uri``.
        :param offline: whether no socket may be opened: only the cache is asked then.

        :raises AddressError: the URI or the revision is none.
        :raises PolicyError: ``inner_path`` leads out of the repository.
        """
        address = HubAddress.from_uri(uri)
        if revision is not None:
            check_revision(revision, uri)

        self.uri = uri
        self.repo = address.repo
        """The id, as the URI spells it."""
        self.revision = revision or address.revision
        """As it was asked for; ``None`` for the main branch."""
        self.inner = _inner(address.inner, inner_path)
        self._offline = offline
        self._spelled: str | None = None  # the id as the hub spells it, once it was asked
        self._pinned: str | None = None  # the commit that it then had
        self._places: dict[str, str] = {}

    # --- what there is -----------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the hub publishes at the revision, in one call; offline, what the cache holds of it.

        A large file has its SHA-256; a small one its git blob id, which is its entity tag. Files whose names could not
        be kept here are left out, with a warning.

        :raises FetchError: the hub cannot be reached, answers nonsense, or was not to be asked.
        :raises CheckpointNotFoundError: there is no such repository or revision.
        :raises ModelGatedError: access to it has to be asked for.
        """
        if self._offline:
            cached = self.cached_snapshot()
            if cached is None:
                raise offline_error(self.repo, f"revision {self.revision or 'main'}")
            return replace(cached, partial=True)

        info = describe(self.repo, self.revision)
        if not isinstance(info.id, str) or not is_repo_id(info.id):
            raise FetchError(f"{self.uri}: expected the hub to answer with the id of a repository, found {info.id!r}.")
        if not isinstance(info.sha, str) or not is_commit(info.sha):
            raise FetchError(f"{self.uri}: expected the hub to answer with a commit, found {info.sha!r}.")
        if self.revision is not None and is_commit(self.revision) and info.sha != self.revision:
            raise FetchError(
                f"{self.uri}: asked the hub for the commit {self.revision}, and it answers with {info.sha}."
            )
        if info.id.casefold() != self.repo.casefold():
            _log.info("%s is called %s on the hub by now", self.repo, info.id)
        self._spelled, self._pinned = info.id, info.sha

        return Snapshot(uri=self.uri, revision=info.sha, files=self._files(info))

    def _files(self, info: ModelInfo) -> tuple[RemoteFile, ...]:
        files: dict[str, RemoteFile] = {}
        for sibling in info.siblings or ():
            name = sibling.rfilename
            if not isinstance(name, str) or not is_file_name(name):
                _log.warning("%s: left out a file whose name is no plain relative path: %r", self.uri, name)
                continue
            if name in files:
                raise FetchError(f"{self.uri}: expected each file once, found {name!r} twice.")
            files[name] = _remote_file(sibling, self.uri)

        return tuple(sorted(files.values(), key=lambda file: file.name))

    def cached_snapshot(self) -> Snapshot | None:
        """What the cache alone says of the revision: the files of it that are there; ``None`` where there is nothing.

        The digests are those that the hub published when the files were fetched.
        """
        for _, folder in self._folders():
            commit = cached_commit(folder, self.revision or "main")
            if commit is None and self.revision is None:
                snapshots = snapshot_folders(folder)
                commit = snapshots[0].name if len(snapshots) == 1 else None
            files = () if commit is None else snapshot_files(folder / "snapshots" / commit)
            if commit is not None and files:
                return Snapshot(uri=self.uri, revision=commit, files=tuple(map(_known_file, files)))

        return None

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Where files of the snapshot's commit are in the cache, in whatever case its folder is spelled.

        A file of another size than the published one does not count; nothing else of it is checked.
        """
        folders = [folder for _, folder in self._folders()]

        return [
            next((path for folder in folders if (path := _in_folder(folder, snapshot.revision, file))), None)
            for file in files
        ]

    def shared(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path]:
        """Where files of the snapshot's commit would come in huggingface_hub's cache, of those that are not there.

        Offline nothing comes. Raises what :meth:`snapshot` does.
        """
        missing = [file for file, path in zip(files, self.local(snapshot, files), strict=True) if path is None]
        if self._offline or not missing:
            return []
        commit = self._commit(snapshot)
        for file in missing:
            check_file_name(file.name, self.uri)
        folder = hub_cache() / folder_name(self._download_id(commit)) / "snapshots" / commit

        return [path for file in missing if not os.path.lexists(path := folder / file.name)]

    def _folders(self) -> list[tuple[str, Path]]:
        return repository_folders(self._spelled or self.repo, self.repo)

    def beside(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """The snapshot as it is: it lists all files."""
        return snapshot

    # --- bytes -------------------------------------------------------------------------------------------------------

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes of a file of the snapshot's commit. May be called from several threads.

        :raises FetchError: the hub cannot be reached, answers nonsense, or was not to be asked.
        :raises CheckpointNotFoundError: it does not have the file any more.
        :raises ModelGatedError: access has to be asked for.
        """
        commit = self._commit(snapshot)
        check_file_name(file.name, self.uri)
        if offset < 0 or size < 0 or (file.size is not None and offset + size > file.size):
            raise FetchError(
                f"{self.uri}: {file.name} has {file.size} bytes; those from {offset} to {offset + size} are not in it."
            )
        if size == 0:
            return b""
        if self._offline:
            return self._read_here(snapshot, file, offset, size)

        return read_range(
            self._spelled or self.repo,
            commit,
            file.name,
            offset=offset,
            size=size,
            total=file.size,
            places=self._places,
        )

    def _read_here(self, snapshot: Snapshot, file: RemoteFile, offset: int, size: int) -> bytes:
        path = self.local(snapshot, [file])[0]
        if path is None:
            raise offline_error(self.repo, file.name)
        with path.open("rb") as opened:
            opened.seek(offset)
            body = opened.read(size)
        if len(body) < size:
            raise FetchError(f"{path}: expected {size} bytes from {offset} on, found {len(body)}.")

        return body

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Bring files into huggingface_hub's cache, several at a time, and check their bytes.

        What is there already is only hashed. What came with other bytes than the published ones is fetched once more.

        :param progress: whether to show a bar on stderr.

        :raises FetchError: the hub cannot be reached, answers nonsense, or was not to be asked.
        :raises CheckpointNotFoundError: it does not have one of the files any more.
        :raises ModelGatedError: access has to be asked for.
        :raises DigestMismatchError: what came is not what was published, twice.
        :raises OSError: the disk is full, or cannot be written.
        """
        commit = self._commit(snapshot)
        for file in files:
            check_file_name(file.name, self.uri)
        if not files:
            return []

        repo = self._download_id(commit)
        with advised("HF_HUB_CACHE"):
            fetched = fetch_files(
                files,
                self.local(snapshot, files),
                repo=repo,
                commit=commit,
                known=known,
                offline=self._offline,
                progress=progress,
            )
        if commit == self._pinned:
            self._remember(repo, commit)

        return fetched

    def _commit(self, snapshot: Snapshot) -> str:
        if not is_commit(snapshot.revision):
            raise FetchError(f"{self.uri}: expected a snapshot at a commit, found one at {snapshot.revision!r}.")

        return snapshot.revision

    def _download_id(self, commit: str) -> str:
        """The id whose folder in the cache is written: the hub's spelling; else the one that is in the cache."""
        if self._spelled is None and (found := next((repo for repo, _ in self._folders()), None)) is not None:
            return found
        if self._spelled is None and not self._offline:
            # Under another spelling, other programs would not find the files.
            answer = describe(self.repo, commit).id
            self._spelled = answer if isinstance(answer, str) and is_repo_id(answer) else None

        return self._spelled or self.repo

    def _remember(self, repo: str, commit: str) -> None:
        """Note in the cache which commit the revision has, as huggingface_hub does, so that it is found offline."""
        revision = self.revision or "main"
        folder = hub_cache() / folder_name(repo)
        if is_commit(revision) or not folder.is_dir() or cached_commit(folder, revision) == commit:
            return

        path = folder / "refs" / revision
        temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(commit, encoding="ascii")
            temporary.replace(path)
        except OSError as error:  # a cache that is only read serves all the same
            _log.info("%s: could not note the commit of %s: %s", self.uri, revision, error)


def _inner(path: str | None, inner_path: str | None) -> str | None:
    """The path inside the repository, of the URI's and the card's. They are not one text: ``hg://name/x`` is an id."""
    if inner_path is None:
        return path

    inner = inner_path.rstrip("/")
    if not is_file_name(inner):
        raise PolicyError(f"`checkpoint_path` must be a path inside the checkpoint, but is {inner_path!r}.")

    return inner if path is None else f"{path}/{inner}"


def _in_folder(folder: Path, commit: str, file: RemoteFile) -> Path | None:
    path = cached_file(folder, commit, file.name)

    return path if path is not None and file.size in (None, path.stat().st_size) else None


def _remote_file(sibling: RepoSibling, uri: str) -> RemoteFile:
    lfs, blob = sibling.lfs, sibling.blob_id
    size = sibling.size if lfs is None else lfs.size
    if size is not None and (type(size) is not int or size < 0):
        raise FetchError(f"{uri}: expected the size of {sibling.rfilename} in bytes, found {size!r}.")
    if lfs is None:
        plain = isinstance(blob, str) and is_commit(blob)
        return RemoteFile(name=sibling.rfilename, size=size, etag=f'"{blob}"' if plain else None)
    if not isinstance(lfs.sha256, str) or not is_sha256(lfs.sha256):
        raise FetchError(f"{uri}: expected the SHA-256 of {sibling.rfilename}, found {lfs.sha256!r}.")

    return RemoteFile(name=sibling.rfilename, size=size, sha256=lfs.sha256, etag=f'"{lfs.sha256}"')


def _known_file(file: CachedFile) -> RemoteFile:
    return RemoteFile(
        name=file.name,
        size=file.size,
        sha256=file.tag if file.tag is not None and is_sha256(file.tag) else None,
        etag=None if file.tag is None else f'"{file.tag}"',
    )
