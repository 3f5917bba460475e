"""Reader of safetensors headers, and the manifest of one file.

Source: https://github.com/huggingface/safetensors, the section *Format*. A file is 8 bytes, the length of the header in
little-endian order; the header, JSON in UTF-8; and the bytes of the tensors, row-major and little-endian, without
holes. All rules of that page are enforced, including some that the reference reader does not enforce (no duplicate
names, no tensor given as a list, no padding other than spaces).

Neither torch nor the safetensors package is needed.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lading.formats.files import File, corrupt, open_file, refuse_lfs_pointer
from lading.formats.manifest import BITS, Format, Manifest, Shard
from lading.formats.strict_json import SPACE, Reader

PREFIX_SIZE = 8
"""The bytes before the header, which hold its length."""

MAX_HEADER_SIZE = 100_000_000
"""The most bytes of a header, as in the reference reader."""

MAX_NAME_SIZE = 512
"""The most bytes of a tensor's name in UTF-8."""

MAX_RANK = 64
"""The most dims of a tensor; torch has no limit."""

_MAX_LAYOUTS = 10_000
"""The most texts of dtype and shape to remember; models have some hundred."""

_MAX_INT = 2**63 - 1

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The content of a header, in columns of equal length, in the order of the tensors' bytes."""

    names: Sequence[str]
    dtypes: Sequence[str]
    """The dtypes, keys of :data:`lading.formats.manifest.BITS`."""
    shapes: Sequence[tuple[int, ...]]
    offsets: array[int]
    """The offset of each tensor's bytes from the start of the file; type code ``q``."""
    metadata: Mapping[str, str]
    format: Format = "safetensors"


Part = tuple[Shard, Header]
"""A file of a checkpoint, and its header."""


def index_file(path: Path) -> Manifest:
    """Return the manifest of the safetensors file at ``path``; only its header is read.

    :raises CheckpointNotFoundError: ``path`` does not exist.
    :raises CorruptModelCheckpointError: it is not a valid safetensors file.
    :raises OSError: it cannot be read.
    """
    with open_file(path) as file:
        part = read_header(file)

    return join([part])


def read_header(file: File, *, first: bytes | None = None) -> Part:
    """Read the header of a safetensors file.

    :param first: the first bytes of the file, if they were read already; the rest of the header takes one read.

    :raises CorruptModelCheckpointError: it is not a valid safetensors file.
    """
    data = file.read(0, min(PREFIX_SIZE, file.size)) if first is None else first
    length = header_length(data[:PREFIX_SIZE], file_size=file.size, label=file.label)
    data = data[PREFIX_SIZE : PREFIX_SIZE + length]
    if len(data) < length:
        data += file.read(PREFIX_SIZE + len(data), length - len(data))
    if len(data) < length:
        raise corrupt(file.label, "header", expected=f"{length} bytes", found=f"{len(data)}")

    header = parse_header(data, buffer_size=file.size - PREFIX_SIZE - length, label=file.label)

    return Shard(name=file.name, size=file.size), header


def join(parts: Sequence[Part], *, index_name: str | None = None) -> Manifest:
    """Return the manifest of a checkpoint with the files ``parts``, at least one."""
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    shard_ids, offsets = array("I"), array("q")
    for i, (_, header) in enumerate(parts):
        names += header.names
        dtypes += header.dtypes
        shapes += header.shapes
        shard_ids += array("I", [i]) * len(header.names)
        offsets += header.offsets

    return Manifest(
        format="torch" if any(header.format == "torch" for _, header in parts) else "safetensors",
        shards=tuple(shard for shard, _ in parts),
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
        index_name=index_name,
        metadata=parts[0][1].metadata,
    )


