"""Configurations that lack what only the ``config.json`` beside a checkpoint tells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lading.brought import fetch_along
from lading.catalog.store import AssetStore
from lading.checkpoint import Checkpoint
from lading.construct import check_config_type
from lading.errors import CheckpointNotFoundError
from lading.family import Family
from lading.fetch.source import RemoteFile, Snapshot
from lading.fetch.sources import open_source
from lading.folder import parse_hf_config, read_hf_config, refuse_quantised_config
from lading.published import CONFIG_NAME, name_in_source
from lading.settings import Settings


def completed(
    config: Any,
    family: Family[Any, Any],
    checkpoint: Checkpoint,
    hf_config: Mapping[str, object] | None = None,
    *,
    store: AssetStore | None = None,
) -> Any:
    """The configuration with what it lacks; the very one, unless the family takes it from beside the checkpoint.

    :param hf_config: the ``config.json`` beside it, where it is known; else it is read, or fetched.
    :param store: whose catalog is told if it is fetched.

    :raises TypeError: ``config`` is not of the family's class.
    :raises FetchError: ``config.json`` cannot be fetched.
    :raises CorruptModelCheckpointError: it is not a JSON object.
    :raises NotSupportedError: it asks for something that the family does not do.
    :raises PolicyError: it asks for code of a repository to be run.
    """
    if family.complete is None:
        return config

    check_config_type(config, family)
    hf_config = _hf_config(checkpoint, store) if hf_config is None else hf_config
    refuse_quantised_config(hf_config, checkpoint.where)

    return family.complete(config, hf_config)


def _hf_config(checkpoint: Checkpoint, store: AssetStore | None) -> Mapping[str, object]:
    """The ``config.json`` beside a checkpoint, fetched where it is not here; empty where there is none."""
    ref = checkpoint.ref
    if ref is None:
        return read_hf_config(Path(checkpoint.where))

    source = open_source(
        ref.uri, inner_path=ref.path, revision=checkpoint.revision or None, settings=Settings.from_environment()
    )
    shards = [shard.name for shard in checkpoint.manifest.shards]
    file = RemoteFile(name=name_in_source(source.inner, CONFIG_NAME, shards=shards), size=None)
    snapshot = Snapshot(uri=checkpoint.uri, revision=checkpoint.revision, files=(file,))
    try:
        (fetched,) = fetch_along(source, snapshot, [file], store, checkpoint.uri, progress=False)
    except CheckpointNotFoundError:
        return {}

    return parse_hf_config(fetched.path)  # in lading's cache it has another name
