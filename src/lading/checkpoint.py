"""Checkpoints that are on this machine: where a card's is, what it holds, and whether the catalog still knows."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lading import formats
from lading.box import Box
from lading.card import AssetCard, checkpoint_ref, path_uri
from lading.catalog.ingest import record_checkpoint
from lading.catalog.store import AssetStore, LocalCopy, StoredCheckpoint, get_asset_store
from lading.errors import (
    CatalogError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    InternalError,
    ModelGatedError,
    NotSupportedError,
)
from lading.family import Family, family_of_model_type
from lading.fetch import fetch
from lading.filesystem import FileStat
from lading.keymap import rename
from lading.manifest import Manifest
from lading.transfer.execute import execute
from lading.transfer.files import ShardFile
from lading.transfer.plan import Wanted, plan

log = logging.getLogger("lading")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that is on this machine: what it holds, and the files in the state in which that was read."""

    name: str
    path: Path
    manifest: Manifest
    files: tuple[ShardFile, ...]
    """One for each shard of the manifest."""


def card_checkpoint(card: AssetCard, store: AssetStore) -> Checkpoint:
    """The checkpoint of a card, its manifest from the catalog where that is known and still true.

    :raises ModelGatedError: the card names none.
    :raises FetchError: it is not on this machine.
    """
    path = _fetch(card)
    _refuse_quantised_config(read_hf_config(path), path)

    # All that the catalog can do here is to save the reading of headers, so its failures are not the load's.
    try:
        stored = store.checkpoint(path_uri(path))
    except (CatalogError, OSError) as error:
        log.warning("the manifest of %s cannot be read from the catalog: %s", card.name, error)
        stored = None

    files = None if stored is None else _unchanged(stored, path)
    if stored is not None and files is not None:
        return Checkpoint(name=card.name, path=path, manifest=stored.manifest, files=files)

    checkpoint = _read_checkpoint(card.name, path)
    try:
        _record(checkpoint, store, card.name)
    except (CatalogError, OSError) as error:
        log.warning("the manifest of %s is not in the catalog: %s", card.name, error)

    return checkpoint


def index_checkpoint(target: str | Path, *, store: AssetStore | None = None) -> StoredCheckpoint:
    """Read the manifest of a card's checkpoint, or of the one at a path, and write it to the catalog.

    :param target: the name of a card, or a path.

    :raises AssetNotFoundError: no card has that name.
    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the file breaks the rules of its format.
    :raises CatalogError: the catalog cannot be written.
    """
    store = store or get_asset_store()
    if isinstance(target, Path):
        path, name = target.expanduser().absolute(), None
    else:
        card = store.retrieve_card(target)
        path, name = _fetch(card), card.name

    _record(_read_checkpoint(name or str(path), path), store, name)
    stored = store.checkpoint(path_uri(path))
    if stored is None:
        raise InternalError(f"the manifest of {path} was written to the catalog, but is not there")

    return stored