def header_length(prefix: bytes, *, file_size: int, label: str) -> int:
    """Return the number of bytes of the header, which begins at :data:`PREFIX_SIZE`.

    :param prefix: the first 8 bytes of the file.
    :param label: the path or the address of the file, for the error.

    :raises CorruptModelCheckpointError: a file of ``file_size`` bytes cannot have a header of that length.
    """
    if len(prefix) < PREFIX_SIZE or file_size < PREFIX_SIZE:
        raise corrupt(
            label, "header length", expected=f"{PREFIX_SIZE} bytes", found=f"a file of {min(len(prefix), file_size)}"
        )

    refuse_lfs_pointer(prefix, label)

    length = int.from_bytes(prefix[:PREFIX_SIZE], "little")
    limit = min(MAX_HEADER_SIZE, file_size - PREFIX_SIZE)
    if length > limit:
        why = "the most that a header may have" if limit == MAX_HEADER_SIZE else f"the file has {file_size}"
        raise corrupt(label, "header length", expected=f"at most {limit} bytes ({why})", found=f"{length}")

    return length


# A tensor's entry as most writers write it, or with its keys sorted. The pattern is loose on dtype and shape, as their
# text is only compared with text that `_tensor` accepted.
_OFFSETS = (
    rf'"data_offsets"{SPACE}:{SPACE}\[{SPACE}(0|[1-9][0-9]{{0,17}}){SPACE},{SPACE}(0|[1-9][0-9]{{0,17}}){SPACE}\]'
)
_LAYOUT = rf'("dtype"{SPACE}:{SPACE}"[^"]*+"{SPACE},{SPACE}"shape"{SPACE}:{SPACE}\[[^\]]*+\])'
_USUAL = re.compile(
    rf"{SPACE}\{{{SPACE}(?:{_LAYOUT}{SPACE},{SPACE}{_OFFSETS}|{_OFFSETS}{SPACE},{SPACE}{_LAYOUT}){SPACE}\}}"
)

_DTYPES = {dtype: dtype for dtype in BITS}


def parse_header(data: bytes | bytearray, *, buffer_size: int, label: str) -> Header:
    """Parse and check a header.

    :param data: the header with its padding, without the 8 bytes before it.
    :param buffer_size: the bytes of the file after the header.
    :param label: the path or the address of the file, for the error.

    :raises CorruptModelCheckpointError: the header breaks a rule of the format. The message names the tensor, and what
        was expected and found.
    """
    if not data.startswith(b"{"):
        raise corrupt(label, "header", expected="'{' as its first byte", found=_first_byte(data))

    reader = Reader(data, label=label, what="header")
    metadata: dict[str, str] = {}
    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    begins, ends = array("q"), array("q")
    layouts: dict[str, _Layout] = {}
    in_order, last = True, 0

    for name in reader.members("header"):
        if name == _METADATA:
            metadata = reader.string_map(_METADATA)
            continue

        if len(name) > MAX_NAME_SIZE or (not name.isascii() and len(name.encode()) > MAX_NAME_SIZE):
            raise corrupt(
                label,
                f"tensor {name[:80] + '…'!r}",
                expected=f"a name of at most {MAX_NAME_SIZE} bytes",
                found=f"one of {len(name.encode())}",
            )

        # Most tensors of a model share the text of dtype and shape, which is parsed and checked only once.
        usual = _USUAL.match(reader.text, reader.position)
        text = (usual[1] or usual[6]) if usual else ""
        if usual and (layout := layouts.get(text)):
            begin, end = int(usual[2] or usual[4]), int(usual[3] or usual[5])
            reader.position = usual.end()
        else:
            layout, begin, end = _tensor(reader, name)
            if text and len(layouts) < _MAX_LAYOUTS:
                layouts[text] = layout

        dtype, shape, nbytes = layout
        if end - begin != nbytes or end > buffer_size:
            expected = (
                f"data_offsets that are {nbytes} bytes apart ({dtype} of shape {list(shape)})"
                if end - begin != nbytes
                else f"data_offsets within the {buffer_size} bytes after the header"
            )
            raise corrupt(label, f"tensor {name!r}", expected=expected, found=f"[{begin}, {end}]")

        names.append(name)
        dtypes.append(dtype)
        shapes.append(shape)
        begins.append(begin)
        ends.append(end)
        in_order = in_order and begin == last
        last = end

    if rest := reader.text[reader.position :].strip(" "):
        raise corrupt(label, "header", expected="only spaces after its last '}'", found=repr(rest[:20]))

    if not in_order:
        order = sorted(range(len(names)), key=lambda i: (begins[i], ends[i]))
        names = [names[i] for i in order]
        dtypes = [dtypes[i] for i in order]
        shapes = [shapes[i] for i in order]
        begins = array("q", [begins[i] for i in order])
        ends = array("q", [ends[i] for i in order])

    _require_contiguous(names, begins, ends, buffer_size, label)

    base = PREFIX_SIZE + len(data)

    return Header(
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        offsets=array("q", [base + begin for begin in begins]),
        metadata=metadata,
    )


