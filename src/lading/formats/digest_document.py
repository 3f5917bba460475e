"""Documents of block digests, by which machines without a checkpoint can verify the slices that they read of it.

A document is a JSON object in UTF-8 with the keys

- ``format``: :data:`FORMAT`;
- ``shards``: an object from the name of each file of the checkpoint to its ``size`` in bytes and, if it is known, its
  ``sha256``. It is empty for a checkpoint that lading has to rewrite before it can be read: its files are lading's own;
- ``tensors``: an object from the name of each tensor to its ``dtype`` and ``shape``, the ``dim`` along which it is cut
  into blocks, and ``blocks``, the digests of the blocks one after the other (:mod:`lading.formats.digests`).

Digests are in lower-case hexadecimal. Equal digests make equal documents, as lading writes keys in the order above,
tensors in the order of the manifest, and one tensor per line.

The author of a document may be anyone: it is read against the manifest of the checkpoint, and must state exactly its
files and tensors. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from lading.formats.digests import SIZE, Digests, cut, recorded
from lading.formats.manifest import Manifest, Shard
from lading.formats.strict_json import SPACE, Reader

FORMAT = "lading digests 1"

_HINT = (
    "Write it with `lading digests NAME --write FILE` where this checkpoint is, or remove the field `digests` from the "
    "card."
)
_MAX_RANK = 64
_HEX = re.compile(r"[0-9a-f]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_USUAL = re.compile(
    rf'{SPACE}\{{"dtype": "([A-Z0-9_]++)", "shape": (\[[0-9, ]*+\]), "dim": ([0-9]), "blocks": "([0-9a-f]*+)"\}}'
)
"""A tensor as lading writes it."""

_Row = tuple[int, bytes]
"""The dim of a tensor, and the digests of its blocks."""


def dump_digests(manifest: Manifest, digests: Digests, *, shards: bool = True) -> Iterator[str]:
    """Yield the lines of the document of a checkpoint's digests.

    :param digests: those of all tensors.
    :param shards: whether to state the files.
    """
    yield f'{{"format": {_text(FORMAT)},\n"shards": {{'
    for i, shard in enumerate(manifest.shards if shards else ()):
        file = {"size": shard.size, **({} if shard.sha256 is None else {"sha256": shard.sha256})}
        yield f"{',' * bool(i)}\n{_text(shard.name)}: {_text(file)}"
    yield '},\n"tensors": {'
    for i, (name, dtype, shape) in enumerate(zip(manifest.names, manifest.dtypes, manifest.shapes, strict=True)):
        if not digests.is_complete(i):
            raise ValueError(f"the digests of tensor {name!r} are not known")
        blocks = digests.blocks[digests.starts[i] * SIZE : digests.starts[i + 1] * SIZE]
        stated = {"dtype": dtype, "shape": list(shape), "dim": digests.dims[i], "blocks": blocks.hex()}
        yield f"{',' * bool(i)}\n{_text(name)}: {_text(stated)}"
    yield "}}\n"


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def most_bytes(manifest: Manifest) -> int:
    """Return a size that no document of this checkpoint exceeds."""
    names = (*manifest.names, *(shard.name for shard in manifest.shards))
    shapes = sum(map(len, manifest.shapes))

    # Escapes take up to 6 bytes; those who write a document with other tools may indent it.
    return (64 << 10) + 1024 * len(names) + 6 * sum(len(name.encode()) for name in names) + 64 * shapes


def parse_digests(data: bytes, manifest: Manifest, *, label: str) -> Digests:
    """Return the digests that a document states.

    :param manifest: that of the checkpoint.
    :param label: the path or the address of the document, for errors.

    :raises CorruptModelCheckpointError: it is not such a document, or that of another checkpoint.
    """
    reader = Reader(data, label=label, what="the document", hint=_HINT)
    rows: list[_Row | None] | None = None
    keys = []
    for key in reader.members("the document"):
        keys.append(key)
        if key == "format":
            if (stated := reader.string(key)) != FORMAT:
                raise reader.fail(key, repr(FORMAT), repr(stated[:80]))
        elif key == "shards":
            _read_shards(reader, manifest)
        elif key == "tensors":
            rows = _read_tensors(reader, manifest)
        else:
            raise reader.fail("the document", "the keys format, shards and tensors only", repr(key[:80]))
    reader.end("the document")
    if rows is None or len(keys) < 3:
        found = ", ".join(keys) or "none of them"
        raise reader.fail("the document", "the keys format, shards and tensors", found)

    return recorded(manifest, rows)


def _read_shards(reader: Reader, manifest: Manifest) -> None:
    shards = {shard.name: shard for shard in manifest.shards}
    single = manifest.shards[0] if len(shards) == 1 else None
    count = 0
    for name in reader.members("shards"):
        where = f"shard {name[:80]!r}"
        # One file may have another name at each place.
        shard = single or shards.get(name)
        if shard is None or count == len(shards):
            raise reader.fail("shards", _files(manifest), f"a file {name[:80]!r}")
        _read_shard(reader, shard, where)
        count += 1
    if count not in (0, len(shards)):
        raise reader.fail("shards", _files(manifest), f"{count} files")


def _files(manifest: Manifest) -> str:
    names = [shard.name for shard in manifest.shards]

    return f"the {len(names)} files of this checkpoint ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _read_shard(reader: Reader, shard: Shard, where: str) -> None:
    size: int | None = None
    for key in reader.members(where):
        if key == "size":
            size = reader.integer(f"{where}, size")
        elif key == "sha256":
            sha256 = reader.string(f"{where}, sha256")
            if _SHA256.fullmatch(sha256) is None:
                raise reader.fail(f"{where}, sha256", "64 lower-case hexadecimal digits", repr(sha256[:80]))
            if shard.sha256 not in (None, sha256):
                raise reader.fail(f"{where}, sha256", f"{shard.sha256}, that of this checkpoint's file", sha256)
        else:
            raise reader.fail(where, "the keys size and sha256 only", repr(key[:80]))
    if size != shard.size:
        found = "none" if size is None else str(size)
        raise reader.fail(f"{where}, size", f"{shard.size}, that of this checkpoint's file", found)


def _read_tensors(reader: Reader, manifest: Manifest) -> list[_Row | None]:
    positions = {name: i for i, name in enumerate(manifest.names)}
    rows: list[_Row | None] = [None] * len(manifest)
    known: dict[tuple[str, str, str], tuple[tuple[str, tuple[int, ...]], int]] = {}
    for name in reader.members("tensors"):
        position = positions.get(name)
        if position is None:
            raise reader.fail("tensors", "only names of this checkpoint's tensors", repr(name[:80]))
        # Most tensors of a model share the text of dtype, shape and dim, which is parsed and checked only once.
        usual = _USUAL.match(reader.text, reader.position)
        layout = known.get((usual[1], usual[2], usual[3])) if usual else None
        of = (manifest.dtypes[position], manifest.shapes[position])
        if usual and layout is not None and layout == (of, len(usual[4])):
            rows[position] = (int(usual[3]), bytes.fromhex(usual[4]))
            reader.position = usual.end()
            continue
        row = _read_tensor(reader, manifest, position)
        rows[position] = row
        if usual:
            known[usual[1], usual[2], usual[3]] = (of, 2 * len(row[1]))
    if None in rows:
        missing = manifest.names[rows.index(None)]
        count = len(rows) - rows.count(None)
        found = f"{count}, without {missing[:80]!r}"
        raise reader.fail("tensors", f"all {len(rows)} tensors of this checkpoint", found)

    return rows


def _read_tensor(reader: Reader, manifest: Manifest, position: int) -> _Row:
    """Parse and check the entry of a tensor."""
    where = f"tensor {manifest.names[position]!r}"
    dtype, shape = manifest.dtypes[position], manifest.shapes[position]
    dim, blocks = 0, ""
    keys = []
    for key in reader.members(where):
        keys.append(key)
        if key == "dtype":
            if (stated := reader.string(f"{where}, dtype")) != dtype:
                raise reader.fail(f"{where}, dtype", f"{dtype!r}, as in this checkpoint", repr(stated[:80]))
        elif key == "shape":
            if (sizes := reader.integers(f"{where}, shape", at_most=_MAX_RANK)) != list(shape):
                raise reader.fail(f"{where}, shape", f"{list(shape)}, as in this checkpoint", str(sizes))
        elif key == "dim":
            dim = reader.integer(f"{where}, dim")
            if dim >= max(1, len(shape)):
                raise reader.fail(f"{where}, dim", f"a dim of a tensor of shape {list(shape)}", str(dim))
        elif key == "blocks":
            blocks = reader.string(f"{where}, blocks")
            if _HEX.fullmatch(blocks) is None:
                raise reader.fail(f"{where}, blocks", "lower-case hexadecimal digits", repr(blocks[:80]))
        else:
            raise reader.fail(where, "the keys dtype, shape, dim and blocks only", repr(key[:80]))
    if len(keys) < 4:
        raise reader.fail(where, "the keys dtype, shape, dim and blocks", ", ".join(keys) or "none of them")
    count = cut(dtype, shape, dim).blocks
    if len(blocks) != 2 * SIZE * count:
        expected = f"{2 * SIZE * count} digits, for {count} blocks along dim {dim}"
        raise reader.fail(f"{where}, blocks", expected, f"{len(blocks)} digits")

    return dim, bytes.fromhex(blocks)
