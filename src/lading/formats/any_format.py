"""Reader of one checkpoint file of any supported format."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from lading.formats.files import File, open_regular
from lading.formats.first_bytes import SIZE, format_of
from lading.formats.manifest import Shard
from lading.formats.safetensors import Header, Part, read_header
from lading.formats.torch_save.reader import header_of, place_tensors


def read_part(path: Path, *, restrict: bool = True, name: str | None = None) -> Part:
    """Read the header of the file at ``path``; return it as a part of a checkpoint.

    :param restrict: see :func:`lading.formats.index`.
    :param name: the name of the file, if it differs from that in ``path``.

    :raises CheckpointNotFoundError: ``path`` does not exist.
    :raises CorruptModelCheckpointError: it is not a checkpoint, or breaks the rules of its format.
    :raises RefusedPickleError: unpickling it would import something that a state dict does not need.
    :raises NotSupportedError: its format, or one of its tensors, is not supported.
    :raises OSError: it cannot be read.
    """
    name = path.name if name is None else name
    with open_regular(path) as (file, size):
        header = read_tensors(file, base=0, size=size, name=name, label=str(path), restrict=restrict)

    return Shard(name=name, size=size), header


def read_tensors(
    file: BinaryIO,
    *,
    base: int,
    size: int,
    name: str,
    label: str,
    restrict: bool,
    state_dict: str | None = None,
) -> Header:
    """Read the header of the checkpoint in ``size`` bytes of ``file`` at ``base``.

    The offsets of the tensors are offsets in ``file``.

    :param name: the name of the checkpoint, whose suffix decides if its first bytes do not.
    :param label: its path or address, for errors.
    :param state_dict: the dotted path of the state dict in a file of ``torch.save``; default: the usual ones.

    Raises what :func:`read_part` does.
    """

    def read(offset: int, count: int) -> bytes:
        file.seek(base + offset)
        return file.read(min(count, size - offset))

    # The file is buffered, so the first bytes are read only once.
    if format_of(read(0, SIZE), name=name, label=label) == "torch":
        placed = place_tensors(file, base=base, size=size, label=label, restrict=restrict, state_dict=state_dict)
        return header_of(placed, label=label)

    _, header = read_header(File(name=name, label=label, size=size, read=read))

    return replace(header, offsets=array("q", [base + offset for offset in header.offsets])) if base else header
