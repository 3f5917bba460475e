"""Files that are being written: whose they are, how another process takes them up, and when they are litter.

Each has a name of its own that says which process writes it. When that process has ended, whoever needs the file
renames it to a name of its own: of several, one succeeds. So no two processes write to the same file, without a lock.
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
from dataclasses import dataclass
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
"""Seconds after which a process that gives no sign of life is waited for no longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a file that arrives in parts is part of: only what agrees in all of it is put together."""

    url: str
    etag: str | None
    size: int | None
    sha256: str | None

    @property
    def key(self) -> str:
        return sha256(self.url.encode()).hexdigest()[:40]

    @property
    def resumable(self) -> bool:
        """Whether it can be known that what comes later belongs to what is here."""
        return self.size is not None and (self.etag is not None or self.sha256 is not None)


class Range(NamedTuple):
    """A range of a file that is on the disk."""

    start: int
    end: int
    digest: str
    """The BLAKE3 of its bytes as they came: until they are taken up, anything may happen to them."""


class Partial:
    """A file that arrives in parts, and the notes beside it that say which parts are on the disk."""

    def __init__(self, identity: Identity, path: Path, fd: int, done: Sequence[Range]) -> None:
        self.identity = identity
        self.path = path
        self.fd = fd
        """Open as long as this object lives: a thread that cannot be stopped must not write to another file."""
        weakref.finalize(self, os.close, fd)
        self.done = list(done)
        """The ranges of bytes that were there when it was opened."""

    @classmethod
    def open(cls, folder: Path, identity: Identity) -> Self:
        """Take up what an ended process left, or begin anew.

        :raises OSError: a file cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if identity.resumable:
            for path in sorted(folder.glob(f"{identity.key}.*.part")):
                if _ended(path):
                    if (partial := cls._take_up(path, identity)) is not None:
                        return partial
                    _discard(path)  # nobody will ever want it: the file has changed, or there are no notes

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
            return None  # another process was quicker
        fd = os.open(mine, _FLAGS)
        good = [each for each in done if _digest(fd, each) == each.digest]
        if len(good) < len(done):
            _log.warning("%s was changed after it came: what is damaged of it is fetched again", path)
        partial = cls(identity, mine, fd, good)
        partial.note(good)
        _remove(_notes(path))

        return partial

    def note(self, done: Sequence[Range]) -> None:
        """Write down which ranges are here; they are on the disk before the notes say so."""
        if not self.identity.resumable:
            return
        os.fdatasync(self.fd)
        notes = _notes(self.path)
        new = notes.with_suffix(".new")
        new.write_text(json.dumps({**_identity_json(self.identity), "done": list(done)}), encoding="utf-8")
        new.rename(notes)

    def discard(self) -> None:
        """Remove it; nothing of it is of use."""
        _discard(self.path)

    def release(self, done: Sequence[Range]) -> None:
        """Leave it to whoever wants to take it up, this process included."""
        if not done or not self.identity.resumable:
            self.discard()
            return
        old = self.path
        self.path = old.with_name(f"{self.identity.key}.{_place()}-0-0.{secrets.token_hex(4)}.part")
        try:
            self.note(done)
            old.rename(self.path)
        except OSError as error:
            _log.info("What has arrived is not kept in %s: %s", self.path.parent, error)
            self.discard()
            _remove(old)
        _remove(_notes(old))

    def finished(self) -> None:
        """It has another name by now."""
        _remove(_notes(self.path))


def _identity_json(identity: Identity) -> dict[str, Any]:
    # The address itself may hold a secret, and notes are for all who share the cache.
    return {
        "url": sha256(identity.url.encode()).hexdigest(),
        "etag": identity.etag,
        "size": identity.size,
        "sha256": identity.sha256,
    }


def _notes(path: Path) -> Path:
    return path.with_suffix(".json")


def _digest(fd: int, part: Range) -> str:
    hasher, at = blake3(), part.start
    while at < part.end and (data := os.pread(fd, min(_STEP, part.end - at), at)):
        hasher.update(data)
        at += len(data)

    return hasher.hexdigest()


