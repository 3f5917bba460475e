"""Partially written files: their owner, how another process resumes them, and when they are removed.

The name of each file identifies the process that writes it. After that process has ended, another one takes the file
over by renaming it to a name of its own. Only one rename succeeds, so that no two processes write to the same file,
without a lock.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

from blake3 import blake3

from lading.system.filesystem import host_id

_log = logging.getLogger("lading")

_NAME = re.compile(r"(?P<key>[0-9a-z]+)\.(?P<owner>[0-9a-f]{24}-(?P<pid>\d+)-(?P<start>\d+))\.[0-9a-f]{8}\.\w+")
_DAY = 86_400
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_MAX_NOTES = 16 << 20
_STEP = 1 << 20
SILENCE = 30.0
"""Seconds without a sign of life after which others stop waiting for a process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The identity of a file that is fetched in parts; only parts of equal identity are joined."""

    url: str
    etag: str | None
    size: int | None
    sha256: str | None

    @property
    def key(self) -> str:
        return sha256(self.url.encode()).hexdigest()[:40]

    @property
    def resumable(self) -> bool:
        """True if a later part can be proven to belong to the same content."""
        return self.size is not None and (self.etag is not None or self.sha256 is not None)


class Range(NamedTuple):
    """A range of a file that is on the disk."""

    start: int
    end: int
    digest: str
    """The BLAKE3 of its bytes as they arrived, by which changes made before a resumption are noticed."""


class Partial:
    """A partially fetched file, with notes next to it that list the ranges on the disk."""

    def __init__(self, identity: Identity, path: Path, fd: int, done: Sequence[Range]) -> None:
        self.identity = identity
        self.path = path
        self.fd = fd
        """The file descriptor, open as long as this object lives, so that a stuck thread never writes to a file that
        was given the same number."""
        weakref.finalize(self, os.close, fd)
        self.done = list(done)
        """The ranges that were on the disk when the file was opened."""

    @classmethod
    def open(cls, folder: Path, identity: Identity) -> Self:
        """Resume a file that an ended process left, or create a new one.

        :raises OSError: a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if identity.resumable:
            for path in sorted(folder.glob(f"{identity.key}.*.part")):
                if _ended(path):
                    if (partial := cls._take_up(path, identity)) is not None:
                        return partial
                    _discard(path)  # never usable: the file has changed, or there are no notes

        path = folder / f"{identity.key}.{_owner()}.{secrets.token_hex(4)}.part"

        return cls(identity, path, os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o644), [])

    @classmethod
    def _take_up(cls, path: Path, identity: Identity) -> Self | None:
        done = _read_notes(path, identity)
        if not done:
            return None
        mine = path.with_name(f"{identity.key}.{_owner()}.{secrets.token_hex(4)}.part")
        try:
            path.rename(mine)
        except OSError:
            return None  # another process took it
        fd = os.open(mine, _FLAGS)
        good = [each for each in done if _digest(fd, each) == each.digest]
        if len(good) < len(done):
            _log.warning("%s was changed after it was fetched: its damaged ranges are fetched again", path)
        partial = cls(identity, mine, fd, good)
        partial.note(good)
        _remove(_notes(path))

        return partial

    def note(self, done: Sequence[Range]) -> None:
        """Record the fetched ranges in the notes, after flushing them to the disk."""
        if not self.identity.resumable:
            return
        os.fdatasync(self.fd)
        notes = _notes(self.path)
        new = notes.with_suffix(".new")
        new.write_text(json.dumps({**_identity_json(self.identity), "done": list(done)}), encoding="utf-8")
        new.rename(notes)

    def discard(self) -> None:
        """Remove the file, as none of it can be used."""
        _discard(self.path)

    def release(self, done: Sequence[Range]) -> None:
        """Leave the file for any process to resume, this one included."""
        if not done or not self.identity.resumable:
            self.discard()
            return
        old = self.path
        self.path = old.with_name(f"{self.identity.key}.{_place()}-0-0.{secrets.token_hex(4)}.part")
        try:
            self.note(done)
            old.rename(self.path)
        except OSError as error:
            _log.info("The fetched part could not be kept in %s: %s", self.path.parent, error)
            self.discard()
            _remove(old)
        _remove(_notes(old))

    def remove_notes(self) -> None:
        """Remove the notes after the complete file was renamed."""
        _remove(_notes(self.path))


def _identity_json(identity: Identity) -> dict[str, Any]:
    # The URL is hashed, as it may hold a secret and all users of the cache can read the notes.
    return {**asdict(identity), "url": sha256(identity.url.encode()).hexdigest()}


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(fd: int, part: Range) -> str:
    hasher, at = blake3(), part.start
    while at < part.end and (data := os.pread(fd, min(_STEP, part.end - at), at)):
        hasher.update(data)
        at += len(data)

    return hasher.hexdigest()