def path_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a path, of which the catalog is not asked and learns nothing.

    :raises CheckpointNotFoundError: nothing is there (also a ``FileNotFoundError``).
    """
    return _read_checkpoint(str(path), path)


def _fetch(card: AssetCard) -> Path:
    ref = checkpoint_ref(card)
    if ref.gated:
        raise ModelGatedError(card.name, ref.info_url)

    return fetch(ref.uri, inner_path=ref.path)


def _record(checkpoint: Checkpoint, store: AssetStore, card_name: str | None) -> None:
    if not store.database.writable:
        raise CatalogError(
            f"The catalog {store.database.url} cannot be written. Check the permissions of the file and its folder, or "
            "name another one in LADING_DATABASE_URL."
        )

    folder = _folder(checkpoint.path)
    copies = [
        LocalCopy(file=file, path=folder / file, stat=stat, verified_at=None)
        for file, stat in _stat_files(checkpoint.manifest, checkpoint.path).items()
    ]
    record_checkpoint(
        store.database,
        uri=path_uri(checkpoint.path),
        manifest=checkpoint.manifest,
        copies=copies,
        card_name=card_name,
    )


RECENT_NS = 50_000_000
"""File systems tell times in steps of some milliseconds: a file that is younger may change without looking changed."""


def _read_checkpoint(name: str, path: Path) -> Checkpoint:
    """Read all headers, and make sure that the files are still those whose headers were read."""
    start = time.time_ns()
    manifest = formats.index(path)
    stats = _stat_files(manifest, path)

    if any(stat.ctime_ns > start - RECENT_NS for stat in stats.values()):
        again = formats.index(path)
        if again != manifest or _stat_files(again, path) != stats:
            raise CorruptModelCheckpointError(
                path, f"{path} changed while its headers were read. Try again when nothing writes to it any more."
            )

    return Checkpoint(name=name, path=path, manifest=manifest, files=_shard_files(manifest, path, stats))


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _stat_files(manifest: Manifest, path: Path) -> dict[str, FileStat]:
    """The state of every file that determines what the checkpoint holds."""
    folder = _folder(path)
    names = [shard.name for shard in manifest.shards]
    if manifest.index_name is not None:
        names.append(manifest.index_name)

    return {name: FileStat.from_stat(os.stat(folder / name)) for name in names}


def _shard_files(manifest: Manifest, path: Path, stats: Mapping[str, FileStat]) -> tuple[ShardFile, ...]:
    folder = _folder(path)

    return tuple(ShardFile(path=folder / shard.name, stat=stats[shard.name]) for shard in manifest.shards)


def _unchanged(stored: StoredCheckpoint, path: Path) -> tuple[ShardFile, ...] | None:
    """The files of a checkpoint whose manifest the catalog knows; ``None`` if any is not as it was when it was read."""
    if path.is_dir() and stored.manifest.index_name is None and (path / formats.INDEX_NAME).exists():
        return None  # an index has come, and its word decides
    try:
        stats = _stat_files(stored.manifest, path)
    except OSError:
        return None

    known = {copy.file: copy.stat for copy in stored.copies}
    if stats != {name: known.get(name) for name in stats}:
        return None

    return _shard_files(stored.manifest, path, stats)


def _refuse_quantised_config(hf_config: Mapping[str, object], path: Path) -> None:
    quantisation = hf_config.get("quantization_config")
    if quantisation is not None:
        scheme = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
        raise NotSupportedError(
            f"The checkpoint at {path} is quantised (config.json: `quantization_config` of the scheme {scheme!r}), "
            "which lading does not load. Use the checkpoint in its original precision."
        )


def read_hf_config(path: Path) -> dict[str, object]:
    """The ``config.json`` in a Hugging Face style folder; empty where there is none.

    :raises CorruptModelCheckpointError: it is not a JSON object.
    """
    file = path / "config.json" if path.is_dir() else path.parent / "config.json"
    try:
        if not file.is_file():
            return {}
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CorruptModelCheckpointError(file, f"{file} is expected to be a JSON object, but: {error}.") from None

    if not isinstance(config, dict):
        raise CorruptModelCheckpointError(
            file, f"{file} is expected to be a JSON object, but is of type {type(config).__name__}."
        )

    return config


def family_of_folder(path: Path) -> tuple[Family[Any, Any], Any]:
    """Family and configuration of a Hugging Face style folder, from its ``config.json``.

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
    family = family_of_model_type(model_type, architectures) if isinstance(model_type, str) else None
    if family is None or family.from_hf is None:
        of = f" with the architectures {architectures}" if architectures else ""
        raise NotSupportedError(
            f"{path}/config.json is of the model type {model_type!r}{of}, which no registered family reads "
            "(`lading families` shows them)."
        )

    _refuse_quantised_config(hf_config, path)

    return family, family.from_hf(hf_config)


def read_tensors(
    checkpoint: Checkpoint, tensors: Sequence[int], dtypes: Sequence[str], mmap: bool = False
) -> list[Tensor]:
    """Whole tensors of a checkpoint, on the CPU.

    :param tensors: positions in the manifest.
    :param dtypes: of each in memory.
    """
    boxes = [Box.whole(checkpoint.manifest.shapes[i]) for i in tensors]
    planned = plan(checkpoint.manifest, Wanted(tensors=tensors, boxes=boxes, dtypes=dtypes), mapped=mmap)
    shapes = [(box.sizes, dtype) for box, dtype in zip(boxes, dtypes, strict=True)]

    return execute(planned, checkpoint.files, shapes, device=torch.device("cpu"))


def iter_tensors(
    checkpoint: Checkpoint, family: Family[Any, Any], config: Any, *, mmap: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Pairs (parameter name, tensor) of a checkpoint, in the order of its files, one tensor in memory at a time."""
    manifest = checkpoint.manifest
    for i, name in enumerate(rename(manifest.names, family.rules(config))):
        if name is not None:
            (tensor,) = read_tensors(checkpoint, [i], [manifest.dtypes[i]], mmap)
            yield name, tensor
