"""Hugging Face style folders: what their ``config.json`` says of the model beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.config_json import read_config_json
from lading.models.family import Family, family_of_model_type


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


def family_of_folder(path: Path, asked: Family[Any, Any] | None = None) -> tuple[Family[Any, Any], Any]:
    """Family and configuration of a Hugging Face style folder, from its ``config.json``.

    :param asked: the family that is asked for; it also reads its part of a larger model, and one that reads all model
        types those that others name.

    :raises CheckpointNotFoundError: there is no such folder (also a ``FileNotFoundError``).
    :raises NotSupportedError: no ``config.json``, or a model type that no registered family reads.
    """
    if not path.exists():
        raise CheckpointNotFoundError(path, f"No checkpoint is at {path}: there is no such file or folder.")

    hf_config = read_hf_config(path)
    if not hf_config:
        raise NotSupportedError(
            f"{path} has no config.json that would tell the family of the model. Load it with "
            "`get_<family>_model_hub().load_custom_model(path, config)`, or name it in a card."
        )

    model_type = hf_config.get("model_type")
    stated = hf_config.get("architectures")
    architectures = [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []
    if asked is not None and (asked.reads_other_model_types or model_type in asked.hf_part_of):
        family: Family[Any, Any] | None = asked
    else:
        family = family_of_model_type(model_type, architectures) if isinstance(model_type, str) else None
    if family is None or family.from_hf is None:
        of = f" with the architectures {architectures}" if architectures else ""
        raise NotSupportedError(
            f"{path}/config.json is of the model type {model_type!r}{of}, which no registered family reads "
            "(`lading families` shows them)."
        )

    refuse_quantised_config(hf_config, path)

    return family, family.from_hf(hf_config)
