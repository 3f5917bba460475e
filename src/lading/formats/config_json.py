"""Reader of a checkpoint's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lading.errors import CheckpointNotFoundError, NotSupportedError
from lading.formats.files import corrupt, open_regular, refuse_lfs_pointer
from lading.formats.folder import folder_of
from lading.formats.manifest import BLOCK

_OWN_CONFIG = "Put the model's own file there."

MAX_CONFIG_SIZE = 16 << 20
"""The most bytes of a ``config.json``. The largest published ones, which name some 20,000 classes, have a tenth."""


def read_config_json(path: Path) -> dict[str, object] | None:
    """Read the ``config.json`` at ``path``, which may have another name; return ``None`` if it does not exist.

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
    """Check the size of a ``config.json`` before it is read.

    :raises CorruptModelCheckpointError: the size is above :data:`MAX_CONFIG_SIZE`.
    """
    if size > MAX_CONFIG_SIZE:
        raise corrupt(
            label,
            "",
            expected=f"a config.json of at most {MAX_CONFIG_SIZE:,} bytes",
            found=f"{size:,}",
            hint=_OWN_CONFIG,
        )


def parse_config_json(data: bytes, *, label: str) -> dict[str, object]:
    """Parse ``data`` as a JSON object.

    :param label: the path or the address of the file.

    :raises CorruptModelCheckpointError: ``data`` is something else.
    """
    refuse_lfs_pointer(data, label)
    try:
        config = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise corrupt(label, "", expected="a JSON object", found=f"an error: {error}", hint=_OWN_CONFIG) from None
    if not isinstance(config, dict):
        found = f"a value of the type {type(config).__name__}"
        raise corrupt(label, "", expected="a JSON object", found=found, hint=_OWN_CONFIG)

    return config


CONFIG_NAME = "config.json"

QUANTIZATION_NAMES: Mapping[str, tuple[str, str]] = {
    "quantize_config.json": ("gptq", "bits"),
    "quant_config.json": ("awq", "w_bit"),
}
"""The files in which early versions of AutoGPTQ and AutoAWQ state what is in ``quantization_config`` today; the scheme
of each, and a key that it has."""


_BLOCK_SCALED: Mapping[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": (None, "dynamic"),
}
"""The values with which weights are float8 numbers with a scale for each block, which a load dequantizes."""


def quantization_of(hf_config: Mapping[str, object]) -> str | None:
    """Return the scheme by which the weights are quantized: ``awq``, ``gptq`` …; ``None`` if they are not, or if they
    are float8 numbers with a scale for each block, which a load dequantizes.
    """
    quantization = hf_config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        return "unknown"
    if all(quantization.get(key) in values for key, values in _BLOCK_SCALED.items()):
        return None

    return str(quantization.get("quant_method", "unknown"))


def refuse_quantized_config(hf_config: Mapping[str, object], path: Path | str) -> None:
    """Check that the weights are not quantized, or in a way that a load undoes.

    :raises NotSupportedError: the configuration says that they are, in another way.
    """
    scheme = quantization_of(hf_config)
    if scheme is not None:
        raise NotSupportedError(
            f"The checkpoint at {path} is quantized (config.json: `quantization_config` of the scheme {scheme!r}), "
            "which lading does not load. Use the checkpoint in its original precision."
        )


def read_hf_config(path: Path, name: str = CONFIG_NAME) -> dict[str, object]:
    """Read the ``config.json`` in the folder of a checkpoint; return an empty mapping if it does not exist.

    If it does not say that the weights are quantized, and a file beside it does, the result says it, too.

    :param name: another name of it.

    :raises CorruptModelCheckpointError: it is not a regular file, is too large, or is not a JSON object.
    """
    folder = folder_of(path)
    config = read_config_json(folder / name) or {}
    if name == CONFIG_NAME and config.get("quantization_config") is None:
        for other, (scheme, key) in QUANTIZATION_NAMES.items():
            if key in (stated := read_config_json(folder / other) or {}):
                return {**config, "quantization_config": {"quant_method": scheme, **stated}}

    return config
