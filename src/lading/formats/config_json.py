"""The ``config.json`` beside a checkpoint: what it takes to be read at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.files import LFS_POINTER, corrupt, open_regular, stands_for_another

MAX_CONFIG_SIZE = 16 << 20
"""Bytes. The largest that are published, with the names of some 20,000 classes, have a tenth of it."""


def read_config_json(path: Path) -> dict[str, object] | None:
    """Return what is in the ``config.json`` at ``path``, whatever it is called there; ``None`` where nothing is.

    :raises CorruptModelCheckpointError: it is not a regular file, is too large, or is not a JSON object.
    :raises OSError: it cannot be read.
    """
    try:
        with open_regular(path) as (file, size):
            require_size(size, label=str(path))
            return parse_config_json(file.read(size), label=str(path))
    except CheckpointNotFoundError:
        return None


def require_size(size: int, *, label: str) -> None:
    """Refuse a file before it is read.

    :raises CorruptModelCheckpointError: no ``config.json`` has so many bytes.
    """
    if size > MAX_CONFIG_SIZE:
        raise corrupt(
            label,
            "",
            expected=f"a config.json of at most {MAX_CONFIG_SIZE:,} bytes",
            found=f"{size:,}",
            hint="Put the model's own config.json there.",
        )


def parse_config_json(data: bytes, *, label: str) -> dict[str, object]:
    """Return the JSON object that ``data`` holds.

    :param label: the path or the address of the file.

    :raises CorruptModelCheckpointError: it holds something else.
    """
    if data.startswith(LFS_POINTER):
        raise stands_for_another(label)
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptModelCheckpointError(label, f"{label} is expected to be a JSON object, but: {error}.") from None
    if not isinstance(config, dict):
        raise CorruptModelCheckpointError(
            label, f"{label} is expected to be a JSON object, but is of type {type(config).__name__}."
        )

    return config


CONFIG_NAME = "config.json"


def refuse_quantised_config(hf_config: Mapping[str, object], path: Path | str) -> None:
    """:raises NotSupportedError: the configuration says that the weights are quantised."""
    quantisation = hf_config.get("quantization_config")
    if quantisation is not None:
        scheme = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise NotSupportedError(
            f"The checkpoint at {path} is quantised (config.json: `quantization_config` of the scheme {scheme!r}), "
            "which lading does not load. Use the checkpoint in its original precision."
        )


def read_hf_config(path: Path) -> dict[str, object]:
    """The ``config.json`` in a Hugging Face style folder; empty where there is none.

    :raises CorruptModelCheckpointError: it is not a regular file, is too large, or is not a JSON object.
    """
    return parse_hf_config(path / "config.json" if path.is_dir() else path.parent / "config.json")


def parse_hf_config(file: Path) -> dict[str, object]:
    """What is in a ``config.json``, whatever it is called here; empty where there is none.

    :raises CorruptModelCheckpointError: it is not a regular file, is too large, or is not a JSON object.
    """
    return read_config_json(file) or {}
