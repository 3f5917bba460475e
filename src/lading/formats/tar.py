"""Uncompressed tar archives: the range of bytes of one member, without extraction.

:meth:`tarfile.TarInfo.frombuf` reads each header. This module goes from one to the next, since ``tarfile.TarFile``
before Python 3.11.14 loops forever on a negative size, takes quadratic time and memory for the records of a pax header,
and ignores a damaged header in the middle.

Source: POSIX.1-2017, *pax*, sections "ustar Interchange Format" and "pax Extended Header"; for long names and large
sizes also the GNU format, https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.files import corrupt
from lading.formats.first_bytes import compressor_of, is_tar

_MAX_EXTENDED = 1_000_000
"""The most bytes of an extended header."""

_MAX_MEMBERS = 100_000

_KINDS = {
    tarfile.LNKTYPE: "a link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device", tarfile.DIRTYPE: "a folder", tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}  # fmt: skip

_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
"""The kinds of members without bytes, regardless of the field of their size."""

_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def find_member(file: BinaryIO, name: str, *, size: int, label: str) -> tuple[int, int]:
    """Return (offset of its first byte, bytes) of the member ``name`` of the tar archive ``file``.

    This reads all headers of the archive: a name that occurs twice has two meanings for two readers.

    :param size: the bytes of the archive.

    :raises CheckpointNotFoundError: it has no such member.
    :raises CorruptModelCheckpointError: it is not a tar archive, is damaged, or has two members of that name.
    :raises NotSupportedError: the archive is compressed, or the member is not a regular file.
    :raises OSError: the file cannot be read.
    """
    file.seek(0)
    if program := compressor_of(file.read(8)):
        raise NotSupportedError(
            f"{label}: expected an uncompressed tar archive, found one that {program} compressed: its members are not "
            "ranges of its bytes. Decompress it first."
        )

    wanted = _plain(name)
    found: tarfile.TarInfo | None = None
    names: list[str] = []
    for count, member in enumerate(_Headers(file, size, label).members()):
        if count == _MAX_MEMBERS:
            raise corrupt(label, "", expected=f"at most {_MAX_MEMBERS} members", found="more")
        if _plain(member.name) == wanted:
            if found is not None:
                raise corrupt(label, f"member {name!r}", expected="one member of that name", found="another one")
            found = member
        if member.type in _PLAIN and len(names) < 8:
            names.append(_plain(member.name))

    if found is None:
        raise CheckpointNotFoundError(
            label, f"{label}: expected a member {name!r}, found {', '.join(map(repr, names)) or 'none at all'}."
        )
    if found.type not in _PLAIN:
        raise NotSupportedError(
            f"{label}: member {name!r}: expected a regular file, found "
            f"{_KINDS.get(found.type, f'something of the type {found.type!r}')}. Name the file itself, or unpack the "
            "archive and give the path of the folder."
        )

    return found.offset_data, found.size


def _plain(name: str) -> str:
    """Return a member's name without the ``./`` that some writers put before it."""
    while name.startswith("./"):
        name = name[2:]

    return name.rstrip("/")


class _Headers:
    """The headers of an archive, one after another."""

    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self._file = file
        self._size = size
        self._label = label

    def members(self) -> Iterator[tarfile.TarInfo]:
        at = 0
        extended: dict[bytes, bytes] = {}
        while (block := self._read(at, tarfile.BLOCKSIZE)).strip(b"\0"):
            header = self._header(block, at)
            if header.type in _EXTENDED:
                extended |= self._extended(header, at)
            else:
                if b"size" in extended:
                    header.size = int(extended[b"size"])
                if header.type in _EMPTY:
                    header.size = 0
                if b"path" in extended:
                    header.name = extended[b"path"].decode("utf-8", "surrogateescape")
                if any(key.startswith(b"GNU.sparse") for key in extended):
                    header.type = tarfile.GNUTYPE_SPARSE
                header.offset_data = at + tarfile.BLOCKSIZE
                extended = {}
                yield header

            end = at + tarfile.BLOCKSIZE + header.size
            if end > self._size:
                raise self._fail(at, f"a member within the {self._size} bytes of the file", f"one that ends at {end}")
            at = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    def _fail(self, at: int, expected: str, found: str) -> CorruptModelCheckpointError:
        return corrupt(self._label, f"tar header at {at}", expected=expected, found=found)

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        data = self._file.read(size)
        if len(data) != size:
            raise self._fail(at, f"{size} bytes", f"{len(data)}, and the end of the file")

        return data

    def _header(self, block: bytes, at: int) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise self._fail(at, "a header of a tar archive", str(error)) from None
        if not is_tar(block):
            raise self._fail(at, "'ustar', as all archives of this century have", repr(block[257:262]))
        if header.size < 0:
            raise self._fail(at, "a size of 0 or more bytes", f"{header.size}")

        return header

    def _extended(self, header: tarfile.TarInfo, at: int) -> dict[bytes, bytes]:
        """Return the fields of an extended header about the member after it."""
        if header.size > _MAX_EXTENDED:
            raise self._fail(at, f"an extended header of at most {_MAX_EXTENDED} bytes", f"one of {header.size}")
        data = self._read(at + tarfile.BLOCKSIZE, header.size)
        if header.type == tarfile.GNUTYPE_LONGLINK:
            return {}
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {b"path": data.rstrip(b"\0")}

        records: dict[bytes, bytes] = {}
        begin = 0
        while begin < len(data):
            # "LENGTH KEY=VALUE\n", where LENGTH is decimal and counts all of it
            digits = data[begin : begin + 8].partition(b" ")[0]
            end = begin + int(digits) if digits.isdigit() else begin
            key, equals, value = data[begin + len(digits) + 1 : end].partition(b"=")
            value, newline, rest = value.rpartition(b"\n")
            good = equals and newline and not rest and end <= len(data)
            if not good or (key == b"size" and not (value.isdigit() and len(value) < 20)):
                raise self._fail(at, "records of a pax header", repr(data[begin : begin + 80]))
            if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
                records[key] = value
            begin = end
        if header.type == tarfile.XGLTYPE and records:
            raise self._fail(at, "no name or size that holds for all members", f"{sorted(records)}")

        return records
