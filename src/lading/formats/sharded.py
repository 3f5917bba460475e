"""Checkpoints of many files, of safetensors or of ``torch.save``, with an index that says which tensor is in which.

The index is JSON: ``{"metadata": {…}, "weight_map": {"tensor": "file", …}}``. Its word decides which files belong to
the checkpoint; others in the folder are not looked at.

Source: https://huggingface.co/docs/safetensors/metadata_parsing, *Sharded safetensors*.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from pathlib import Path

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.formats.files import corrupt, open_regular
from lading.formats.safetensors import MAX_NAME_SIZE, Header, read_header
from lading.formats.strict_json import StrictJson
from lading.formats.torch_pt import index_file as index_torch_file
from lading.manifest import Manifest, Shard

MAX_INDEX_SIZE = 100_000_000
"""Bytes; the limit that a header has, too."""

_MAX_FILE_NAME = 255
"""Bytes; the limit of the common file systems."""

_MAX_LINES = 20
"""Disagreements that an error lists; the rest it counts."""


def index_shards(path: Path, *, restrict: bool = True) -> Manifest:
    """The manifest of the checkpoint whose index is at ``path``; the files that it names lie beside it.

    :param restrict: as :func:`lading.formats.torch_pt.index_file` takes it.

    :raises CheckpointNotFoundError: no index is at ``path``.
    :raises CorruptModelCheckpointError: the index is not valid, a file that it names is missing or damaged, or the
        index and the files do not agree on which tensors there are.
    :raises PolicyError: a file would import what a state dict does not need.
    :raises NotSupportedError: a tensor of a file of ``torch.save`` is not a plain range of bytes.
    :raises OSError: a file cannot be read.
    """
    weight_map = _read_weight_map(path)
    files = sorted(set(weight_map.values()))
    suffix = ".bin" if path.name.endswith(".bin.index.json") else ".safetensors"
    _require_plain_names(path, files, suffix)

    shards: list[Shard] = []
    headers: list[Header] = []
    problems: list[str] = []

    for file in files:
        try:
            shard, header = _read_part(path.parent / file, restrict)
        except CheckpointNotFoundError:
            # Not an error of that type: the checkpoint was found, and a part of it is missing.
            problems.append(f"{file!r} is missing")
            continue
        shards.append(shard)
        headers.append(header)

    # A missing file would repeat itself in each of its tensors.
    problems = problems or _disagreements(weight_map, shards, headers)
    if problems:
        raise _disagreement(path, problems)

    names: list[str] = []
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    shard_ids, offsets = array("I"), array("q")
    for i, header in enumerate(headers):
        names += header.names
        dtypes += header.dtypes
        shapes += header.shapes
        shard_ids += array("I", [i]) * len(header.names)
        offsets += header.offsets

    return Manifest(
        format="torch" if suffix == ".bin" else "safetensors",
        shards=tuple(shards),
        names=names,
        dtypes=dtypes,
        shapes=shapes,
        shard_ids=shard_ids,
        offsets=offsets,
        index_name=path.name,
        metadata=headers[0].metadata,
    )


def _read_part(path: Path, restrict: bool) -> tuple[Shard, Header]:
    if path.suffix != ".bin":
        return read_header(path)

    part = index_torch_file(path, restrict=restrict)
    header = Header(names=part.names, dtypes=part.dtypes, shapes=part.shapes, offsets=part.offsets, metadata={})

    return part.shards[0], header


def _read_weight_map(path: Path) -> dict[str, str]:
    label = str(path)

    with open_regular(path) as (file, size):
        if size > MAX_INDEX_SIZE:
            raise corrupt(label, "", expected=f"at most {MAX_INDEX_SIZE} bytes", found=f"{size}")
        data = file.read(size)

    json = StrictJson(data, label=label, what="index")
    weight_map: dict[str, str] | None = None

    for key in json.members("index"):
        if key == "weight_map":
            weight_map = json.string_map("weight_map")
        else:
            # Free-form. `metadata.total_size`, too: writers count tied and quantised weights in their own ways and
            # checkpoints that load everywhere else have it wrong, while the headers say what there is to the byte.
            if key == "metadata" and not json.comes("{"):
                raise json.fail("metadata", "an object")
            json.skip(repr(key[:80]))

    json.end("index")

    if not weight_map:
        found = "none" if weight_map is None else "an empty one"
        raise corrupt(label, "index", expected="a weight_map that says which file each tensor is in", found=found)

    return weight_map


def _require_plain_names(path: Path, files: list[str], suffix: str) -> None:
    """Nothing but the name of a file in the same folder: whoever wrote the index must not choose what is read."""
    for file in files:
        # `isprintable` is false for control, bidirectional and other characters that hide what a name says.
        plain = file.isprintable() and not set(file) & set("/\\") and len(file.encode()) <= _MAX_FILE_NAME
        if not plain or not file.endswith(suffix):
            raise corrupt(
                str(path),
                "weight_map",
                expected=f"plain file names that end in {suffix}, for files beside the index",
                found=repr(file[:80]),
            )


def _disagreements(weight_map: Mapping[str, str], shards: list[Shard], headers: list[Header]) -> list[str]:
    problems: list[str] = []
    agreed = 0

    for shard, header in zip(shards, headers, strict=True):
        for name in header.names:
            file = weight_map.get(name)
            if file == shard.name:
                agreed += 1
            elif file is None:
                problems.append(f"tensor {name!r} is in {shard.name!r}, but not in the index")
            else:
                problems.append(f"tensor {name!r} is in {shard.name!r}, but the index says {file!r}")

    if agreed != len(weight_map):
        held = {shard.name: set(header.names) for shard, header in zip(shards, headers, strict=True)}
        problems += [
            f"tensor {name[:MAX_NAME_SIZE]!r} is not in {file!r}, though the index says so"
            for name, file in weight_map.items()
            if name not in held[file]
        ]

    return problems


def _disagreement(path: Path, problems: list[str]) -> CorruptModelCheckpointError:
    lines = problems[:_MAX_LINES]
    if more := len(problems) - len(lines):
        lines.append(f"and {more} more")

    return corrupt(
        str(path),
        "",
        expected="an index and files that agree",
        found=f"{len(problems)} {'place' if len(problems) == 1 else 'places'} where they do not:\n  "
        + "\n  ".join(lines)
        + "\n",
    )
