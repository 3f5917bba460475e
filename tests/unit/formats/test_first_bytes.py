"""What a file is, its first bytes say; its name says what somebody took it for."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save as save_safetensors

from lading import formats
from lading.errors import CorruptModelCheckpointError, NotSupportedError, RefusedPickleError
from lading.system import filesystem
from tests.helpers.torch_files import equal, read_all, save

STATE = {"a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
CONTENTS = {
    "zip": save(STATE),
    "legacy": save(STATE, legacy=True),
    "protocol 4": save(STATE, legacy=True, protocol=4),
    "safetensors": save_safetensors(STATE),
}
NAMES = (
    "model.pth.tar", "model.th", "model.jit", "model.t7", "MODEL.PTH", "model", "12345", "model.bin", "model.pt",
    "model.ckpt", "model.safetensors", "model.v2", "model.pkl", "model.weights", "best.model",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", CONTENTS)
def test_the_bytes_tell_the_format(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(CONTENTS[content])
    manifest = formats.index(tmp_path / name)
    assert manifest.format == ("safetensors" if content == "safetensors" else "torch")
    found = read_all(tmp_path / name, manifest)
    assert found.keys() == STATE.keys()
    assert all(equal(found[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("content", CONTENTS)
def test_in_folders_parts_and_archives(tmp_path: Path, content: str) -> None:
    kind = "safetensors" if content == "safetensors" else "torch"
    for name in ("pytorch_model.bin", "model.safetensors", "consolidated.00.pth"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(CONTENTS[content])
        assert (formats.index(folder).format, len(formats.index(folder))) == (kind, 2)

    for suffix in ("bin", "safetensors"):
        folder = tmp_path / f"index of {suffix}"
        folder.mkdir()
        stem = "pytorch_model" if suffix == "bin" else "model"
        (folder / f"{stem}.1.{suffix}").write_bytes(CONTENTS[content])
        weight_map = dict.fromkeys(STATE, f"{stem}.1.{suffix}")
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        assert (formats.index(folder).format, len(formats.index(folder))) == (kind, 2)

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("in/model")
        info.size = len(CONTENTS[content])
        archive.addfile(info, io.BytesIO(CONTENTS[content]))
    manifest = formats.index(tmp_path / "a.tar" / "in" / "model")
    assert manifest.format == kind
    assert all(equal(value, STATE[key]) for key, value in read_all(tmp_path / "a.tar", manifest).items())


def test_strided_tensors_of_any_name_are_rewritten(tmp_path: Path) -> None:
    state = {"w": STATE["a.weight"].t()}
    (tmp_path / "model.th").write_bytes(save(state))
    made = formats.readable(tmp_path / "model.th", cache=tmp_path / "cache")
    assert equal(read_all(made)["w"], state["w"].contiguous())


def _zip(**records: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>" + b"x" * 600 + b"</body></html>"
OTHERS = {
    "pointer": (POINTER, CorruptModelCheckpointError, "Git LFS"),
    "page": (PAGE, CorruptModelCheckpointError, "web page"),
    "short page": (b"<html>", CorruptModelCheckpointError, "web page"),
    "json": (b'{"error": "Invalid username or password."}', CorruptModelCheckpointError, "Invalid username"),
    "text": ("Access to this model is restricted – ".encode() * 40, CorruptModelCheckpointError, "Access to this"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 600, CorruptModelCheckpointError, "GGUF"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + b"\0" * 600, CorruptModelCheckpointError, "HDF5"),
    "NumPy": (b"\x93NUMPY\1\0v\0{'descr'" + b" " * 600, CorruptModelCheckpointError, "NumPy"),
    "gzip": (gzip.compress(save(STATE)), NotSupportedError, "gzip"),
    "PDF": (b"%PDF-1.7\n" + b"\0" * 600, CorruptModelCheckpointError, "PDF"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt", "model.PTH", "model.pth.tar"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_something_else_is_called_by_its_name(tmp_path: Path, kind: str, name: str) -> None:
    data, error, word = OTHERS[kind]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=word) as raised:
        formats.index(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("name", ["model", "model.v2"])
def test_what_is_something_else_without_a_known_suffix(tmp_path: Path, name: str) -> None:
    for kind, (data, _, word) in OTHERS.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises((CorruptModelCheckpointError, NotSupportedError), match=word):
            formats.index(tmp_path / name)
        assert not formats.first_bytes.is_checkpoint(data), kind  # type: ignore[attr-defined]


def test_archives_and_pickles_of_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_zip(**{"model.safetensors": CONTENTS["safetensors"]}))
    with pytest.raises(CorruptModelCheckpointError, match=r"a zip archive, whose first file is 'model\.safetensors'"):
        formats.index(path)
    path.write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(CorruptModelCheckpointError, match="another pickle"):
        formats.index(path)
    path.write_bytes(_zip(**{"m/data.pkl": b"", "m/constants.pkl": b""}).replace(b"\x08\0\0\0!", b"\0\0\0\0!"))
    with pytest.raises((RefusedPickleError, CorruptModelCheckpointError)):
        formats.index(path)
    with tarfile.open(tmp_path / "model.pth.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"))
    with pytest.raises(NotSupportedError, match=r"path to a member .*model\.pth\.tar/model\.pt"):
        formats.index(tmp_path / "model.pth.tar")


@pytest.mark.parametrize("size", range(0, 40, 3))
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["model", "model.pt", "model.safetensors"])
def test_files_that_were_cut_are_damaged(tmp_path: Path, name: str, content: str, size: int) -> None:
    (tmp_path / name).write_bytes(CONTENTS[content][:size])
    with pytest.raises(CorruptModelCheckpointError):
        formats.index(tmp_path / name)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_is_opened_once(tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    before = filesystem.open_regular

    def count(path: Path) -> BinaryIO:
        opened.append(path)
        return before(path)

    monkeypatch.setattr(filesystem, "open_regular", count)
    (tmp_path / "model").write_bytes(CONTENTS[content])
    formats.index(tmp_path / "model")
    assert len(opened) == 1
