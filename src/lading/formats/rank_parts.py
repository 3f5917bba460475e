"""Checkpoints that the ranks of a gang saved, each its own parts of the tensors.

A part is a tensor of its own in the manifest. Its name is that of the tensor, ``#``, and the ranks that saved it, with
dots between them: ``output.weight#1`` is the second part of ``output.weight``, and ``output.weight#1.0`` the part of
tensor-parallel rank 1 and sharded-data-parallel rank 0. :mod:`lading.planning.rules` joins the parts to parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lading.errors import CheckpointNotFoundError
from lading.formats.any_format import read_part
from lading.formats.files import corrupt
from lading.formats.manifest import Manifest
from lading.formats.safetensors import Part, join


def is_consolidated(names: Collection[str]) -> bool:
    """Return whether a folder with ``names`` holds a checkpoint in Meta's LLaMA layout: ``consolidated.00.pth`` …"""
    return "consolidated.00.pth" in names


def is_fairseq2_sharded(names: Collection[str]) -> bool:
    """Return whether a folder with ``names`` holds a checkpoint that fairseq2 saved: ``pp_00/tp_00/sdp_00.pt`` …"""
    return "pp_00" in names


def part_files(folder: Path, names: Collection[str]) -> list[tuple[str, str]]:
    """Return the files of such a checkpoint, each with the suffix of its parts' names; an empty list for another one.

    The files are ``consolidated.NN.pth``, one for each model-parallel rank, or ``pp_XX/tp_XX/sdp_XX.pt``. Of these,
    pipeline-parallel ranks hold different tensors, the others parts of the same ones: ``NAME#TP.SDP``. If there is only
    one rank of each, the tensors are whole, and the suffixes are empty.

    Source: fairseq2 0.8.1, its loader of native checkpoints.

    :param names: the names in ``folder``.

    :raises CorruptModelCheckpointError: a file is missing.
    """
    if is_consolidated(names):
        found = _numbered(folder, "consolidated.", ".pth")
        return _with_suffixes([(name, (i,)) for i, name in enumerate(found)], (len(found),))
    if not is_fairseq2_sharded(names):
        return []

    files: list[tuple[str, tuple[int, ...]]] = []
    sizes: set[tuple[int, int]] = set()
    for pp in _numbered(folder, "pp_"):
        tps = _numbered(folder / pp, "tp_")
        for tp, tp_name in enumerate(tps):
            sdps = _numbered(folder / pp / tp_name, "sdp_", ".pt")
            files += [(f"{pp}/{tp_name}/{name}", (tp, sdp)) for sdp, name in enumerate(sdps)]
            sizes.add((len(tps), len(sdps)))
    if len(sizes) != 1:
        raise corrupt(
            str(folder),
            "",
            expected="the same number of tp_XX in each pp_XX, and of sdp_XX.pt in each tp_XX",
            found=" and ".join(f"{tp} of {sdp}" for tp, sdp in sorted(sizes)),
        )

    return _with_suffixes(files, sizes.pop())


def index_parts(folder: Path, files: Sequence[tuple[str, str]], *, restrict: bool = True) -> Manifest:
    """Read the manifest of the files that :func:`part_files` returns.

    :param restrict: see :func:`lading.formats.index`.

    :raises CorruptModelCheckpointError: a file is damaged or missing.
    :raises NotSupportedError: a tensor is not a plain range of bytes.
    """
    parts: list[Part] = []
    for name, suffix in files:
        try:
            shard, header = read_part(folder / name, restrict=restrict)
        except CheckpointNotFoundError as error:
            raise corrupt(str(folder), "", expected=f"the file {name!r}", found="that it is missing") from error
        names = [f"{tensor}{suffix}" for tensor in header.names]
        parts.append((replace(shard, name=name), replace(header, names=names)))

    counts = Counter(name for _, header in parts for name in header.names)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise corrupt(str(folder), f"tensor {twice!r}", expected="one tensor of that name", found="another one")

    return join(parts)


def _with_suffixes(files: Sequence[tuple[str, tuple[int, ...]]], sizes: tuple[int, ...]) -> list[tuple[str, str]]:
    if all(size == 1 for size in sizes):
        return [(name, "") for name, _ in files]

    return [(name, "#" + ".".join(map(str, place))) for name, place in files]


def _numbered(folder: Path, prefix: str, suffix: str = "") -> list[str]:
    """Return the entries of ``folder`` named ``prefix``, a number, ``suffix``, which must be numbered from 00 on."""
    found = {
        entry.name
        for entry in folder.iterdir()
        if re.fullmatch(f"{re.escape(prefix)}[0-9]{{2,4}}{re.escape(suffix)}", entry.name)
    }
    names = [f"{prefix}{i:02}{suffix}" for i in range(len(found))]
    if not found or found != set(names):
        missing = sorted(set(names) - found)
        raise corrupt(
            str(folder),
            "",
            expected=f"all parts of the checkpoint, numbered from 00 on: {', '.join(missing[:4]) or 'at least one'}",
            found=", ".join(sorted(found)[:8]) or "none",
        )

    return names
