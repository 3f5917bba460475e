"""What lading needs to know of the files and file systems under it: identity, and how far they can be trusted."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

# File systems that answer over a network: no shared memory between hosts (so no WAL), locks and direct I/O that differ
# from one to the next.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|gpfs|ceph|beegfs|afs|glusterfs|pvfs2|9p|wekafs|fuse\.(?!fuse-overlayfs).+"
)


@dataclass(frozen=True, slots=True)
class FileStat:
    """What tells one state of a file from another without reading it."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> FileStat:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def expand_home(path: str | Path) -> Path:
    """``path`` with the home folder in place of a leading ``~``.

    Where there is no such user, or this one has no home (in a container, under a number), it stays as it is, to be
    missed as any other path is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


NO_HOME = Path(os.devnull, "no-home")
"""The stand-in for the home folder of a user who has none: nothing is there, and nothing can be made there."""


def own_place(path: str | Path) -> Path:
    """Return ``path`` with the home folder in place of a leading ``~``, for a place where lading keeps things.

    Where there is no home it is below :data:`NO_HOME`: a folder called ``~`` must never be made.
    """
    found = expand_home(path)
    if found.parts[:1] and found.parts[0].startswith("~"):
        return NO_HOME.joinpath(*found.parts[1:])

    return found.absolute()


def is_there(path: str | Path) -> bool:
    """Whether something is at ``path``, as far as can be told: not where one may not look, unlike ``Path.exists``."""
    try:
        os.stat(path)
    except (OSError, ValueError):  # the latter of a name with a NUL in it
        return False

    return True


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class UnfitFileError(OSError):
    """Something at a path that is not read: it is not a regular file, or is too large."""


def require_regular(path: Path, found: os.stat_result) -> None:
    """Raise unless ``found`` is the state of a regular file.

    :raises UnfitFileError: it is that of something else.
    """
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UnfitFileError(errno.EINVAL, f"expected a regular file, found {kind}", str(path))


def read_regular(path: Path, *, at_most: int) -> bytes:
    """Read the regular file that ``path`` leads to, through symbolic links too.

    Never waits: opening anything else can block (a FIFO) or act (a device).

    :param at_most: bytes; of a larger file nothing is read.

    :raises UnfitFileError: it is not a regular file, or is larger.
    :raises OSError: nothing is there, or it cannot be read.
    """
    require_regular(path, os.stat(path))
    # Another file may take the place of the one that was looked at, and one that is being written grows.
    with open(path, "rb", opener=_open_at_once) as file:
        found = os.fstat(file.fileno())
        require_regular(path, found)
        data = file.read(at_most + 1) if found.st_size <= at_most else b""
    size = max(found.st_size, len(data))
    if size > at_most:
        raise UnfitFileError(errno.EFBIG, f"expected a file of at most {at_most:,} bytes, found {size:,}", str(path))

    return data


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def file_system_type(path: Path) -> str:
    """The type of the file system that holds ``path`` (``ext4``, ``nfs4`` …); empty where the system does not say."""
    return _mount(path)[0]


def on_network(path: Path) -> bool:
    """Whether ``path`` lies on a file system that is shared between hosts."""
    return _NETWORK.fullmatch(file_system_type(path)) is not None


def place_id(path: Path) -> str:
    """Return the place where ``path`` means this file: this machine, or wherever the same network file system is.

    Containers have no machine id and a new host name each time, while what they share is on the same volume: there
    the file system tells.
    """
    if on_network(path):
        return ":".join(_mount(path))
    if machine := _machine_id():
        return machine
    number = _file_system_id(path)

    return f"volume:{number:x}" if number else host_id()


@lru_cache(maxsize=64)
def _mount(path: Path) -> tuple[str, str]:
    """The type and the source of the file system that holds ``path``."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""

    try:
        device = os.stat(path).st_dev
    except OSError:
        return _mount(path.parent) if path != path.parent else ("", "")

    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(mounts):  # the mount that came last covers the ones before it
        # https://www.kernel.org/doc/Documentation/filesystems/proc.txt, 3.5: "… major:minor … - type source options"
        fields, _, behind = line.partition(" - ")
        if fields.split(" ")[2] == wanted:
            kind, source, *_ = [*behind.split(" "), ""]
            return kind, source

    return "", ""


def host_id() -> str:
    """Return a name for this machine that survives restarts, as far as it has one; else its host name."""
    return _machine_id() or os.uname().nodename


@lru_cache(maxsize=1)
def _machine_id() -> str | None:
    # https://www.freedesktop.org/software/systemd/man/machine-id.html
    for source in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(source).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if re.fullmatch(r"[0-9a-f]{32}", text):  # images hold none, or the word `uninitialized`
            return text

    return None


@lru_cache(maxsize=256)
def _file_system_id(path: Path) -> int:
    """Return a number of the file system that holds ``path``; zero where it has none."""
    try:
        return os.statvfs(path).f_fsid
    except OSError:
        return _file_system_id(path.parent) if path != path.parent else 0