def _read_notes(path: Path, identity: Identity) -> list[Range]:
    """Return the ranges that the notes list; none if the notes are missing, invalid, or of another identity."""
    try:
        with open(_notes(path), "rb") as file:
            document = json.loads(file.read(_MAX_NOTES))
        if {k: document[k] for k in _identity_json(identity)} != _identity_json(identity):
            return []
        ranges = [Range(int(start), int(end), str(digest)) for start, end, digest in document["done"]]
        length = os.lstat(path).st_size
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []

    at = 0
    for start, end, _ in ranges:
        if not at <= start < end <= length:
            return []
        at = end

    return ranges


@contextmanager
def temporary_file(folder: Path, kind: str) -> Iterator[tuple[IO[bytes], Path]]:
    """Create a file that is removed at the end of the block, unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.{_owner()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "xb") as file:
            yield file, path
    finally:
        _remove(path)


def sweep(folder: Path) -> int:
    """Remove files that ended processes last wrote to more than a day ago; return the number of bytes freed."""
    freed = 0
    for path in folder.glob("*.*"):
        with suppress(OSError):
            found = os.lstat(path)
            if _NAME.fullmatch(path.name) and time.time() - found.st_mtime > _DAY and _ended(path):
                path.unlink()
                freed += found.st_blocks * 512

    return freed


@contextmanager
def advisory_lock(folder: Path, key: str, *, written: Path) -> Iterator[bool]:
    """Hold the lock ``key`` during the block, if the file system supports locks.

    A stopped or frozen process, or one cut off from its disk, keeps its lock. If the holder gives no sign of life for
    :data:`SILENCE` seconds, the block runs without the lock.

    :param written: the folder that the holder of the lock writes to.

    :returns: whether the call had to wait.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        yield False
        return

    try:
        try:
            waited = _wait_for_lock(fd, lambda: _sign_of_life(fd, written))
        except OSError:  # a file system without locks
            waited = False
        yield waited
    finally:
        os.close(fd)


def _wait_for_lock(fd: int, sign: Callable[[], object]) -> bool:
    waiting = Waiting(sign)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting.is_over():
                return True
            time.sleep(0.1)
            continue
        with suppress(OSError):  # a full disk: other processes then watch the written files
            os.pwrite(fd, f"{_owner()}\n".encode(), 0)
        return waiting.began


class Waiting:
    """A wait for another process, which is over once that process gives no sign of life."""

    def __init__(self, sign: Callable[[], object]) -> None:
        """:param sign: returns a different value at each call while the other process works."""
        self.began = False
        self._sign = sign
        self._last: object = None
        self._since = 0.0

    def is_over(self) -> bool:
        """Return whether there was no sign for :data:`SILENCE` seconds. The first call begins the wait."""
        now, sign = time.monotonic(), self._sign()
        if not self.began:
            _log.warning("Another process is fetching the same file; waiting for it.")
        if not self.began or sign != self._last:
            self.began, self._last, self._since = True, sign, now
        if now - self._since <= SILENCE:
            return False
        _log.warning("The other process gave no sign of life for %g s; going on without it.", SILENCE)

        return True


def _sign_of_life(fd: int, written: Path) -> object:
    """Return a value that changes while the holder of the lock works: its CPU time; if unknown, the files' states."""
    owner = os.pread(fd, 200, 0).decode("ascii", "replace").partition("\n")[0]
    if owner.startswith(_place()):
        _, pid, start = owner.rsplit("-", 2)
        if pid.isdecimal() and (fields := _process(int(pid))) is not None and fields[19] == start:
            return owner, fields[11], fields[12]

    return owner, file_states(written, "*")


def file_states(folder: Path, pattern: str) -> list[tuple[str, int, int]]:
    """Return name, size and modification time of each file, which change while a process writes them."""
    found = []
    for path in sorted(folder.glob(pattern)):
        with suppress(OSError):
            state = os.lstat(path)
            found.append((path.name, state.st_blocks, state.st_mtime_ns))

    return found


def _owner() -> str:
    pid = os.getpid()

    return f"{_place()}-{pid}-{_start_time(pid) or 0}"


def _ended(path: Path) -> bool:
    """Return whether the process that owns a temporary file is known to have ended."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    if match["owner"].startswith(_place()):
        return _start_time(int(match["pid"])) != int(match["start"])

    # The process is on another machine, or predates the last boot, so only the age of the file can be checked.
    with suppress(OSError):
        return time.time() - os.lstat(path).st_mtime > _DAY

    return False


@lru_cache(maxsize=1)
def _place() -> str:
    """Return an id of this machine, boot and PID namespace, within which process ids are unique."""
    parts = [host_id()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))

    return sha256("\0".join(parts).encode()).hexdigest()[:24]


def _start_time(pid: int) -> int | None:
    """Return the start time of a process, in clock ticks since boot; ``None`` if it does not exist."""
    fields = _process(pid)

    return None if fields is None else int(fields[19])


def _process(pid: int) -> list[str] | None:
    """Return the fields of a process from its state on; ``None`` if it does not exist, or has ended.

    Source: proc_pid_stat(5), fields 3 and following.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None

    return None if fields[0] in ("Z", "X") else fields


def _discard(path: Path) -> None:
    for each in (path, _notes(path), _notes(path).with_suffix(".new")):
        _remove(each)


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()
