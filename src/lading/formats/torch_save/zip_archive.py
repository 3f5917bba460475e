"""Zip archives as ``torch.save`` writes them: where each record's bytes are, without reading any of them.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5, of which this reads what is needed and refuses the rest. The
records of a checkpoint are *stored*, so that each is a range of bytes of the file. Two readers of a zip archive may see
two different archives in one file, when its local headers and its central directory disagree, when names repeat, or
when records overlap. Here all of these are errors.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lading.errors import CorruptModelCheckpointError
from lading.formats.files import corrupt

MAX_DIRECTORY_SIZE = 100_000_000
"""Bytes of the central directory; the limit that the header of a safetensors file has, too."""

MAX_NAME_SIZE = 1024
"""Bytes of a record's name."""

SIGNATURE = b"PK\x03\x04"
"""The first bytes of an archive that holds a record."""

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")

_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_ZIP64 = 0x0001
"""The extra field that holds what does not fit into 32 bits."""

_SIZES_BEHIND, _UTF8 = 0x0008, 0x0800
"""The flags that a record may have: its sizes come in a descriptor behind it, its name is UTF-8."""


_CRC_CHUNK = 1 << 20
"""Bytes whose CRC is taken at once."""


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one record."""

    offset: int
    """Where they begin, counted from the beginning of the file."""
    size: int
    crc: int


def read_directory(file: BinaryIO, *, base: int, size: int, label: str) -> Mapping[str, Record]:
    """The records of the archive that lies in ``file`` at ``base``, by name.

    :param size: bytes of the archive.
    :param label: the path or the address of the file, for the error.

    :raises CorruptModelCheckpointError: it is no zip archive, or not one whose records are plain ranges of bytes.
    :raises OSError: the file cannot be read.
    """
    archive = _Archive(file, base, size, label)
    first, length, count = archive.find_directory()
    directory = archive.read(first, length, "central directory")

    records: dict[str, Record] = {}
    extents: list[tuple[int, int, str]] = []
    at = 0
    for _ in range(count):
        name, flags, crc, nbytes, header, at = archive.central(directory, at)
        if name in records:
            raise archive.fail(f"record {name!r}", "one record of that name", "another one")
        offset = archive.local(name, flags, crc, nbytes, header)
        records[name] = Record(base + offset, nbytes, crc)
        extents.append((header, offset + nbytes, name))

    if at != length:
        raise archive.fail("central directory", f"{count} records in {length} bytes", f"that they take {at}")

    extents.sort()
    for (_, end, name), (begin, _, other) in zip(extents, [*extents[1:], (first, 0, "")], strict=True):
        if end > begin:
            raise archive.fail(
                f"record {name!r}",
                f"an end at or before {begin}, where {f'{other!r} begins' if other else 'the directory begins'}",
                f"one at {end}",
            )

    return records


def read_record(file: BinaryIO, record: Record, *, label: str, where: str) -> bytes:
    """Return all bytes of a record, whose CRC is checked.

    :raises CorruptModelCheckpointError: the CRC is not the one of the directory.
    """
    file.seek(record.offset)
    data = file.read(record.size)
    if len(data) != record.size:
        raise corrupt(label, where, expected=f"{record.size} bytes", found=f"{len(data)}")
    require_crc(record, data, label=label, where=where)

    return data


def require_crc(record: Record, data: bytes | memoryview, *, label: str, where: str) -> None:
    """Check all bytes of a record against its CRC; torch writes 0 where it was told to compute none.

    :raises CorruptModelCheckpointError: it is not the one of the directory.
    """
    if record.crc and (crc := zlib.crc32(data)) != record.crc:
        raise corrupt(label, where, expected=f"bytes with the CRC {record.crc:08x}", found=f"{crc:08x}")


def damaged_record(path: Path) -> tuple[str, int, int] | None:
    """Return the name of a record whose bytes do not have its CRC, and both CRCs; ``None`` where all have it.

    A file that is not a zip archive has no records. All of it is read, at the speed of zlib's CRC.

    :raises CorruptModelCheckpointError: the archive breaks the rules that :func:`read_directory` checks.
    :raises OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None
        size = os.fstat(file.fileno()).st_size
        for name, record in read_directory(file, base=0, size=size, label=str(path)).items():
            file.seek(record.offset)
            crc, left = 0, record.size
            while left and (data := file.read(min(left, _CRC_CHUNK))):
                crc, left = zlib.crc32(data, crc), left - len(data)
            if record.crc not in (0, crc):
                return name, record.crc, crc

    return None


