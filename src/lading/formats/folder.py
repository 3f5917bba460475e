"""Which file of a folder is the checkpoint: the rules of names, for folders wherever they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lading.errors import CheckpointNotFoundError, NotSupportedError

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_NAME = "pytorch_model.bin"

_INDEX_SUFFIX = ".safetensors.index.json"
_BIN_INDEX_SUFFIX = ".bin.index.json"
_TORCH_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".th", ".t7", ".jit", ".pth.tar", ".pt.tar", ".ckpt.tar")
_OTHER_FORMATS = (".pkl", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".npz", ".onnx")


def checkpoint_file(names: Iterable[str], *, where: Path | str, torch: bool = False) -> str:
    """The file by which the checkpoint in a folder is read: the index, or else the single file.

    :param names: all that the folder lists.
    :param where: its path or address, for the error.
    :param torch: whether files of ``torch.save`` can be read, where there are none of safetensors.

    :raises CheckpointNotFoundError: it has neither under its usual name.
    :raises NotSupportedError: it has a checkpoint of a format that is not read here.
    """
    listed = sorted(names)
    usual = (INDEX_NAME, FILE_NAME, BIN_INDEX_NAME, BIN_NAME) if torch else (INDEX_NAME, FILE_NAME)
    for name in usual:
        if name in listed:
            return name

    if found := [
        name
        for name in listed
        if name.lower().endswith((".safetensors", _INDEX_SUFFIX)) or (torch and is_torch_format(name))
    ]:
        raise CheckpointNotFoundError(
            where,
            without_index(where, found)
            or f"{where}: expected {INDEX_NAME} or {FILE_NAME}, found {some(found)}. To read one of these, give the "
            f"path of the file instead of the folder's.",
        )
    if found := [name for name in listed if is_other_format(name) or is_torch_format(name)]:
        raise not_supported(where, some(found))

    raise CheckpointNotFoundError(
        where, f"{where}: expected {INDEX_NAME} or {FILE_NAME}, found {some(listed) or 'an empty folder'}."
    )


_SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.safetensors|\.bin)")


def without_index(where: Path | str, found: Iterable[str]) -> str | None:
    """Return the message for shards whose index is not there; ``None`` where the files are not shards."""
    shards = sorted(name for name in found if _SHARD.fullmatch(name))
    match = _SHARD.fullmatch(shards[0]) if shards else None
    if match is None:
        return None

    return (
        f"{where}: expected {match[1]}{match[2]}.index.json, the index of {len(shards)} shards, found none beside "
        f"{some(shards)}. Fetch the index from where the shards are from, or save the model again with "
        "`save_pretrained`."
    )


def is_index(name: str) -> bool:
    """Whether a file of this name says which shards belong to a checkpoint."""
    return name.endswith((_INDEX_SUFFIX, _BIN_INDEX_SUFFIX))


def is_checkpoint_file(name: str) -> bool:
    """Whether a file of this name is a checkpoint or the index of one, by its suffix."""
    suffixes = (".safetensors", _INDEX_SUFFIX, _BIN_INDEX_SUFFIX, *_TORCH_FORMATS, *_OTHER_FORMATS)

    return name.lower().endswith(suffixes)


def is_torch_format(name: str) -> bool:
    """Whether a file of this name is what ``torch.save`` wrote, or the index of such files."""
    return name.lower().endswith((*_TORCH_FORMATS, _BIN_INDEX_SUFFIX))


def is_other_format(name: str) -> bool:
    """Whether a file of this name is of a format of checkpoints that is not read here."""
    return name.lower().endswith(_OTHER_FORMATS)


def not_supported(where: Path | str, found: str) -> NotSupportedError:
    """The error for a checkpoint of another format."""
    return NotSupportedError(
        f"{where}: expected a safetensors checkpoint, found {found}, of a format that is not read here. Convert it "
        f"with `safetensors.torch.save_file` (transformers: `model.save_pretrained(folder)`)."
    )


def some(names: list[str]) -> str:
    """The first of ``names``, and how many more there are."""
    more = len(names) - 8

    return ", ".join(map(repr, names[:8])) + (f" and {more} more" if more > 0 else "")
