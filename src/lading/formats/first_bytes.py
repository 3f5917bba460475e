"""Detection of a file's format by its first bytes, as its name may be wrong.

Sources: the specifications of the formats, and the signatures in the database of the `file` program.
"""

from __future__ import annotations

import re
import struct

from lading.errors import LadingError, NotSupportedError
from lading.formats.files import LFS_POINTER, corrupt, lfs_pointer_error
from lading.formats.folder import is_checkpoint_file, is_other_format, is_torch_format, not_supported
from lading.formats.manifest import Format
from lading.formats.safetensors import MAX_HEADER_SIZE, PREFIX_SIZE
from lading.formats.torch_save.archive import SIGNATURE as ZIP

SIZE = 512
"""The number of first bytes that are examined; a file may have fewer."""

_TORCH_PICKLE = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19[.\x94]", re.DOTALL)
"""The start of a ``torch.save`` file that is not a zip archive: a pickled magic number."""

_TORCH_RECORD = re.compile(r"[^/]+/(?:data\.pkl|data/[^/]+|byteorder|version|constants\.pkl|code/.*|\.\w+(?:/\w+)?)")
"""The name of the first file in zip archives that torch writes."""

_OTHERS = (
    (b"GGUF", "a GGUF file"), (b"lmgg", "a GGML file"), (b"tjgg", "a GGML file"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them"), (b"\x93NUMPY", "an array of NumPy"),
    (b"PAR1", "a Parquet file"), (b"SQLite format 3\0", "an SQLite database"), (b"\x7fELF", "a program"),
)  # fmt: skip
"""Signatures of unsupported formats that may hold weights or tables."""

_COMPRESSED = (
    (b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x1f\x9d", "compress"), (b"LZIP", "lzip"), (b"\x04\x22\x4d\x18", "lz4"),
)  # fmt: skip

_NOT_CHECKPOINTS = (
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"), (b"Rar!\x1a\x07", "a RAR archive"), (b"%PDF-", "a PDF document"),
    (b"\x89PNG\r\n\x1a\n", "a picture"), (b"\xff\xd8\xff", "a picture"),
)  # fmt: skip

_HTML = re.compile(rb"\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL)
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]{8,}")


def format_of(head: bytes, *, name: str, label: str) -> Format:
    """Return the format of the file that begins with ``head``.

    If the bytes are not decisive, the name is; the reader of that format then reports what is wrong.

    :param head: the first :data:`SIZE` bytes of the file, or all if it has fewer.
    :param name: the name of the file, whose suffix is that of the expected format.
    :param label: the path or the address of the file, for the error.

    :raises NotSupportedError: the format is not supported.
    :raises CorruptModelCheckpointError: it is not a checkpoint, but for example a web page or a Git LFS pointer.
    """
    if _is_safetensors(head):
        return "safetensors"
    if is_torch(head):
        return "torch"
    if is_other_format(name):
        raise not_supported(label, repr(name))
    if error := _other(head, name, label):
        raise error
    if (shown := _text(head)) is not None:
        raise _unexpected(label, f"a text that begins with {shown!r}")
    if is_torch_format(name) or head[:1] == b"\x80":
        return "torch"
    if head.startswith(ZIP):
        raise _unexpected(label, f"a zip archive, whose first file is {_first_record(head)[:80]!r}")

    return "safetensors"


def is_checkpoint(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is certainly a checkpoint of a supported format."""
    return _is_safetensors(head) or is_torch(head)


def is_torch(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is certainly one that ``torch.save`` or TorchScript wrote."""
    if head.startswith(ZIP):
        return _TORCH_RECORD.fullmatch(_first_record(head)) is not None

    return _TORCH_PICKLE.match(head) is not None


def is_tar(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is a tar archive."""
    return head[257:262] == b"ustar"


def compressor_of(head: bytes) -> str | None:
    """Return the program that compressed a file that begins with ``head``; ``None`` where none did."""
    return next((program for signature, program in _COMPRESSED if head.startswith(signature)), None)


def _is_safetensors(head: bytes) -> bool:
    # A text does not match: eight letters are a length above the limit.
    length = int.from_bytes(head[:PREFIX_SIZE], "little")

    return head[PREFIX_SIZE : PREFIX_SIZE + 1] == b"{" and 2 <= length <= MAX_HEADER_SIZE


def _first_record(head: bytes) -> str:
    """Return the name of the first file in a zip archive, as far as ``head`` goes."""
    size = struct.unpack_from("<H", head, 26)[0] if len(head) >= 30 else 0

    return head[30 : 30 + size].decode("utf-8", "replace")


def _other(head: bytes, name: str, label: str) -> LadingError | None:
    """Return the error for a file that is recognized as something else; ``None`` if it is not recognized."""
    if head.startswith(LFS_POINTER):
        return lfs_pointer_error(label)
    if is_tar(head):
        return NotSupportedError(
            f"{label}: expected a path to a member of this tar archive, as {name}/model.pt, found that of the archive."
        )
    for signature, what in _OTHERS:
        if head.startswith(signature):
            return _unexpected(label, what) if is_checkpoint_file(name) else not_supported(label, what)
    if program := compressor_of(head):
        return NotSupportedError(
            f"{label}: expected a file of safetensors or of `torch.save`, found one that is compressed by "
            f"{program}. Decompress it first."
        )
    for signature, what in _NOT_CHECKPOINTS:
        if head.startswith(signature):
            return _unexpected(label, what)
    if _HTML.match(head):
        return _unexpected(
            label,
            "a web page",
            hint="Servers send one in place of a file that requires a login or an agreement. Fetch the file again, "
            "with a token or from its publisher.",
        )

    return None


def _unexpected(label: str, found: str, hint: str = "Fetch the checkpoint again, or give its own path.") -> LadingError:
    return corrupt(label, "", expected="a file of safetensors or of `torch.save`", found=found, hint=hint)


def _text(head: bytes) -> str | None:
    """Return the start of a text; ``None`` if ``head`` is not text."""
    if not _TEXT.fullmatch(head):
        return None
    try:
        return head[:-3].decode()[:60] if len(head) == SIZE else head.decode()[:60]
    except UnicodeDecodeError:
        return None
