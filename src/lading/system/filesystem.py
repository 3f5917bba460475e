"""Files and file systems: identity, kind, and location."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

# Network file systems have no shared memory between hosts (so no WAL), and their locks and direct I/O differ.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|lustre|gpfs|ceph|beegfs|afs|glusterfs|pvfs2|9p|wekafs|fuse\.(?!fuse-overlayfs).+"
)


@dataclass(frozen=True, slots=True)
class FileStat:
    """The state of a file: it changes whenever the bytes do, and can be compared without reading them."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def from_stat(cls, stat: os.stat_result) -> FileStat:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


def path_text(path: Path) -> str:
    """Return a path as the catalog keeps it: in UTF-8, in every locale."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def text_path(text: str) -> Path:
    """Return the path that :func:`path_text` returned as ``text``, in any locale."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))


def expand_home(path: str | Path) -> Path:
    """Return ``path`` with a leading ``~`` replaced by the home folder.

    If the user is unknown or has no home (in a container, under a number), return ``path`` unchanged: it then does not
    exist, like any other wrong path.
    """
    path = text_path(path) if isinstance(path, str) else path
    try:
        return path.expanduser()
    except RuntimeError:
        return path


NO_HOME = Path(os.devnull, "no-home")
"""The substitute for the home folder of a user without one: it cannot exist or be created."""


def storage_path(path: str | Path) -> Path:
    """Return the absolute path of a file or folder that lading may create, with a leading ``~`` expanded.

    Without a home folder, the result is below :data:`NO_HOME`, so that no folder named ``~`` is ever created.
    """
    found = expand_home(path)
    if found.parts[:1] and found.parts[0].startswith("~"):
        return NO_HOME.joinpath(*found.parts[1:])

    return found.absolute()


def path_exists(path: str | Path) -> bool:
    """Return whether something exists at ``path``; ``False``, not an error as by ``Path.exists``, if it is unknown."""
    try:
        os.stat(path)
    except (OSError, ValueError):  # a name with a NUL in it raises ValueError
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
    """A path that lading does not read, because it is not a regular file or is too large."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, following symbolic links.

    Anything else is not opened, as that can block (a FIFO) or have effects (a device).

    :raises UnfitFileError: it is not a regular file.
    :raises OSError: it does not exist, or cannot be opened.
    """
    _require_regular(path, os.stat(path))

    return open(path, "rb", opener=_open_without_blocking)


def read_regular(path: Path, *, at_most: int) -> bytes:
    """Read a regular file as :func:`open_regular` opens it.

    :param at_most: the largest accepted size in bytes.

    :raises UnfitFileError: it is not a regular file, or is larger.
    :raises OSError: it does not exist, or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(at_most + 1) if size <= at_most else b""  # a file that is being written grows
    size = max(size, len(data))
    if size > at_most:
        raise UnfitFileError(errno.EFBIG, f"expected a file of at most {at_most:,} bytes, found {size:,}", str(path))

    return data


def write_text(path: Path, parts: Iterable[str]) -> None:
    """Write a file, as a whole or not at all; write to pipes and devices directly.

    :param parts: the text, in UTF-8; they may raise.

    :raises OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8") as file:
            file.writelines(parts)
        return

    path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.writelines(parts)
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a folder to the disk, which makes renames in it durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(fd)


def _require_regular(path: str | Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise UnfitFileError(errno.EINVAL, f"expected a regular file, found {kind}", str(path))


def _open_without_blocking(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(path, os.fstat(fd))  # the path may be replaced after the first check
    except UnfitFileError:
        os.close(fd)
        raise

    return fd


def file_system_type(path: Path) -> str:
    """Return the type of the file system that holds ``path`` (``ext4``, ``nfs4`` …); empty if it is unknown."""
    return _mount(path)[0]


def on_network(path: Path) -> bool:
    """Return whether ``path`` is on a network file system."""
    return _NETWORK.fullmatch(file_system_type(path)) is not None


def location_id(path: Path) -> str:
    """Return an id of the place where ``path`` means the same file: this machine, or the network file system.

    Containers have no machine id and a new host name at each start, but share volumes; there the id is that of the
    file system.
    """
    if on_network(path):
        return ":".join(_mount(path))
    if machine := _machine_id():
        return machine
    number = _file_system_id(path)

    return f"volume:{number:x}" if number else host_id()


@lru_cache(maxsize=64)
def _mount(path: Path) -> tuple[str, str]:
    """Return the type and the source of the file system that holds ``path``."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "", ""

    try:
        device = os.stat(path).st_dev
    except OSError:
        return _mount(path.parent) if path != path.parent else ("", "")

    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(mounts):  # the last mount covers the earlier ones
        # https://www.kernel.org/doc/Documentation/filesystems/proc.txt, 3.5: "… major:minor … - type source options"
        fields, _, behind = line.partition(" - ")
        if fields.split(" ")[2] == wanted:
            kind, source, *_ = [*behind.split(" "), ""]
            return kind, source

    return "", ""


def host_id() -> str:
    """Return an id of this machine that survives restarts; its host name without one."""
    return _machine_id() or os.uname().nodename


@lru_cache(maxsize=1)
def _machine_id() -> str | None:
    # https://www.freedesktop.org/software/systemd/man/machine-id.html
    for source in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            text = Path(source).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if re.fullmatch(r"[0-9a-f]{32}", text):  # in images it is missing, or the word `uninitialized`
            return text

    return None


@lru_cache(maxsize=256)
def _file_system_id(path: Path) -> int:
    """Return the id of the file system that holds ``path``; zero if it has none."""
    try:
        return os.statvfs(path).f_fsid
    except OSError:
        return _file_system_id(path.parent) if path != path.parent else 0
