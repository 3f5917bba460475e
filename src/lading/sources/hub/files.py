"""Downloads of a repository's files to huggingface_hub's cache: several at once, under one bar, each one hashed."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lading.errors import DigestMismatchError, FetchError, ModelCheckpointError
from lading.sources.disk import require_space
from lading.sources.hub.address import is_commit
from lading.sources.hub.cache import folder_name, hub_cache
from lading.sources.hub.client import download
from lading.sources.hub.remove import delete_file
from lading.sources.sha256 import sha256_file
from lading.sources.source import FetchedFile, Known, RemoteFile
from lading.system.progress import byte_bar

_AT_ONCE = 8
"""The number of files to fetch at the same time."""

_log = logging.getLogger("lading.sources")


class _StoppedError(Exception):
    """A stop because another file failed or the user interrupted the wait."""


def fetch_files(
    files: Sequence[RemoteFile],
    here: Sequence[Path | None],
    *,
    repo: str,
    commit: str,
    known: Known,
    offline: bool,
    progress: bool,
) -> list[FetchedFile]:
    """Bring files of a commit into the cache, check their bytes, and return them in the given order.

    :param here: the paths of those that are there already, by their names.

    :raises FetchError: see :meth:`lading.sources.hub.source.HubSource.fetch`; so are the others.
    """
    job = _Job(repo=repo, commit=commit, known=known, offline=offline)
    with (
        _counted(sum(file.size or 0 for file in files), show=progress) as (count, stop),
        ThreadPoolExecutor(min(_AT_ONCE, len(files)), thread_name_prefix="lading-fetch") as pool,
    ):
        tasks = [pool.submit(job.bring, file, path, count) for file, path in zip(files, here, strict=True)]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            failed = [task for task in tasks if task in done and task.exception() is not None]
        finally:
            # Also after an interrupted wait: no thread may download when this function has returned or raised.
            stop.set()
            pool.shutdown(cancel_futures=True)

    return [task.result() for task in failed or tasks]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """The settings that the files of one fetch share."""

    repo: str
    commit: str
    known: Known
    offline: bool

    def bring(self, file: RemoteFile, here: Path | None, count: Callable[[int], None]) -> FetchedFile:
        """Return one file, checked."""
        bad: _Checked | None = None
        for place in (here, None if file.sha256 is None else self.known(file.sha256)):
            if place is None:
                continue
            try:
                seen = _check(place, file, count)
            except (ModelCheckpointError, OSError) as error:  # missing, or not readable for this user
                _log.warning("%s is left aside: %s", place, error)
                continue
            if seen.good is not None:
                return seen.good
            count(-seen.size)
            bad = bad or seen
            _log.warning("%s is not what the hub publishes as %s of %s", place, file.name, self.repo)

        if self.offline:
            if bad is None:
                raise offline_error(self.repo, file.name)
            raise bad.mismatch(file, self.repo, "It is not used. Unset LADING_OFFLINE and HF_HUB_OFFLINE to fetch it.")

        if bad is not None and bad.path == here and bad.path.resolve().name != file.sha256:
            # huggingface_hub fetches the file again, but replaces neither a plain file nor a link to another one.
            delete_file(bad.path)

        return self._fetch(file, count, force=here is not None)

    def _fetch(self, file: RemoteFile, count: Callable[[int], None], *, force: bool) -> FetchedFile:
        """Fetch one file over the network.

        :param force: whether a bad copy is in the cache, which the client would return again.
        """
        for last in (False, True):
            path, came = self._download(file, force=force or last, count=count)
            seen = _check(path, file, None if came else count)
            if seen.good is not None:
                count(seen.size - came if came else 0)
                return seen.good
            # Other programs check sizes alone, and would use it. Nor does the client replace a link to another file.
            delete_file(path)
            if last:
                break
            count(-came if came else -seen.size)
            _log.warning("%s came with other bytes than the hub publishes: %s; fetching it again", file.name, path)

        raise seen.mismatch(
            file,
            self.repo,
            "It was fetched twice and is not used. Try again later or over another network; if HF_ENDPOINT names a "
            "mirror, try without it.",
        )

    def _download(self, file: RemoteFile, *, force: bool, count: Callable[[int], None]) -> tuple[Path, int]:
        """Return the path of the file in the cache, and the number of bytes that came over the network."""
        came = 0

        def advance(size: int) -> None:
            nonlocal came
            came += size
            count(size)

        # The client only warns about it, and goes on.
        require_space(hub_cache(), file.size or 0)
        path = Path(download(self.repo, self.commit, file.name, force=force, advance=advance))
        expected = hub_cache().resolve() / folder_name(self.repo) / "snapshots" / self.commit / file.name
        if path != expected:
            raise FetchError(
                f"hg://{self.repo}: expected {file.name} of the commit {self.commit} at {expected}, but it came as "
                f"{path}: the hub answered with another commit."
            )

        return path, came


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """The result of a check of a file's bytes."""

    path: Path
    size: int
    good: FetchedFile | None
    kind: str
    expected: str
    found: str

    def mismatch(self, file: RemoteFile, repo: str, advice: str) -> DigestMismatchError:
        return DigestMismatchError(
            self.path,
            f"{self.path} is not what the hub publishes as {file.name} of {repo}: expected the {self.kind} "
            f"{self.expected}, found {self.found}. {advice}",
            expected=self.expected,
            found=self.found,
        )


def _check(path: Path, file: RemoteFile, count: Callable[[int], None] | None) -> _Checked:
    """Check a file against the identity that the hub publishes: the SHA-256 or, for a small file, the git blob id."""
    sha256, stat = sha256_file(path, progress=count)
    tag = (file.etag or "").strip('"')

    if file.sha256 is not None:
        kind, expected, found = "SHA-256", file.sha256, sha256
    elif is_commit(tag):
        kind, expected, found = "git blob id", tag, git_blob_id(path)
    else:
        kind, found = "size", str(stat.size)
        expected = found if file.size is None else str(file.size)

    good = FetchedFile(name=file.name, path=path, stat=stat, sha256=sha256, published=file.sha256 is not None)

    return _Checked(
        path=path, size=stat.size, good=good if expected == found else None, kind=kind, expected=expected, found=found
    )


def git_blob_id(path: Path) -> str:
    """Return git's id of a file's content: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    with path.open("rb") as file:
        sha1 = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while piece := file.read(1 << 20):
            sha1.update(piece)

    return sha1.hexdigest()


def offline_error(repo: str, what: str) -> FetchError:
    """Return the error for a file that is not here, and that lading may not request."""
    return FetchError(
        f"hg://{repo}: {what} is not in the cache at {hub_cache()}, and LADING_OFFLINE or HF_HUB_OFFLINE is set, "
        "so the hub was not asked. Unset the variable, or fetch it with `lading pull` where there is a network."
    )


@contextmanager
def _counted(total: int, *, show: bool) -> Iterator[tuple[Callable[[int], None], threading.Event]]:
    """Yield a counter of bytes behind a bar on stderr, and the event that makes it raise, which stops the threads."""
    stop, lock = threading.Event(), threading.Lock()
    with byte_bar(total, "fetch", shown=show) as bar:

        def count(size: int) -> None:
            if stop.is_set():
                raise _StoppedError
            with lock:
                bar.update(size)

        yield count, stop
