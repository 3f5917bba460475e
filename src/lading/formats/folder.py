"""Recognition of checkpoint files by their names, in local and remote folders."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from lading.system.display import some
from lading.system.filesystem import path_exists

INDEX_NAME = "model.safetensors.index.json"
FILE_NAME = "model.safetensors"

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_NAME = "pytorch_model.bin"

METADATA_NAME, DISTRIBUTED_SUFFIX = ".metadata", ".distcp"
"""The index of a checkpoint of ``torch.distributed.checkpoint``, and the ending of the names of its files."""

_INDEX_SUFFIX = ".safetensors.index.json"
_BIN_INDEX_SUFFIX = ".bin.index.json"
_TORCH_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".th", ".t7", ".jit", ".pth.tar", ".pt.tar", ".ckpt.tar")
_OTHER_FORMATS = (".pkl", ".gguf", ".ggml", ".h5", ".hdf5", ".keras", ".msgpack", ".npz", ".onnx")

_TRAINING_STATE = re.compile(
    r"training_args\.bin|(?:optimizer|scheduler|scaler|sampler|dl_state_dict)(?:_\d+)?\.(?:pt|bin)|"
    r"rng_state(?:_\d+)?\.pth|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
)


def is_training_state(name: str) -> bool:
    """Return whether ``name`` is that of a file that holds no model, but what a trainer needs to go on.

    Source: ``transformers.trainer`` and ``accelerate.utils.constants``.
    """
    return _TRAINING_STATE.fullmatch(name) is not None


def checkpoint_file(names: Iterable[str], *, where: Path | str, torch: bool = False) -> str:
    """Return the file with which to read the checkpoint in a folder: the index, or else the single file.

    :param names: all names in the folder.
    :param where: the path or the address of the folder, for the error.
    :param torch: whether ``torch.save`` files are accepted if there are no safetensors files.

    :raises CheckpointNotFoundError: the folder has neither under its usual name.
    :raises NotSupportedError: the format of the checkpoint is not supported.
    """
    listed = sorted(names)
    usual = (INDEX_NAME, FILE_NAME, BIN_INDEX_NAME, BIN_NAME) if torch else (INDEX_NAME, FILE_NAME)
    for name in usual:
        if name in listed:
            return name
        if name == FILE_NAME and torch and is_distributed(listed):
            return METADATA_NAME

    if {ADAPTER_NAME, ADAPTER_CONFIG_NAME} <= set(listed):
        raise CheckpointNotFoundError(
            where,
            f"{where}: expected {INDEX_NAME} or {FILE_NAME}, found a LoRA adapter, {ADAPTER_NAME}. State it in a card "
            "as `adapter`, on top of its `base`, and not as `checkpoint`.",
        )
    if found := [
        name
        for name in listed
        if name.lower().endswith((".safetensors", _INDEX_SUFFIX)) or (torch and is_torch_format(name))
    ]:
        raise CheckpointNotFoundError(
            where,
            without_index(where, found)
            or f"{where}: expected {INDEX_NAME} or {FILE_NAME}, found {some_names(found)}. To read one of these, give "
            f"the path of the file instead of that of the folder.",
        )
    if found := [name for name in listed if is_other_format(name) or is_torch_format(name)]:
        raise not_supported(where, some_names(found))

    raise CheckpointNotFoundError(
        where, f"{where}: expected {INDEX_NAME} or {FILE_NAME}, found {some(listed) or 'an empty folder'}."
    )


_SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.safetensors|\.bin)")


def without_index(where: Path | str, found: Iterable[str]) -> str | None:
    """Return the message for shards without their index; ``None`` if the files are not shards."""
    shards = sorted(name for name in found if _SHARD.fullmatch(name))
    match = _SHARD.fullmatch(shards[0]) if shards else None
    if match is None:
        return None

    return (
        f"{where}: expected {match[1]}{match[2]}.index.json, the index of {len(shards)} shards, found only "
        f"{some_names(shards)}. Fetch the index from the origin of the shards, or save the model again with "
        "`save_pretrained`."
    )


def container_of(path: Path) -> Path | None:
    """Return the file that ``path`` leads into: an archive, or a file of nested state dicts; ``None`` for another path.

    A path that continues behind a folder with a checkpoint of ``torch.distributed.checkpoint`` leads into its index.
    """
    if os.path.lexists(path):
        return None
    parent = next((parent for parent in path.parents if os.path.lexists(parent)), path)
    if os.path.isfile(parent):  # noqa: PTH113 (`is_file` raises in a folder that is locked)
        return parent
    index = parent / METADATA_NAME

    return index if parent == path.parent and os.path.isfile(index) else None  # noqa: PTH113


def is_there(path: Path) -> bool:
    """Return whether a path leads to a file or folder, or into a file."""
    return path_exists(path) or container_of(path) is not None


def folder_of(path: Path) -> Path:
    """Return the folder with the files of the checkpoint at ``path``: a folder, a file, or a path into a file."""
    if path.is_dir():
        return path

    return (container_of(path) or path).parent


def nested(path: Path, state_dict: str) -> Path:
    """Return the path of a state dict in the checkpoint at ``path``.

    :param state_dict: its dotted path, as of :func:`lading.formats.state_dict.find_state_dict`.

    :raises ValueError: it is not one name in a path.
    """
    require_state_dict(state_dict)
    # A folder in that folder may have the same name.
    index = path / METADATA_NAME

    return (index if index.is_file() else path) / state_dict


def require_state_dict(state_dict: str) -> None:
    """Check the dotted path of a state dict, which is a part of the checkpoint's path.

    :raises ValueError: it is not one name in a path.
    """
    if not state_dict or state_dict in (".", "..") or set(state_dict) & set("/\\\0"):
        raise ValueError(f"`state_dict` must be a dotted path, as in 'ema.module', but is {state_dict!r}")


def is_index(name: str) -> bool:
    """Return whether ``name`` is that of a checkpoint's index."""
    return name.endswith((_INDEX_SUFFIX, _BIN_INDEX_SUFFIX))


def is_distributed(names: Collection[str]) -> bool:
    """Return whether a folder with ``names`` holds a checkpoint of ``torch.distributed.checkpoint``, if incomplete."""
    return METADATA_NAME in names or any(name.endswith(DISTRIBUTED_SUFFIX) for name in names)


def is_checkpoint_file(name: str) -> bool:
    """Return whether ``name`` has the suffix of a checkpoint file or of an index."""
    suffixes = (".safetensors", _INDEX_SUFFIX, _BIN_INDEX_SUFFIX, *_TORCH_FORMATS, *_OTHER_FORMATS)

    return name.lower().endswith(suffixes)


def is_torch_format(name: str) -> bool:
    """Return whether ``name`` has the suffix of a ``torch.save`` file, or of an index of such files."""
    return name.lower().endswith((*_TORCH_FORMATS, _BIN_INDEX_SUFFIX))


def is_other_format(name: str) -> bool:
    """Return whether ``name`` has the suffix of an unsupported checkpoint format."""
    return name.lower().endswith(_OTHER_FORMATS)


def not_supported(where: Path | str, found: str) -> NotSupportedError:
    """Return the error for a checkpoint of an unsupported format."""
    return NotSupportedError(
        f"{where}: expected a safetensors checkpoint, found {found}, of a format that lading does not read. Convert it "
        f"with `safetensors.torch.save_file` (transformers: `model.save_pretrained(folder)`)."
    )


def some_names(names: Iterable[str]) -> str:
    """Return the first of some names of files, and the number of the others, for a message."""
    return some(list(map(repr, names)), most=8)
