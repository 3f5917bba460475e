"""Checkpoints of many files, of safetensors or of ``torch.save``, with an index that says which tensor is in which.

The index is JSON: ``{"metadata": {…}, "weight_map": {"tensor": "file", …}}``. Its word decides which files belong to
the checkpoint; others in the folder are not looked at.

Source: https://huggingface.co/docs/safetensors/metadata_parsing, *Sharded safetensors*.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.formats.any_format import read_part
from lading.formats.files import LFS_POINTER, File, corrupt, open_file, stands_for_another
from lading.formats.first_bytes import Format
from lading.formats.folder import is_torch_format
from lading.formats.manifest import Manifest
from lading.formats.safetensors import MAX_NAME_SIZE, Part, join
from lading.formats.strict_json import StrictJson

log = logging.getLogger("lading")

MAX_INDEX_SIZE = 100_000_000
"""Bytes; the limit that a header has, too."""

_MAX_FILE_NAME = 255
"""Bytes; the limit of the common file systems."""

_MAX_LINES = 20
"""Disagreements that an error lists; the rest it counts."""


def index_shards(
    path: Path, *, restrict: bool = True, name: str | None = None, shards: Mapping[str, Path] | None = None
) -> Manifest:
    """The manifest of the checkpoint whose index is at ``path``.

    :param restrict: as :func:`lading.formats.index` takes it.
    :param name: of the index, where the one in ``path`` says nothing.
    :param shards: the files that it names; default: they lie beside it.

    :raises CheckpointNotFoundError: no index is at ``path``.
    :raises CorruptModelCheckpointError: the index is not valid, a file that it names is missing or damaged, or the
        index and the files do not agree on which tensors there are.
    :raises RefusedPickleError: a file of ``torch.save`` would import what a state dict does not need.
    :raises NotSupportedError: a tensor of such a file is not a plain range of bytes.
    :raises OSError: a file cannot be read.
    """
    index = read_index_at(path, name=name)
    places = {file: path.parent / file if shards is None else shards[file] for file in index.tensors}

    read = [_read_shard(file, place, restrict) for file, place in places.items()]
    kinds = {each[1] for each in read if each is not None}

    return join_shards(index, [None if each is None else each[0] for each in read], kind=_kind(kinds))


def _kind(kinds: Collection[Format]) -> Format:
    """Return the format of a checkpoint whose files have these."""
    return "torch" if "torch" in kinds else "safetensors"


def read_index_at(path: Path, *, name: str | None = None) -> Index:
    """What the index at ``path`` says.

    :param name: of the index, where the one in ``path`` says nothing.

    :raises CheckpointNotFoundError: no index is at ``path``.
    :raises CorruptModelCheckpointError: it is not valid.
    """
    with open_file(path) as file:
        return read_index(file if name is None else replace(file, name=name))


def _read_shard(name: str, path: Path, restrict: bool) -> tuple[Part, Format] | None:
    try:
        return read_part(path, restrict=restrict, name=name)
    except CheckpointNotFoundError:
        # Not an error of that type: the checkpoint was found, and a part of it is missing.
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """What an index says."""

    file: File
    weight_map: Mapping[str, str]
    """Tensor → file."""
    tensors: Mapping[str, Sequence[str]]
    """File → its tensors; the files by name, which are plain names of files beside the index."""


def join_shards(index: Index, parts: Sequence[Part | None], *, kind: Format = "safetensors") -> Manifest:
    """The manifest of the checkpoint of an index.

    :param parts: one for each of ``index.tensors``; ``None`` where there is no such file.
    :param kind: the manifest's ``format``.

    :raises CorruptModelCheckpointError: a file is missing, or the index and the files do not agree on which tensors
        there are.
    """
    found = [part for part in parts if part is not None]
    problems = [f"{file!r} is missing" for file, part in zip(index.tensors, parts, strict=True) if part is None]
    # A missing file would repeat itself in each of its tensors.
    problems = problems or _disagreements(index, found)
    if problems:
        raise _disagreement(index.file.label, problems)

    return join(found, index_name=index.file.name, kind=kind)


def read_index(file: File) -> Index:
    """What the index in ``file`` says.

    :raises CorruptModelCheckpointError: it is not valid, or it names files that are not beside it.
    """
    weight_map = _read_weight_map(file)
    tensors: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
    _require_plain_names(file.label, tensors, ".bin" if is_torch_format(file.name) else ".safetensors")
    for tensor, name in weight_map.items():
        tensors[name].append(tensor)

    return Index(file=file, weight_map=weight_map, tensors=tensors)


def _read_weight_map(file: File) -> dict[str, str]:
    label = file.label
    if file.size > MAX_INDEX_SIZE:
        raise corrupt(label, "", expected=f"at most {MAX_INDEX_SIZE} bytes", found=f"{file.size}")
    data = file.read(0, file.size)
    if data.startswith(LFS_POINTER):
        raise stands_for_another(label)

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


def _require_plain_names(label: str, files: Iterable[str], suffix: str) -> None:
    """Nothing but the name of a file in the same folder: whoever wrote the index must not choose what is read."""
    for file in files:
        # `isprintable` is false for control, bidirectional and other characters that hide what a name says.
        plain = file.isprintable() and not set(file) & set("/\\") and len(file.encode()) <= _MAX_FILE_NAME
        if not plain or not file.endswith(suffix):
            raise corrupt(
                label,
                "weight_map",
                expected=f"plain file names that end in {suffix}, for files beside the index",
                found=repr(file[:80]),
            )


def _disagreements(index: Index, parts: Sequence[Part]) -> list[str]:
    problems: list[str] = []
    agreed = 0

    for shard, header in parts:
        for name in header.names:
            file = index.weight_map.get(name)
            if file == shard.name:
                agreed += 1
            elif file is None:
                problems.append(f"tensor {name!r} is in {shard.name!r}, but not in the index")
            else:
                problems.append(f"tensor {name!r} is in {shard.name!r}, but the index says {file!r}")

    if agreed != len(index.weight_map) and not problems:
        # Writers forget to take out what they did not save, such as a head that drafts tokens. Whether it is needed
        # the model will say.
        held = {name for _, header in parts for name in header.names}
        absent = [name for name in index.weight_map if name not in held]
        log.warning(
            "%s lists %d tensors that no file holds, such as %r.",
            index.file.label,
            len(absent),
            absent[0][:MAX_NAME_SIZE],
        )

    return problems


def _disagreement(label: str, problems: list[str]) -> CorruptModelCheckpointError:
    first, *others = problems
    lines = others[: _MAX_LINES - 1]
    if more := len(others) - len(lines):
        lines.append(f"and {more} more")

    # The first one stands on the first line, which is all that some readers show.
    return corrupt(
        label,
        "",
        expected="an index and files that agree",
        found=f"{len(problems)} {'place' if len(problems) == 1 else 'places'} where they do not: {first}"
        + "".join(f"\n  {line}" for line in lines)
        + ("\n" if lines else ""),
    )
