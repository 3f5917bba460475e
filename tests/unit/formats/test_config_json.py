"""What stands in the place of the text files beside a checkpoint: pointers, devices, files that are too large."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lading import CorruptModelCheckpointError, load_tokenizer
from lading.formats import index
from lading.formats.config_json import MAX_CONFIG_SIZE, parse_config_json, read_hf_config
from lading.models.hf_config import family_of_folder
from tests.helpers.make_checkpoint import make

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n"
INDEX = "model.safetensors.index.json"

READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("config.json", family_of_folder),
    (INDEX, index),
    ("tokenizer.json", load_tokenizer),
    ("tokenizer.model", load_tokenizer),
]


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    folder = make(tmp_path / "m", shards=2)
    (folder / name).write_text(POINTER)

    with pytest.raises(CorruptModelCheckpointError, match=r"pointer of Git LFS.*`git lfs pull`") as error:
        read(folder)
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize(("name", "read"), READERS)
def test_what_is_no_regular_file(tmp_path: Path, name: str, read: Callable[[Path], object], kind: str) -> None:
    folder = make(tmp_path / "m", shards=2)
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()

    with pytest.raises(CorruptModelCheckpointError, match="expected a regular file"):
        read(folder)


@pytest.mark.parametrize(("name", "read"), READERS)
def test_a_file_of_2_gb(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    folder = make(tmp_path / "m", shards=2)
    (folder / name).touch()
    os.truncate(folder / name, 2 << 30)

    with pytest.raises(CorruptModelCheckpointError, match="at most"):
        read(folder)


def test_a_config_json_that_is_not_there(tmp_path: Path) -> None:
    assert read_hf_config(tmp_path) == {}
    (tmp_path / "config.json").symlink_to("nowhere")
    assert read_hf_config(tmp_path) == {}


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1} 2'])
def test_what_is_no_json_object(data: bytes) -> None:
    with pytest.raises(CorruptModelCheckpointError, match=r"expected a JSON object, found .* own file"):
        parse_config_json(data, label="x")
    assert parse_config_json(b'{"a": [1]}', label="x") == {"a": [1]}
    assert MAX_CONFIG_SIZE >= 10_000_000
