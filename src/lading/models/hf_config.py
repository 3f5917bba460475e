"""The ``config.json`` beside a checkpoint: the model that it describes, and what contradicts it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lading.checkpoints.checkpoint import local_checkpoint
from lading.errors import ModelCheckpointMismatchError, NotSupportedError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME
from lading.formats.artifacts import artifact_in, not_loaded_error
from lading.formats.config_json import read_hf_config, refuse_quantized_config
from lading.models.family import Family, family_of_model_type

_CHOSEN = frozenset(
    {
        "architectures", "model_type",  # the class is that of the card's family
        "max_position_embeddings",  # a shorter text is a choice
        "bos_token_id", "eos_token_id", "pad_token_id",  # the tokenizer says them
        "initializer_range",  # only new weights
    }
)  # fmt: skip
"""The keys that a card may state otherwise."""


def family_of_folder(path: Path, asked: Family[Any, Any] | None = None) -> tuple[Family[Any, Any], Any]:
    """Return the family and the configuration of a Hugging Face style folder, from its ``config.json``.

    :param asked: as :func:`family_of_config` takes it.

    :raises CheckpointNotFoundError: the folder does not exist (also a ``FileNotFoundError``).
    :raises NotSupportedError: no ``config.json``, or a model type that no registered family reads.
    """
    local_checkpoint(path)
    hf_config = read_hf_config(path)
    if not hf_config and (path / ADAPTER_CONFIG_NAME).is_file():
        raise NotSupportedError(
            f"{path}: expected a model, found a LoRA adapter ({ADAPTER_CONFIG_NAME}). Run `lading add {path} --set "
            "base=NAME`, and load the card that it makes on top of the one of the base."
        )

    return family_of_config(hf_config, path, asked)


def family_of_config(
    hf_config: Mapping[str, object], where: Path | str, asked: Family[Any, Any] | None = None
) -> tuple[Family[Any, Any], Any]:
    """Return the family and the configuration that a ``config.json`` describes.

    :param where: the place of the checkpoint that it lies beside, for messages.
    :param asked: the requested family; it may also read its part of a larger model, and a family for all model types
        those of other families.

    :raises NotSupportedError: as :func:`family_beside`; or the family does not support a value in it.
    """
    family = family_beside(hf_config, where, asked)
    assert family.from_hf is not None

    return family, family.from_hf(hf_config)


def family_beside(
    hf_config: Mapping[str, object], where: Path | str, asked: Family[Any, Any] | None = None
) -> Family[Any, Any]:
    """Return the family that reads a ``config.json``; the parameters are those of :func:`family_of_config`.

    :raises NotSupportedError: it is empty, says that the weights are quantized, or is of a model type that no
        registered family reads.
    """
    if not hf_config:
        if isinstance(where, Path) and (artifact := artifact_in(where)) is not None:
            raise not_loaded_error(where, artifact)
        raise NotSupportedError(
            f"{where} has no config.json, so the family of the model is unknown. Copy that of the model there, load it "
            "with `get_<family>_model_hub().load_custom_model(path, config)`, or name it in a card."
        )

    model_type, architectures = hf_config.get("model_type"), _architectures(hf_config)
    if asked is not None and (asked.reads_other_model_types or model_type in asked.hf_part_of):
        family: Family[Any, Any] | None = asked
    else:
        family = family_of_model_type(model_type, architectures) if isinstance(model_type, str) else None
    if family is None or family.from_hf is None:
        of = f" with the architectures {architectures}" if architectures else ""
        raise NotSupportedError(
            f"{where}/config.json is of the model type {model_type!r}{of}, which no registered family reads "
            "(`lading families` shows them)."
        )

    refuse_quantized_config(hf_config, where)

    return family


def is_read_by(family: Family[Any, Any], hf_config: Mapping[str, object]) -> bool:
    """Return whether a family reads a ``config.json``, or its part of one."""
    model_type = hf_config.get("model_type")
    if family.from_hf is None or not isinstance(model_type, str):
        return False
    if family.reads_other_model_types or model_type in family.hf_part_of:
        return True

    return family.lists(model_type, _architectures(hf_config))


def described_config(family: Family[Any, Any], hf_config: Mapping[str, object]) -> Any:
    """Return the configuration that a ``config.json`` describes; ``None`` if the family does not read that file.

    :raises NotSupportedError: the family reads it, but does not support a value in it.
    :raises ModelCheckpointMismatchError: a value is of another type, or they describe no model.
    """
    return family.from_hf(hf_config) if family.from_hf is not None and is_read_by(family, hf_config) else None


def _architectures(hf_config: Mapping[str, object]) -> list[str]:
    stated = hf_config.get("architectures")

    return [name for name in stated if isinstance(name, str)] if isinstance(stated, list) else []


# --- contradictions --------------------------------------------------------------------------------------------------


def contradictions(family: Family[Any, Any], config: Any, hf_config: Mapping[str, object]) -> tuple[str, ...]:
    """Return what a configuration states otherwise than the ``config.json`` beside the weights, a clause for each.

    Both are compared as the family writes them to a ``config.json``, so that what has the same effect is equal; a key
    that only one of them states has the default of the other. What matters in training only does not count. Without a
    way to compare them, this returns nothing.
    """
    if family.from_hf is None or family.to_hf is None or not is_read_by(family, hf_config):
        return ()
    try:
        read = family.to_hf(family.from_hf(hf_config))
    except (NotSupportedError, ModelCheckpointMismatchError) as error:
        return (f"the {family.name} family cannot read the file: {error}",)
    try:
        stated = family.to_hf(config)
    except NotSupportedError as error:
        return (f"no config.json can describe the card: {error}",)
    except ValueError:  # no model is like that, which its build says
        return ()

    return tuple(
        f"{key} is {_shown(ours)} by the card, but {_shown(theirs)} in config.json"
        for key, ours, theirs in _differences(stated, read)
        if key not in _CHOSEN
    )


def _differences(a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    """Yield the dotted keys that both mappings have with different values, and the values."""
    for key in sorted(a.keys() & b.keys()):
        ours, theirs = a[key], b[key]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            for inner, our, their in _differences(ours, theirs):
                yield f"{key}.{inner}", our, their
        elif ours != theirs:
            yield key, ours, theirs


def _shown(value: object) -> str:
    text = repr(value)

    return text if len(text) <= 80 else f"{text[:80]}…"
