"""Zip archives as ``torch.save`` writes them: the range of bytes of each record, without reading any of them.

Source: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3 to 4.5. :mod:`zipfile` reads the entries of the central directory.
This module does the rest, since two readers may see two different archives in one file if its local headers and its
central directory disagree, if names repeat, or if records overlap: all of these are errors. The records of a checkpoint
are *stored*, so that each is a range of bytes of the file.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lading.errors import CorruptModelCheckpointError, RefusedPickleError
from lading.formats.files import corrupt

MAX_DIRECTORY_SIZE = 100_000_000
"""The most bytes of the central directory, as for the header of a safetensors file."""

MAX_RECORDS = 1_000_000
"""The most records of an archive; each takes about 600 bytes of memory."""

MAX_NAME_SIZE = 1024
"""The most bytes of a record's name, and of its extra fields, which zipfile reads in quadratic time."""

SIGNATURE = b"PK\x03\x04"
"""The first bytes of an archive with a record."""

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_CENTRAL_SIZE = 46
_CENTRAL_LENGTHS = struct.Struct("<28x3H")
_LOCAL = struct.Struct("<4s5H3L2H")

_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF

_SIZES_BEHIND, _UTF8 = 0x0008, 0x0800
"""The flags that a record may have: its sizes are in a descriptor after it, its name is UTF-8."""

_CRC_CHUNK = 1 << 20
"""The bytes of one step of a CRC."""

_PROGRAMS = {
    "/constants.pkl": "a TorchScript archive, which is a program",
    "/.data/extern_modules": "an archive of torch.package, which holds Python code",
}
"""The archives of torch that are not checkpoints, by the end of the name of a record that all of them have."""


@dataclass(frozen=True, slots=True)
class Record:
    """The bytes of one record."""

    name: str
    offset: int
    """The first byte, counted from the beginning of the file."""
    size: int
    crc: int
    """Its checksum; 0 if it is not known."""


def read_directory(file: BinaryIO, *, base: int, size: int, label: str) -> Mapping[str, Record]:
    """Return the records of the archive in ``file`` at ``base``, by name.

    :param size: the bytes of the archive.
    :param label: the path or the address of the file, for the error.

    :raises CorruptModelCheckpointError: it is not a zip archive whose records are plain ranges of bytes.
    :raises RefusedPickleError: it is an archive of TorchScript or of torch.package.
    :raises OSError: the file cannot be read.
    """
    archive = _Archive(file, base, size, label)
    begin, directory = archive.read_central()
    # The directory alone: its place in the file was checked, so zipfile need not search for it.
    end = _END.pack(b"PK\x05\x06", 0, 0, 0, 0, len(directory), 0, 0)
    try:
        with zipfile.ZipFile(io.BytesIO(directory + end), metadata_encoding="utf-8") as opened:
            entries = opened.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise archive.fail("central directory", "entries of a zip archive", str(error)[:200]) from None
    _refuse_programs({entry.orig_filename for entry in entries}, label)

    records: dict[str, Record] = {}
    last = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name, where = entry.orig_filename, f"record {entry.orig_filename!r}"
        archive.require_stored(entry, where)
        if name in records:
            raise archive.fail(where, "one record of that name", "another one")
        if entry.header_offset < last:
            raise archive.fail(where, f"a begin at or behind {last}, where another ends", f"{entry.header_offset}")
        offset = archive.locate(entry)
        last = offset + entry.file_size
        if last > begin:
            raise archive.fail(where, f"an end at or before {begin}, where the directory begins", f"one at {last}")
        records[name] = Record(name, base + offset, entry.file_size, entry.CRC)

    return records


def read_record(file: BinaryIO, record: Record, *, label: str) -> bytes:
    """Return all bytes of a record after a check of its CRC.

    :raises CorruptModelCheckpointError: the CRC differs from that of the directory.
    """
    file.seek(record.offset)
    data = file.read(record.size)
    if len(data) != record.size:
        raise corrupt(label, f"record {record.name!r}", expected=f"{record.size} bytes", found=f"{len(data)}")
    require_crc(record, data, label=label)

    return data


def require_crc(record: Record, data: bytes | memoryview, *, label: str) -> None:
    """Check all bytes of a record against its CRC; torch writes 0 if its option turns the computation off.

    :raises CorruptModelCheckpointError: the CRC differs from that of the directory.
    """
    if record.crc and (crc := zlib.crc32(data)) != record.crc:
        where, expected = f"record {record.name!r}", f"bytes with the CRC {record.crc:08x}"
        raise corrupt(label, where, expected=expected, found=f"{crc:08x}")


