"""Sharded checkpoints of safetensors or ``torch.save`` files, whose index names the file of each tensor.

The index is JSON: ``{"metadata": {…}, "weight_map": {"tensor": "file", …}}``. Only the files that it names belong to
the checkpoint; others in the folder are ignored.

Source: https://huggingface.co/docs/safetensors/metadata_parsing, *Sharded safetensors*.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.formats.any_format import read_part
from lading.formats.files import File, corrupt, open_file, refuse_lfs_pointer
from lading.formats.folder import is_torch_format
from lading.formats.manifest import Manifest
from lading.formats.safetensors import MAX_NAME_SIZE, Part, join
from lading.formats.strict_json import Reader

log = logging.getLogger("lading")

MAX_INDEX_SIZE = 100_000_000
"""The most bytes of an index, as of a header."""

_MAX_FILE_NAME = 255
"""The most bytes of a file name, as in common file systems."""

_MAX_LINES = 20
"""The most disagreements that an error lists; others are counted."""


def index_shards(
    path: Path, *, restrict: bool = True, name: str | None = None, shards: Mapping[str, Path] | None = None
) -> Manifest:
    """Return the manifest of the checkpoint whose index is at ``path``.

    :param restrict: see :func:`lading.formats.index`.
    :param name: the name of the index, if it differs from that in ``path``.
    :param shards: the paths of the files, by name; default: in the folder of the index.

    :raises CheckpointNotFoundError: ``path`` does not exist.
    :raises CorruptModelCheckpointError: the index is not valid, a file that it names is missing or damaged, or the
        index and the files disagree about the tensors.
    :raises RefusedPickleError: a file of ``torch.save`` would import something that a state dict does not need.
    :raises NotSupportedError: a tensor of such a file is not a plain range of bytes.
    :raises OSError: a file cannot be read.
    """
    index = read_index_at(path, name=name)
    places = {file: path.parent / file if shards is None else shards[file] for file in index.tensors}

    return join_shards(index, [_read_shard(file, place, restrict) for file, place in places.items()])


def read_index_at(path: Path, *, name: str | None = None) -> Index:
    """Read the index at ``path``.

    :param name: the name of the index, if it differs from that in ``path``.

    :raises CheckpointNotFoundError: ``path`` does not exist.
    :raises CorruptModelCheckpointError: the index is not valid.
    """
    with open_file(path) as file:
        return read_index(file if name is None else replace(file, name=name))


def _read_shard(name: str, path: Path, restrict: bool) -> Part | None:
    try:
        return read_part(path, restrict=restrict, name=name)
    except CheckpointNotFoundError:
        # The caller raises another error: the checkpoint exists, but a part of it is missing.
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The content of an index."""

    file: File
    weight_map: Mapping[str, str]
    """The file of each tensor."""
    tensors: Mapping[str, Sequence[str]]
    """The tensors of each file; files are sorted by name, which is a plain name in the folder of the index."""


def join_shards(index: Index, parts: Sequence[Part | None]) -> Manifest:
    """Return the manifest of the checkpoint of an index.

    :param parts: one part for each of ``index.tensors``; ``None`` if the file is missing.

    :raises CorruptModelCheckpointError: a file is missing, or the index and the files disagree about the tensors.
    """
    found = [part for part in parts if part is not None]
    problems = [f"{file!r} is missing" for file, part in zip(index.tensors, parts, strict=True) if part is None]
    # Each tensor of a missing file would be another problem.
    problems = problems or _disagreements(index, found)
    if problems:
        raise _disagreement(index.file.label, problems)

    return join(found, index_name=index.file.name)


def read_index(file: File) -> Index:
    """Read the index in ``file``.

    :raises CorruptModelCheckpointError: it is not valid, or names files outside of its folder.
    """
    weight_map = _read_weight_map(file)
    tensors: dict[str, list[str]] = {name: [] for name in sorted(set(weight_map.values()))}
    require_plain_names(file.label, "weight_map", tensors, ".bin" if is_torch_format(file.name) else ".safetensors")
    for tensor, name in weight_map.items():
        tensors[name].append(tensor)

    return Index(file=file, weight_map=weight_map, tensors=tensors)


def _read_weight_map(file: File) -> dict[str, str]:
    label = file.label
    if file.size > MAX_INDEX_SIZE:
        raise corrupt(label, "", expected=f"at most {MAX_INDEX_SIZE} bytes", found=f"{file.size}")
    data = file.read(0, file.size)
    refuse_lfs_pointer(data, label)

    reader = Reader(data, label=label, what="index")
    weight_map: dict[str, str] | None = None
    for key in reader.members("index"):
        if key == "weight_map":
            weight_map = reader.string_map("weight_map")
        else:
            # Other keys are free-form. `metadata.total_size` is not checked, as writers count tied and quantized
            # weights differently and many good checkpoints state a wrong size; the headers are exact.
            if key == "metadata" and not reader.comes("{"):
                raise reader.fail("metadata", "an object")
            reader.skip(repr(key[:80]))
    if rest := reader.text[reader.position :].strip(" \t\n\r"):
        raise corrupt(label, "index", expected="nothing more", found=repr(rest[:60]))

    if not weight_map:
        found = "none" if weight_map is None else "an empty one"
        raise corrupt(label, "index", expected="a weight_map that names the file of each tensor", found=found)

    return weight_map


def require_plain_names(label: str, where: str, files: Iterable[str], suffix: str) -> None:
    """Require plain names of files in the same folder, so that an index cannot name other files to be read.

    :param where: the part of the index that names them.

    :raises CorruptModelCheckpointError: a name is a path, is not printable, or does not end in ``suffix``.
    """
    for file in files:
        # `isprintable` is false for control, bidirectional and other deceptive characters.
        plain = file.isprintable() and not set(file) & set("/\\") and len(file.encode()) <= _MAX_FILE_NAME
        if not plain or not file.endswith(suffix):
            raise corrupt(
                label,
                where,
                expected=f"plain file names that end in {suffix}, for files in the folder of the index",
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
        # Some writers list tensors that they did not save, such as those of a head that drafts tokens. The fit check
        # reports those that the model needs.
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

    # The first problem is on the first line, which is all that some tools show.
    return corrupt(
        label,
        "",
        expected="an index and files that agree",
        found=f"{len(problems)} {'disagreement' if len(problems) == 1 else 'disagreements'}: {first}"
        + "".join(f"\n  {line}" for line in lines)
        + ("\n" if lines else ""),
    )
