"""The file of a folder that is the checkpoint, and the error if it is missing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.formats import index
from lading.formats.folder import checkpoint_file

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("shards", "name"),
    [
        (SHARDS, "model.safetensors.index.json"),
        (["pytorch_model-00001-of-00002.bin"], "pytorch_model.bin.index.json"),
    ],
)
def test_shards_without_their_index(shards: list[str], name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=f"expected {name}") as caught:
        checkpoint_file([*shards, "config.json"], where="m", torch=True)

    assert "path of the file" not in str(caught.value)


def test_a_file_under_another_name() -> None:
    with pytest.raises(CheckpointNotFoundError, match="give the path of the file"):
        checkpoint_file(["adapter.safetensors"], where="m")


def _sharded(folder: Path, **listed: str) -> Path:
    save_file({"a": torch.zeros(2)}, folder / SHARDS[0])
    save_file({"b": torch.zeros(3)}, folder / SHARDS[1])
    weight_map = {"a": SHARDS[0], "b": SHARDS[1], **listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_an_index_may_list_a_tensor_that_no_file_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lading"):
        manifest = index(_sharded(tmp_path, draft=SHARDS[1]))

    assert sorted(manifest.names) == ["a", "b"]
    assert ["'draft'" in record.getMessage() for record in caplog.records] == [True]


def test_an_index_may_not_say_another_file(tmp_path: Path) -> None:
    with pytest.raises(CorruptModelCheckpointError, match="the index says"):
        index(_sharded(tmp_path, a=SHARDS[1], b=SHARDS[0]))
