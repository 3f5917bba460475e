"""Pickles, zip archives and checkpoints made by hand, as no library would write them."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lading import formats
from lading.formats.manifest import Manifest
from lading.transfer.dtypes import TORCH_DTYPES


def save(value: object, *, legacy: bool = False, protocol: int = 2) -> bytes:
    """Return the bytes that ``torch.save`` writes."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    return file.getvalue()


def save_shards(folder: Path, state: Mapping[str, torch.Tensor], count: int = 2) -> None:
    """Write several files and their index, as old versions of transformers do."""
    names, weight_map = sorted(state), {}
    for i in range(count):
        file = f"pytorch_model-{i + 1:05}-of-{count:05}.bin"
        torch.save({name: state[name] for name in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_all(path: Path, manifest: Manifest | None = None) -> dict[str, torch.Tensor]:
    """The tensors at the places that the manifest of ``path`` says, read with nothing but its offsets."""
    manifest = formats.index(path) if manifest is None else manifest
    folder = path if path.is_dir() else path.parent
    found = {}
    for t in manifest:
        data = (folder / t.shard.name).read_bytes()[t.offset : t.offset + t.nbytes]
        assert len(data) == t.nbytes
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        found[t.name] = flat.view(TORCH_DTYPES[t.dtype]).reshape(t.shape)
    return found


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, with the same dtype and shape."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [torch.empty(t.shape, dtype=t.dtype).copy_(t).reshape(-1).view(torch.uint8) for t in (a.detach(), b.detach())]
    return torch.equal(*raw)


# --- pickles ---


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def many(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def storage(key: str = "0", count: int = 6, kind: tuple[str, str] = ("torch", "FloatStorage")) -> bytes:
    return many(text("storage"), name(*kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    of: bytes, shape: tuple[int, ...] = (2, 3), strides: tuple[int, ...] | None = (3, 1), offset: int = 0
) -> bytes:
    strides = strides if strides is not None else (1,) * len(shape)
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + many(of, number(offset), many(*map(number, shape)), many(*map(number, strides)), b"\x89", b"}")
        + b"R"
    )


def dictionary(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(k) + v for k, v in values.items()) + b"u"


def pickled(value: bytes, protocol: int = 2) -> bytes:
    return b"\x80" + bytes([protocol]) + value + b"."


GOOD = pickled(dictionary(w=tensor(storage())))
"""One tensor of 2 × 3 floats, in the storage ``0`` of 24 bytes."""


# --- zip archives ---


@dataclass
class Member:
    """A record, and what its headers are to say of it instead of the truth."""

    name: str
    data: bytes
    central: Mapping[str, int | bytes] = field(default_factory=dict)
    local: Mapping[str, int | bytes] = field(default_factory=dict)
    at: int | None = None
    """Where the central directory says that its header is."""


def archive(*members: Member, end: Mapping[str, int] | None = None, behind: bytes = b"") -> bytes:
    """A zip archive of stored records."""
    out, directory = bytearray(), bytearray()
    for member in members:
        raw = member.name.encode()
        truth: dict[str, int | bytes] = {
            "flags": 0x800, "method": 0, "crc": zlib.crc32(member.data), "packed": len(member.data),
            "size": len(member.data), "name": raw, "extra": b"",
        }  # fmt: skip
        c, h = truth | dict(member.central), truth | dict(member.local)
        at = len(out) if member.at is None else member.at
        out += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 0, h["flags"], h["method"], 0, 0, h["crc"], h["packed"], h["size"],
            len(h["name"]), len(h["extra"]),
        )  # fmt: skip
        out += h["name"] + h["extra"] + member.data
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, c["flags"], c["method"], 0, 0, c["crc"], c["packed"], c["size"],
            len(c["name"]), len(c["extra"]), 0, 0, 0, 0, at,
        )  # fmt: skip
        directory += c["name"] + c["extra"]
    stated = {"here": len(members), "count": len(members), "size": len(directory), "offset": len(out), "comment": 0}
    stated |= end or {}
    out += directory
    out += struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, stated["here"], stated["count"], stated["size"], stated["offset"],
        stated["comment"],
    )  # fmt: skip
    return bytes(out + behind)


def checkpoint(pickle: bytes = GOOD, storages: Mapping[str, bytes] | None = None, **members: Member) -> bytes:
    """An archive as ``torch.save`` lays it out."""
    if storages is None:
        storages = {"0": struct.pack("<6f", *range(6))}
    records = {"data.pkl": Member("a/data.pkl", pickle), "byteorder": Member("a/byteorder", b"little")}
    records["version"] = Member("a/version", b"3\n")
    records |= {f"data/{key}": Member(f"a/data/{key}", data) for key, data in storages.items()}
    return archive(*(records | members).values())
