"""The tensors of one file of a checkpoint, whatever format it has."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from lading.formats.files import File, open_regular
from lading.formats.first_bytes import SIZE, Format, format_of
from lading.formats.manifest import Shard
from lading.formats.safetensors import Header, Part, read_header
from lading.formats.torch_save.reader import header_of, place_tensors


def read_part(path: Path, *, restrict: bool = True, name: str | None = None) -> tuple[Part, Format]:
    """Return the tensors of the file at ``path`` as a part of a checkpoint, and the format of the file.

    :param restrict: as :func:`lading.formats.index` takes it.
    :param name: of the file, where the one in ``path`` says nothing.

    :raises CheckpointNotFoundError: nothing is at ``path``.
    :raises CorruptModelCheckpointError: it is not a checkpoint, or breaks the rules of its format.
    :raises RefusedPickleError: to unpickle it would import what a state dict does not need.
    :raises NotSupportedError: it is of a format that is not read here, or has tensors that are not.
    :raises OSError: it cannot be read.
    """
    name = path.name if name is None else name
    with open_regular(path) as (file, size):
        header, kind = read_tensors(file, base=0, size=size, name=name, label=str(path), restrict=restrict)

    return (Shard(name=name, size=size), header), kind


def read_tensors(
    file: BinaryIO, *, base: int, size: int, name: str, label: str, restrict: bool
) -> tuple[Header, Format]:
    """Return the tensors in the ``size`` bytes of ``file`` at ``base``, by offsets in ``file``, and their format.

    :param name: of what lies there, whose suffix counts where its bytes say nothing.
    :param label: its path or address, for errors.

    Raises what :func:`read_part` does.
    """

    def read(offset: int, count: int) -> bytes:
        file.seek(base + offset)
        return file.read(min(count, size - offset))

    # What follows reads from the same buffer: the first bytes cost no read of their own.
    kind = format_of(read(0, SIZE), name=name, label=label)
    if kind == "torch":
        placed = place_tensors(file, base=base, size=size, label=label, restrict=restrict)
        return header_of(placed, label=label), kind

    _, header = read_header(File(name=name, label=label, size=size, read=read))
    if base:
        header = replace(header, offsets=array("q", [base + offset for offset in header.offsets]))

    return header, kind