class _Archive:
    """A zip archive in a part of a file; offsets are counted from its beginning."""

    def __init__(self, file: BinaryIO, base: int, size: int, label: str) -> None:
        self._file = file
        self._base = base
        self._size = size
        self._label = label

    def fail(self, where: str, expected: str, found: str) -> CorruptModelCheckpointError:
        return corrupt(self._label, where, expected=expected, found=found)

    def read(self, offset: int, size: int, where: str) -> bytes:
        if offset < 0 or offset + size > self._size:
            raise self.fail(where, f"{size} bytes at {offset}", f"an archive of {self._size} bytes")
        self._file.seek(self._base + offset)
        data = self._file.read(size)
        if len(data) != size:
            raise self.fail(where, f"{size} bytes at {offset}", f"{len(data)}")

        return data

    def find_directory(self) -> tuple[int, int, int]:
        """(offset, size, number of records) of the central directory."""
        where = "end of the archive"
        at = self._size - _END.size
        signature, disk, first_disk, here, count, size, offset, comment = _END.unpack(self.read(at, _END.size, where))
        if signature != b"PK\x05\x06" or comment:
            # Without a comment there is one place for this record alone, so nobody else can find another directory.
            raise self.fail(where, "the record that ends a zip archive, without a comment", repr(signature))

        end = at
        locator = self.read(at - _LOCATOR_64.size, _LOCATOR_64.size, where) if at >= _LOCATOR_64.size else b""
        if locator[:4] == b"PK\x06\x07":
            _, disk_64, end, disks = _LOCATOR_64.unpack(locator)
            large = _END_64.unpack(self.read(end, _END_64.size, where))
            if large[0] != b"PK\x06\x06" or end + _END_64.size + _LOCATOR_64.size != at or large[1] != 44:
                raise self.fail(where, "a ZIP64 record right before its locator", f"{large[0]!r} at {end}")
            if disk_64 or disks > 1 or large[4] or large[5]:
                raise self.fail(where, "an archive in one part", "one in several")
            for value, full, wide in zip(
                (here, count, size, offset), (_FULL_16, _FULL_16, _FULL_32, _FULL_32), large[6:], strict=True
            ):
                if value not in (full, wide):
                    raise self.fail(where, f"{value}, as its first record says", f"{wide}")
            here, count, size, offset = large[6:]

        if disk or first_disk or here != count:
            raise self.fail(where, "an archive in one part", "one in several")
        if offset + size != end:
            raise self.fail(where, f"a central directory that ends at {end}", f"one that ends at {offset + size}")
        if size > MAX_DIRECTORY_SIZE or count * _CENTRAL.size > size:
            raise self.fail(
                "central directory",
                f"at most {MAX_DIRECTORY_SIZE} bytes, and at least {_CENTRAL.size} for each record",
                f"{count} records in {size} bytes",
            )

        return offset, size, count

    def central(self, data: bytes, at: int) -> tuple[str, int, int, int, int, int]:
        """(name, flags, CRC, bytes, offset of the local header, end) of the entry at ``at`` of the directory."""
        where = "central directory"
        if at + _CENTRAL.size > len(data):
            raise self.fail(where, "another entry", "its end")
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk = fields[:14]
        header = fields[16]
        at += _CENTRAL.size
        end = at + name_size + extra_size + comment_size
        if signature != b"PK\x01\x02" or end > len(data):
            raise self.fail(where, "an entry", f"{signature!r} and {end} of {len(data)} bytes")

        name = self._name(data[at : at + name_size])
        where = f"record {name!r}"
        extra = data[at + name_size : at + name_size + extra_size]
        size, packed, header = self._wide(extra, (size, packed, header), where)

        if method or packed != size:
            raise self.fail(where, "bytes that are stored as they are", f"method {method}, {packed} bytes for {size}")
        if flags & ~(_SIZES_BEHIND | _UTF8) or disk:
            raise self.fail(where, "neither encryption nor parts", f"flags {flags:#06x} and disk {disk}")

        return name, flags, crc, size, header, end

    def local(self, name: str, flags: int, crc: int, size: int, header: int) -> int:
        """Check the local header of a record; the offset of the record's bytes."""
        where = f"local header of {name!r}"
        # One read for nearly all: `torch.save` pads the extra field up to the next 64 bytes.
        data = self.read(header, min(_LOCAL.size + 512, max(self._size - header, _LOCAL.size)), where)
        fields = _LOCAL.unpack_from(data)
        signature, _, its_flags, method, _, _, its_crc, packed, its_size, name_size, extra_size = fields
        begin: int = _LOCAL.size + name_size
        if begin + extra_size > len(data):
            data = self.read(header, begin + extra_size, where)
        its_name = data[_LOCAL.size : begin]
        if signature != SIGNATURE or its_name != name.encode():
            raise self.fail(where, "what the central directory says", f"{signature!r} {its_name!r}"[:80])

        its_size, packed = self._wide(data[begin : begin + extra_size], (its_size, packed), where)
        told = (its_crc, packed, its_size)
        if its_flags != flags or method or (told != (crc, size, size) and (any(told) or not flags & _SIZES_BEHIND)):
            raise self.fail(
                where,
                f"flags {flags:#06x}, method 0, CRC {crc:08x} and {size} bytes, as in the central directory",
                f"flags {its_flags:#06x}, method {method}, CRC {its_crc:08x} and {packed} bytes for {its_size}",
            )

        offset = header + begin + int(extra_size)
        if offset + size > self._size:
            raise self.fail(where, f"{size} bytes at {offset}", f"an archive of {self._size} bytes")

        return offset

    def _name(self, data: bytes) -> str:
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise self.fail("central directory", "names in UTF-8", repr(data[:80])) from None
        # It is never a path here, but the next tool to open the archive may make it one.
        if not name.isprintable() or "\\" in name or ".." in name.split("/") or name.startswith("/"):
            raise self.fail("central directory", "plain relative names", repr(name[:80]))
        if not 0 < len(data) <= MAX_NAME_SIZE:
            raise self.fail("central directory", f"names of 1 to {MAX_NAME_SIZE} bytes", f"one of {len(data)}")

        return name

    def _wide(self, extra: bytes, values: tuple[int, ...], where: str) -> list[int]:
        """``values``, those that did not fit into 32 bits from the ZIP64 extra field."""
        at, wide = 0, b""
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, at)
            if at + 4 + size > len(extra):
                break  # padding that some writers leave; a field that is needed would be missed below
            if kind == _ZIP64:
                wide = extra[at + 4 : at + 4 + size]
            at += 4 + size

        result, at = [], 0
        for value in values:
            if value == _FULL_32:
                if at + 8 > len(wide):
                    raise self.fail(where, "a ZIP64 field with what does not fit into 32 bits", "none")
                (value,) = struct.unpack_from("<Q", wide, at)
                at += 8
            result.append(value)

        return result