def damaged_record(path: Path) -> tuple[str, int, int] | None:
    """Return the name of a record whose bytes do not have its CRC, and both CRCs; ``None`` if all have it.

    A file that is not a zip archive has no records. This reads all of the file, at the speed of zlib's CRC.

    :raises CorruptModelCheckpointError: the archive breaks the rules that :func:`read_directory` checks.
    :raises OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            return None
        size = os.fstat(file.fileno()).st_size
        for record in read_directory(file, base=0, size=size, label=str(path)).values():
            file.seek(record.offset)
            crc, left = 0, record.size
            while left and (data := file.read(min(left, _CRC_CHUNK))):
                crc, left = zlib.crc32(data, crc), left - len(data)
            if record.crc not in (0, crc):
                return record.name, record.crc, crc

    return None


def _refuse_programs(names: Collection[str], label: str) -> None:
    for ending, what in _PROGRAMS.items():
        if any(name.endswith(ending) and name.count("/") == ending.count("/") for name in names):
            raise RefusedPickleError(
                label, f"{label}: expected a state dict, found {what}. Save `model.state_dict()` instead."
            )


class _Archive:
    """A zip archive in a part of a file; offsets count from its beginning."""

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

    def read_central(self) -> tuple[int, bytes]:
        """Return the start of the central directory, and its bytes."""
        begin, size, count = self._find_directory()
        if size > MAX_DIRECTORY_SIZE or count > MAX_RECORDS:
            raise self.fail(
                "central directory",
                f"at most {MAX_DIRECTORY_SIZE} bytes and {MAX_RECORDS} records",
                f"{count} records in {size} bytes",
            )
        data = self.read(begin, size, "central directory")

        at = found = 0
        while at + _CENTRAL_SIZE <= size and found < count:
            lengths = _CENTRAL_LENGTHS.unpack_from(data, at)
            if max(lengths) > MAX_NAME_SIZE:
                raise self.fail("central directory", f"names of at most {MAX_NAME_SIZE} bytes", f"{max(lengths)}")
            at += _CENTRAL_SIZE + sum(lengths)
            found += 1
        if (found, at) != (count, size):
            raise self.fail("central directory", f"{count} records in {size} bytes", f"{found} in {at}")

        return begin, data

    def _find_directory(self) -> tuple[int, int, int]:
        """Return (offset, size, number of records) of the central directory."""
        where = "end of the archive"
        at = self._size - _END.size
        signature, disk, first_disk, here, count, size, offset, comment = _END.unpack(self.read(at, _END.size, where))
        if signature != b"PK\x05\x06" or comment:
            # Without a comment this record has only one possible place, so that no reader finds another directory.
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

        return offset, size, count

    def require_stored(self, entry: zipfile.ZipInfo, where: str) -> None:
        name, size = entry.orig_filename, entry.file_size
        # lading never uses it as a path, but the next tool that opens the archive may.
        if not name or not name.isprintable() or "\\" in name or ".." in name.split("/") or name.startswith("/"):
            raise self.fail("central directory", "plain relative names", repr(name[:80]))
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != size:
            found = f"method {entry.compress_type}, {entry.compress_size} bytes for {size}"
            raise self.fail(where, "bytes that are stored as they are", found)
        if entry.flag_bits & ~(_SIZES_BEHIND | _UTF8) or entry.volume:
            found = f"flags {entry.flag_bits:#06x} and disk {entry.volume}"
            raise self.fail(where, "neither encryption nor parts", found)

    def locate(self, entry: zipfile.ZipInfo) -> int:
        """Check the local header of a record and return the offset of the record's bytes."""
        where = f"local header of {entry.orig_filename!r}"
        name = entry.orig_filename.encode()
        header = self.read(entry.header_offset, _LOCAL.size + len(name), where)
        signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(header)
        if signature != SIGNATURE or name_size != len(name) or header[_LOCAL.size :] != name:
            found = f"{signature!r} {header[_LOCAL.size :]!r}"[:80]
            raise self.fail(where, "what the central directory says", found)

        offset = entry.header_offset + len(header) + int(extra_size)
        if _FULL_32 in (packed, size):
            # Numbers that do not fit into 32 bits are in the first extra field.
            wide = self.read(offset - extra_size, min(extra_size, 20), where)
            if wide[:2] + wide[4:] == struct.pack("<H2Q", 1, entry.file_size, entry.file_size):
                packed = size = entry.file_size

        told = (crc, packed, size)
        central = (entry.CRC, entry.file_size, entry.file_size)
        if flags != entry.flag_bits or method or (told != central and (any(told) or not flags & _SIZES_BEHIND)):
            raise self.fail(
                where,
                f"flags {entry.flag_bits:#06x}, method 0, CRC {entry.CRC:08x} and {entry.file_size} bytes, as in the "
                "central directory",
                f"flags {flags:#06x}, method {method}, CRC {crc:08x} and {packed} bytes for {size}",
            )

        return offset
