"""The layout of an export: the tensors of each file, and the content of ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lading.errors import LadingError, NotSupportedError
from lading.formats.config_json import CONFIG_NAME, read_config_json, refuse_quantized_config
from lading.formats.manifest import FLOATS
from lading.formats.safetensors_writer import Entry, shard_names, shards_of
from lading.models.construct import build_on_meta
from lading.models.family import Family
from lading.models.targets import Targets, targets_of
from lading.planning.box import Box
from lading.planning.rules import Rule, parts_of
from lading.transfer.dtypes import TORCH_DTYPES

BATCH = 64 << 20
"""The most bytes of tensors that are read together."""


def check_shard_size(size: int) -> None:
    """Check the maximal size of files, before any work is done.

    :raises ValueError: the size is not positive.
    """
    if size < 1:
        raise ValueError(f"`shard_size` must be positive, but is {size}")


def files_of(entries: Sequence[Entry], shard_size: int) -> Mapping[str, Sequence[Entry]]:
    """Return the tensors of each file, by its name."""
    shards = shards_of(entries, shard_size)

    return {file: [entries[i] for i in shard] for file, shard in zip(shard_names(len(shards)), shards, strict=True)}


def files_of_stages(
    stages: Mapping[tuple[Entry, ...], Sequence[int]], shard_size: int
) -> tuple[Mapping[str, Sequence[Entry]], Mapping[str, int]]:
    """Return the tensors of each file, and the rank that writes it, by the file's name.

    :param stages: the ranks that hold each set of tensors.
    """
    shards: list[list[Entry]] = []
    writers: list[int] = []
    for entries, ranks in stages.items():
        for number, shard in enumerate(shards_of(entries, shard_size)):
            if shard:
                shards.append([entries[i] for i in shard])
                writers.append(ranks[number % len(ranks)])
    names = shard_names(len(shards))

    return dict(zip(names, shards, strict=True)), dict(zip(names, writers, strict=True))


def batches(shard: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Yield tensors to read together: as many as fit in :data:`BATCH`, or one."""
    batch: list[Entry] = []
    size = 0
    for entry in shard:
        if batch and size + entry.nbytes > BATCH:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.nbytes
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a parameter that is written as a tensor of its own."""

    parameter: Entry
    box: Box


def published(entries: Iterable[Entry], rules: Sequence[Rule]) -> dict[Entry, Part]:
    """Return the tensors that a published checkpoint has for parameters, in the order of these, with their parts.

    :param entries: the parameters.
    :param rules: those of :attr:`lading.models.family.Family.published`.
    """
    return {
        Entry(name=name, dtype=entry.dtype, shape=shape): Part(entry, box)
        for entry in entries
        for name, shape, box in parts_of(entry.name, entry.shape, rules)
    }


def elements_by_dtype(entries: Iterable[Entry]) -> dict[str, int]:
    """Return the number of elements of each dtype, a key of :data:`lading.formats.manifest.BITS`."""
    elements: dict[str, int] = {}
    for entry in entries:
        elements[entry.dtype] = elements.get(entry.dtype, 0) + math.prod(entry.shape)

    return elements


def torch_name(dtype: str) -> str:
    """Return the name of a dtype in torch and ``config.json``."""
    return str(TORCH_DTYPES[dtype]).removeprefix("torch.")


_MADE = ("architectures", "apply_spec_augment", "mask_time_prob", "mask_feature_prob")
"""The keys that are always taken from the written model. The ``config.json`` of the checkpoint may enable masking, for
which transformers would initialize an embedding, although the model has none.
"""


def config_values(
    family: Family[Any, Any],
    config: Any,
    targets: Targets,
    entries: Sequence[Entry],
    beside: Mapping[str, Path],
) -> Mapping[str, object]:
    """Return the content of ``config.json``: that of the checkpoint's own, if it describes this model.

    :param targets: the parameters of the model.
    :param entries: the tensors that are written.
    :param beside: the other files of the checkpoint, by name.

    :raises NotSupportedError: no ``config.json`` can describe the model, or the checkpoint's own says that it is
        quantized.
    :raises CorruptModelCheckpointError: the checkpoint's own is not a JSON object.
    :raises OSError: it cannot be read.
    """
    own: Mapping[str, object] = {}
    if CONFIG_NAME in beside:
        own = read_config_json(beside[CONFIG_NAME]) or {}
        refuse_quantized_config(own, beside[CONFIG_NAME].parent)
    known = bool(own) and _is_of(own, family, targets)
    if family.to_hf is None and not known:
        raise NotSupportedError(
            f"No config.json can be made for models of the {family.name} family. Put that of the model into the folder "
            "of the checkpoint."
        )
    made: Mapping[str, object] = {}
    try:
        made = {} if family.to_hf is None else family.to_hf(config)
    except NotSupportedError:
        if not known:
            raise
    values = dict(own if known else made)
    values.pop("auto_map", None)  # names code that is not exported
    values.pop("quantization_config", None)  # a load has dequantized the weights
    values |= {key: made[key] for key in _MADE if key in made}

    for key in ("dtype", "torch_dtype"):
        values.pop(key, None)
    elements = elements_by_dtype(entry for entry in entries if entry.dtype in FLOATS)
    if elements:
        values["dtype"] = torch_name(max(elements, key=elements.__getitem__))

    return values


def _is_of(values: Mapping[str, object], family: Family[Any, Any], targets: Targets) -> bool:
    """Return whether a ``config.json`` describes a model with these parameters."""
    known = values.get("model_type") in family.hf_model_types or family.reads_other_model_types
    if family.from_hf is None or not known:
        return False
    try:
        found = targets_of(build_on_meta(family, family.from_hf(values)), dtype=None)
    except (LadingError, ValueError):
        return False

    return (found.names, found.shapes, found.aliases) == (targets.names, targets.shapes, targets.aliases)
