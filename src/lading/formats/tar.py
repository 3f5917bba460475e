"""Uncompressed tar archives: where the bytes of one member are. Nothing is extracted.

Source: POSIX.1-2017, *pax*, sections "ustar Interchange Format" and "pax Extended Header"; for long names and large
sizes also the GNU format, https://www.gnu.org/software/tar/manual/html_node/Standard.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.files import corrupt

BLOCK = 512

_MAX_EXTENDED = 1_000_000
"""Bytes of an extended header."""

_MAX_MEMBERS = 100_000

_KINDS = {
    b"1": "a link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device", b"5": "a folder",
    b"6": "a FIFO", b"S": "a sparse file", b"M": "a part of a file", b"D": "a list of files", b"V": "a volume's name",
}  # fmt: skip

_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x9d": "compress",
    b"LZIP": "lzip", b"\x04\x22\x4d\x18": "lz4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int
    size: int
    kind: str
    """Empty for a regular file, else what it is instead."""


def find_member(file: BinaryIO, name: str, *, size: int, label: str) -> tuple[int, int]:
    """(offset of its first byte, bytes) of the member ``name`` of the tar archive ``file``.

    All headers of the archive are read: a name that comes twice means two things to two readers.

    :param size: bytes of the archive.

    :raises CheckpointNotFoundError: it has no such member.
    :raises CorruptModelCheckpointError: it is no tar archive, or damaged, or has two members of that name.
    :raises NotSupportedError: the archive is compressed, or the member is no regular file.
    :raises OSError: the file cannot be read.
    """
    wanted = _plain(name)
    found: _Entry | None = None
    names: list[str] = []

    for member, entry in _Reader(file, size, label).members():
        if member == wanted:
            if found is not None:
                raise corrupt(label, f"member {name!r}", expected="one member of that name", found="another one")
            found = entry
        if not entry.kind and len(names) < 8:
            names.append(member)

    if found is None:
        raise CheckpointNotFoundError(
            label, f"{label}: expected a member {name!r}, found {', '.join(map(repr, names)) or 'none at all'}."
        )
    if found.kind:
        raise NotSupportedError(
            f"{label}: member {name!r}: expected a regular file, found {found.kind}. Name the file itself, or unpack "
            "the archive and give the path of the folder."
        )

    return found.offset, found.size


def _plain(name: str) -> str:
    """A member's name without the ``./`` that some writers put before it."""
    while name.startswith("./"):
        name = name[2:]

    return name.rstrip("/")


class _Reader:
    def __init__(self, file: BinaryIO, size: int, label: str) -> None:
        self._file = file
        self._size = size
        self._label = label

    def members(self) -> list[tuple[str, _Entry]]:
        self._refuse_compressed()
        found: list[tuple[str, _Entry]] = []
        at = 0
        extended: dict[str, str] = {}
        while True:
            header = self._read(at, BLOCK)
            if not header.strip(b"\0"):
                return found
            if len(found) >= _MAX_MEMBERS:
                raise self._fail(at, f"at most {_MAX_MEMBERS} members", "more")

            kind, size = self._check(header, at)
            if kind in (b"x", b"g", b"L", b"K"):
                extended |= self._extended(kind, at, size)
                at = self._behind(at, size)
                continue

            name = extended.get("path") or self._name(header, at)
            if "size" in extended:
                size = self._decimal(extended["size"], at)
            what = _KINDS.get(kind, "" if kind in (b"0", b"\0", b"7") else f"something of the type {kind!r}")
            if any(key.startswith("GNU.sparse") for key in extended):
                what = _KINDS[b"S"]
            if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0  # what the field says of these is not behind the header
            found.append((_plain(name), _Entry(at + BLOCK, size, what)))
            at = self._behind(at, size)
            extended = {}

    def _refuse_compressed(self) -> None:
        self._file.seek(0)
        head = self._file.read(8)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise NotSupportedError(
                    f"{self._label}: expected an uncompressed tar archive, found one that {name} compressed: its "
                    "members are not ranges of its bytes. Decompress it first."
                )

    def _fail(self, at: int, expected: str, found: str) -> CorruptModelCheckpointError:
        return corrupt(self._label, f"tar header at {at}", expected=expected, found=found)

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        data = self._file.read(size)
        if len(data) != size:
            raise self._fail(at, f"{size} bytes", f"{len(data)}, and the end of the file")

        return data

    def _behind(self, at: int, size: int) -> int:
        end = at + BLOCK + size
        if end > self._size:
            raise self._fail(at, f"a member within the {self._size} bytes of the file", f"one that ends at {end}")

        return -(-end // BLOCK) * BLOCK

    def _check(self, header: bytes, at: int) -> tuple[bytes, int]:
        """The kind and the size of a member, once the checksum is right."""
        stated = self._number(header[148:156], at)
        unsigned = sum(header[:148]) + 8 * 0x20 + sum(header[156:])
        if stated != unsigned:
            raise self._fail(at, f"the checksum {unsigned}", f"{stated}")
        if header[257:262] != b"ustar":
            raise self._fail(at, "'ustar', as all archives of this century have", repr(header[257:262]))

        return header[156:157], self._number(header[124:136], at)

    def _number(self, field: bytes, at: int) -> int:
        if field[0] == 0x80:  # what does not fit into octal digits, as GNU tar writes it
            return int.from_bytes(field[1:], "big")
        digits = field.strip(b" \0")
        if not digits or set(digits) - set(b"01234567"):
            raise self._fail(at, "a number in octal digits", repr(field))

        return int(digits, 8)

    def _decimal(self, text: str, at: int) -> int:
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise self._fail(at, "a size in decimal digits", repr(text[:40]))

        return int(text)

    def _name(self, header: bytes, at: int) -> str:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""

        return self._text(prefix + b"/" + name if prefix else name, at)

    def _text(self, data: bytes, at: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._fail(at, "names in UTF-8", repr(data[:80])) from None

    def _extended(self, kind: bytes, at: int, size: int) -> dict[str, str]:
        """What an extended header says of the member behind it."""
        if size > _MAX_EXTENDED:
            raise self._fail(at, f"an extended header of at most {_MAX_EXTENDED} bytes", f"one of {size}")
        data = self._read(at + BLOCK, size)
        if kind == b"K":
            return {}
        if kind == b"L":
            return {"path": self._text(data.rstrip(b"\0"), at)}

        records: dict[str, str] = {}
        begin = 0
        while begin < len(data):
            # "LENGTH KEY=VALUE\n", where LENGTH is in decimal and counts all of it
            digits, space, _ = data[begin : begin + 20].partition(b" ")
            length = self._decimal(digits.decode("latin-1"), at)
            record = data[begin + len(digits) + 1 : begin + length]
            key, equals, value = record.partition(b"=")
            if not space or not equals or not value.endswith(b"\n") or begin + length > len(data):
                raise self._fail(at, "records of a pax header", repr(data[begin : begin + 80]))
            if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
                records[self._text(key, at)] = self._text(value[:-1], at)
            begin += length
        if kind == b"g" and records:
            raise self._fail(at, "no name or size that holds for all members", f"{sorted(records)}")

        return records