_Layout = tuple[str, tuple[int, ...], int]
"""The dtype, the shape and the bytes of a tensor."""


def _tensor(reader: Reader, name: str) -> tuple[_Layout, int, int]:
    """Parse the entry of a tensor; return its layout, begin and end."""
    where = f"tensor {name!r}"
    dtype = ""
    found: dict[str, list[int]] = {}
    for key in reader.members(where):
        if key == "dtype":
            given = reader.string(f"{where}, dtype")
            dtype = _DTYPES.get(given, "")  # one shared string, rather than one per tensor
            if not dtype:
                raise reader.fail(f"{where}, dtype", f"one of {', '.join(BITS)}", repr(given[:80]))
        elif key in ("shape", "data_offsets"):
            found[key] = reader.integers(f"{where}, {key}", at_most=MAX_RANK if key == "shape" else 2)
        else:
            raise reader.fail(where, "the keys dtype, shape and data_offsets only", repr(key[:80]))

    if not dtype or len(found) < 2:
        given = ", ".join([*(["dtype"] if dtype else []), *found])
        raise reader.fail(where, "the keys dtype, shape and data_offsets", given or "none of them")

    shape, offsets = found["shape"], found["data_offsets"]
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise reader.fail(f"{where}, data_offsets", "[begin, end] with begin ≤ end", str(offsets))

    # Strides can overflow even if a dim of zero makes the tensor empty, so zeros count as ones here.
    bits = math.prod(shape) * BITS[dtype]
    if bits > _MAX_INT or math.prod(size or 1 for size in shape) > _MAX_INT:
        raise reader.fail(f"{where}, shape", "fewer than 2^63 elements and bits", f"{dtype} of shape {shape}")
    if bits % 8:
        expected = f"whole bytes ({dtype} has {BITS[dtype]} bits per element)"
        raise reader.fail(f"{where}, shape", expected, f"{bits} bits: {shape}")

    return (dtype, tuple(shape), bits // 8), offsets[0], offsets[1]


def _require_contiguous(
    names: Sequence[str], begins: array[int], ends: array[int], buffer_size: int, label: str
) -> None:
    last = 0
    for i, begin in enumerate(begins):
        if begin != last:
            before = f"where tensor {names[i - 1]!r} ends" if i else "where the header ends"
            raise corrupt(
                label,
                f"tensor {names[i]!r}",
                expected=f"data_offsets that begin at {last}, {before}",
                found=f"{begin}: {'an overlap' if begin < last else 'a hole'} of {abs(begin - last)} bytes",
            )
        last = ends[i]

    if last != buffer_size:
        raise corrupt(
            label,
            f"tensor {names[-1]!r}, the last" if names else "header",
            expected=f"tensors that cover all of the {buffer_size} bytes after the header",
            found=f"that they end at {last}",
        )


def _first_byte(data: bytes | bytearray) -> str:
    return repr(data[:1].decode("latin-1")) if data else "an empty header"
