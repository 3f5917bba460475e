"""The source of model repositories on the Hugging Face hub: ``hg://``, or ``hf://``, which means the same.

huggingface_hub implements the protocol, with its endpoint (``HF_ENDPOINT``), its tokens (``HF_TOKEN``, its login) and
its cache (``HF_HUB_CACHE``, ``HF_HOME``), so that lading and other programs share the fetched files. It checks only
sizes, so lading hashes all files before it uses them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from lading.errors import FetchError, LadingError, ModelGatedError, PolicyError
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
    cached_commit,
    cached_file,
    folder_name,
    hub_cache,
    repository_folders,
    snapshot_files,
    snapshot_folders,
)
from lading.sources.hub.client import describe, location
from lading.sources.hub.errors import refusal
from lading.sources.hub.files import fetch_files, offline_error
from lading.sources.source import FetchedFile, Known, RemoteFile, Snapshot
from lading.sources.web.connection import Timeouts
from lading.sources.web.download import read_range
from lading.sources.web.responses import Answer, printable
from lading.sources.web.transport import Resource, Transport

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

_log = logging.getLogger("lading.sources")


class HubSource:
    """A repository on the hub; a :class:`~lading.sources.source.Source`."""

    kind: Literal["cache", "hub"] = "hub"
    lists: bool = True

    def __init__(
        self,
        uri: str,
        *,
        inner_path: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        timeouts: Timeouts | None = None,
    ) -> None:
        """
        :param uri: ``hg://[org/]name[@revision][/path/inside]``, or the same with ``hf://``.
        :param inner_path: the checkpoint, relative to ``uri``.
        :param revision: a branch, a tag or a commit, instead of the one in ``uri``.
        :param offline: whether to use only the cache and open no socket.

        :raises AddressError: the URI or the revision is not valid.
        :raises PolicyError: ``inner_path`` leads out of the repository.
        """
        address = HubAddress.from_uri(uri)
        if revision is not None:
            check_revision(revision, uri)

        self.uri = uri
        self.repo = address.repo
        """The repository id, as the URI spells it."""
        self.revision = revision or address.revision
        """The requested revision; ``None`` for the main branch."""
        self.inner = _inner(address.inner, inner_path)
        self._offline = offline
        self._canonical_id: str | None = None  # the id as the hub spells it, after the first request
        self._pinned: str | None = None  # the commit of the revision at that time
        self._resources: dict[str, Resource] = {}
        self._transport = Transport(timeouts=timeouts, plain=True)
        weakref.finalize(self, self._transport.close)

    # --- snapshots ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """Return the files that the hub publishes at the revision, by one request; offline, those in the cache.

        A large file has a SHA-256, a small one its git blob id as its entity tag. Files with invalid names are left
        out, with a warning.
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
                f"{self.uri}: expected the hub to answer with the commit {self.revision}, found {info.sha}."
            )
        if info.id.casefold() != self.repo.casefold():
            _log.info("%s was renamed to %s on the hub", self.repo, info.id)
        self._canonical_id, self._pinned = info.id, info.sha

        return Snapshot(uri=self.uri, revision=info.sha, files=self._files(info))

    def _files(self, info: ModelInfo) -> tuple[RemoteFile, ...]:
        files: dict[str, RemoteFile] = {}
        for sibling in info.siblings or ():
            name = sibling.rfilename
            if not isinstance(name, str) or not is_file_name(name):
                _log.warning("%s: left out a file whose name is not a plain relative path: %r", self.uri, name)
                continue
            if name in files:
                raise FetchError(f"{self.uri}: expected each file once, found {name!r} twice.")
            files[name] = _remote_file(sibling, self.uri)

        return tuple(sorted(files.values(), key=lambda file: file.name))

    def cached_snapshot(self) -> Snapshot | None:
        """Return the cached files of the revision; ``None`` if there are none."""
        for _, folder in self._folders():
            commit = cached_commit(folder, self.revision or "main")
            if commit is None and self.revision is None:
                snapshots = snapshot_folders(folder)
                commit = snapshots[0].name if len(snapshots) == 1 else None
            files = () if commit is None else snapshot_files(folder / "snapshots" / commit)
            if commit is not None and files:
                return Snapshot(uri=self.uri, revision=commit, files=files)

        return None

    def local(self, snapshot: Snapshot, files: Sequence[RemoteFile]) -> list[Path | None]:
        """Return the path of each file in the cache, at the snapshot's commit; ``None`` for files that are not there.

        The folder may spell the repository id in another case. Only the size of a file is checked.
        """
        folders = [folder for _, folder in self._folders()]

        return [
            next((path for folder in folders if (path := _in_folder(folder, snapshot.revision, file))), None)
            for file in files
        ]

    def _folders(self) -> list[tuple[str, Path]]:
        return repository_folders(self._canonical_id or self.repo, self.repo)

    def with_siblings(self, snapshot: Snapshot, names: Sequence[str]) -> Snapshot:
        """Return ``snapshot``, as it lists all files already."""
        return snapshot

    # --- bytes -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End all reads; huggingface_hub's own requests go on, as it shares them with the rest of the process."""
        self._transport.close()

    def read(self, snapshot: Snapshot, file: RemoteFile, offset: int, into: memoryview) -> None:
        """Fill ``into`` with the bytes of a file at the snapshot's commit. Safe to call from several threads."""
        size = len(into)
        commit = self._commit(snapshot)
        check_file_name(file.name, self.uri)
        if offset < 0 or (file.size is not None and offset + size > file.size):
            raise FetchError(
                f"{self.uri}: {file.name} has {file.size} bytes; it has no bytes {offset} to {offset + size}."
            )
        if size == 0:
            return
        if self._offline:
            self._read_cached(snapshot, file, offset, into)
            return

        try:
            # The commit pins the content, and the validator of the server behind a redirect is another one.
            pinned = replace(file, etag=None)
            read_range(self._transport, self._resource(commit, file.name), pinned, offset, into, max_skip=0)
        except ModelGatedError:
            raise
        except PolicyError as error:  # the hub, which the user did not choose by this address, redirects elsewhere
            raise FetchError(f"{self.uri}: {error}") from error

    def _resource(self, commit: str, name: str) -> Resource:
        repo = self._canonical_id or self.repo
        label = f"hg://{repo}@{commit}/{name}"

        def refused(response: Answer) -> LadingError:
            said = printable(response.headers.get("X-Error-Message") or response.reason, 300)
            return refusal(repo, name, response.status, response.headers, said=said)

        return self._resources.setdefault(
            label, Resource(label, partial(location, repo, commit, name), refused=refused)
        )

    def _read_cached(self, snapshot: Snapshot, file: RemoteFile, offset: int, into: memoryview) -> None:
        path = self.local(snapshot, [file])[0]
        if path is None:
            raise offline_error(self.repo, file.name)
        with path.open("rb") as opened:
            opened.seek(offset)
            count = opened.readinto(into)
        if count < len(into):
            raise FetchError(f"{path}: expected {len(into)} bytes from {offset} on, found {count}.")

    def fetch(
        self, snapshot: Snapshot, files: Sequence[RemoteFile], *, known: Known, progress: bool
    ) -> list[FetchedFile]:
        """Fetch files to huggingface_hub's cache, several at a time, and verify their bytes.

        Files that are there already are only hashed. A file whose bytes differ from the published ones is fetched a
        second time.

        :param progress: whether to show a progress bar on stderr.
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
        """Return the repository id for the folder in the cache: the hub's spelling, else the one in the cache."""
        if self._canonical_id is None and (found := next((repo for repo, _ in self._folders()), None)) is not None:
            return found
        if self._canonical_id is None and not self._offline:
            # Other programs would not find the files under another spelling.
            answer = describe(self.repo, commit).id
            self._canonical_id = answer if isinstance(answer, str) and is_repo_id(answer) else None

        return self._canonical_id or self.repo

    def _remember(self, repo: str, commit: str) -> None:
        """Record the commit of the revision in the cache, as huggingface_hub does, so that it resolves offline."""
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
        except OSError as error:  # a read-only cache is still usable
            _log.info("%s: could not record the commit of %s: %s", self.uri, revision, error)


def _inner(path: str | None, inner_path: str | None) -> str | None:
    """Join the path of the URI and that of the card (they cannot be joined in the URI: ``hg://name/x`` is an id)."""
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