def _read_notes(path: Path, identity: Identity) -> list[Range]:
    """The ranges that are there; none where the notes do not say so, or speak of something else."""
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
def temporary(folder: Path, kind: str) -> Iterator[tuple[IO[bytes], Path]]:
    """A new file that is gone when the block is left, unless it was renamed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.{_owner()}.{secrets.token_hex(4)}.tmp"
    try:
        with open(path, "xb") as file:
            yield file, path
    finally:
        _remove(path)


def sweep(folder: Path, *, older_than: float = _DAY, kind: str = "*") -> int:
    """Remove what ended processes left and nobody took up.

    :param kind: of what :func:`temporary` made; default: all, and what came in parts, too.
    :param older_than: seconds since it was last written to.

    :returns: the bytes that were freed.
    """
    freed = 0
    for path in folder.glob(f"{kind}.*"):
        with suppress(OSError):
            found = os.lstat(path)
            if _NAME.fullmatch(path.name) and time.time() - found.st_mtime > older_than and _ended(path):
                path.unlink()
                freed += found.st_blocks * 512

    return freed


@contextmanager
def courtesy_lock(folder: Path, key: str, *, written: Path) -> Iterator[bool]:
    """Wait while another process has the lock ``key``, if the file system has locks at all.

    A process that is stopped, frozen, or cut off from its disk keeps its lock: once it has given no sign of life for
    :data:`SILENCE` seconds, the body runs without the lock.

    :param written: the folder that whoever has the lock writes to.

    :returns: whether it had to wait.
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
    waiting = None
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is None:
                _log.warning("Another process is fetching the same file; waiting for it.")
                waiting = Waiting(sign)
            elif waiting.is_over():
                _log.warning("The other process gave no sign of life for %g s; going on without it.", SILENCE)
                return True
            time.sleep(0.1)
            continue
        with suppress(OSError):  # a full disk: whoever waits then looks at what is written
            os.pwrite(fd, f"{_owner()}\n".encode(), 0)
        return waiting is not None


class Waiting:
    """A wait for another process, which ends when that gives no sign of life any more."""

    def __init__(self, sign: Callable[[], object]) -> None:
        """:param sign: gives something else each time, as long as the other process is at work."""
        self._sign = sign
        self._last, self._since = sign(), time.monotonic()

    def is_over(self) -> bool:
        """Return whether there was no sign for :data:`SILENCE` seconds."""
        now, sign = time.monotonic(), self._sign()
        if sign != self._last:
            self._last, self._since = sign, now

        return now - self._since > SILENCE


def _sign_of_life(fd: int, written: Path) -> object:
    """Return what changes while the process with the lock ``fd`` works: its CPU time; where unknown, its files."""
    owner = os.pread(fd, 200, 0).decode("ascii", "replace").partition("\n")[0]
    if owner.startswith(_place()):
        _, pid, start = owner.rsplit("-", 2)
        if pid.isdecimal() and (fields := _process(int(pid))) is not None and fields[19] == start:
            return owner, fields[11], fields[12]

    return owner, growth(written, "*")


def growth(folder: Path, pattern: str) -> list[tuple[str, int, int]]:
    """Return name, size and time of each file, which change as long as a process writes them."""
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
    """Whether the process that a temporary file belongs to has ended, as far as can be told from here."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        return False
    if match["owner"].startswith(_place()):
        return _start_time(int(match["pid"])) != int(match["start"])

    # Of a process on another machine, or before this one was started, only its silence is known.
    with suppress(OSError):
        return time.time() - os.lstat(path).st_mtime > _DAY

    return False


@lru_cache(maxsize=1)
def _place() -> str:
    """Where process ids mean the same processes: this machine since it was started, and this namespace of it."""
    parts = [host_id()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"))
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))

    return sha256("\0".join(parts).encode()).hexdigest()[:24]


def _start_time(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine did; ``None`` where there is no such process."""
    fields = _process(pid)

    return None if fields is None else int(fields[19])


def _process(pid: int) -> list[str] | None:
    """Return the fields of a process from its state on; ``None`` where there is no such process, or it has ended.

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
