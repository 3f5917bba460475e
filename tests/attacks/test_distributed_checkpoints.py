"""Checkpoints of torch.distributed.checkpoint that lie, that would run code, or that are damaged."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from lading import formats
from lading.errors import (
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    LadingError,
    NotSupportedError,
    RefusedPickleError,
)
from tests.helpers.torch_files import read_all

W = torch.arange(24.0).reshape(6, 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tensor ``w`` in two parts, of four rows and of two, and ``b`` in one, beside other things."""
    place = tmp_path / "saved"
    write(place, {"model": {"upper": W[:4].clone(), "lower": W[4:].clone(), "b": torch.ones(3)}, "step": 3})

    def as_ranks_do(metadata: Metadata) -> None:
        """One process writes no parts: these are two tensors of it."""
        upper, lower = (metadata.state_dict_metadata.pop(f"model.{name}") for name in ("upper", "lower"))
        chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 4))), chunk((4, 0), (2, 4))]
        assert isinstance(upper, TensorStorageMetadata)
        metadata.state_dict_metadata["model.w"] = replace(upper, size=torch.Size((6, 4)), chunks=chunks)
        for name, start in (("upper", 0), ("lower", 4)):
            info = metadata.storage_data.pop(MetadataIndex(f"model.{name}", (0, 0)))
            metadata.storage_data[MetadataIndex("model.w", (start, 0))] = info
            del metadata.planner_data[f"model.{name}"]
        metadata.planner_data["model.w"] = ("model", "w")
        assert lower

    edit(place, as_ranks_do)
    return place


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def write(folder: Path, state: dict[str, Any], **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a save without a process group
        dcp.save(state, checkpoint_id=folder, no_dist=True, **options)


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    """Change what ``.metadata`` says."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def test_what_the_lies_are_made_of_is_true(folder: Path) -> None:
    manifest = formats.index(folder)
    assert sorted(manifest.names) == ["b", "w"]
    assert {shard.name for shard in manifest.shards} == {"__0_0.distcp"}
    (i,) = manifest.pieces
    assert manifest.names[i] == "w"
    parts = sorted(manifest.pieces[i])
    assert [(piece.starts, piece.shape) for piece in parts] == [((0, 0), (4, 4)), ((4, 0), (2, 4))]
    data = (folder / "__0_0.distcp").read_bytes()
    for piece, expected in zip(parts, (W[:4], W[4:]), strict=True):
        found = torch.frombuffer(bytearray(data[piece.offset : piece.offset + expected.nbytes]), dtype=torch.float32)
        assert torch.equal(found.reshape(expected.shape), expected)
    assert torch.equal(read_all(folder, manifest.take([manifest.names.index("b")]))["b"], torch.ones(3))


# --- lies about the parts -------------------------------------------------------------------------------------------


def _w(metadata: Metadata) -> TensorStorageMetadata:
    found = metadata.state_dict_metadata["model.w"]
    assert isinstance(found, TensorStorageMetadata)
    return found


def _chunks(*chunks: ChunkStorageMetadata) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        of = _w(metadata)
        infos = [metadata.storage_data.pop(MetadataIndex("model.w", (start, 0))) for start in (0, 4)]
        of.chunks = list(chunks)
        for each, info in zip(chunks, [*infos, *infos], strict=False):
            metadata.storage_data[MetadataIndex("model.w", each.offsets)] = info

    return change


def _size(*size: int) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        _w(metadata).size = torch.Size(size)

    return change


def _info(**values: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        key = MetadataIndex("model.w", (4, 0))
        metadata.storage_data[key] = replace(metadata.storage_data[key], **values)

    return change


def _dtype(metadata: Metadata) -> None:
    _w(metadata).properties.dtype = torch.int32


def _swapped(metadata: Metadata) -> None:
    one, other = MetadataIndex("model.w", (0, 0)), MetadataIndex("model.w", (4, 0))
    data = metadata.storage_data
    data[one], data[other] = data[other], data[one]


def _of_an_object(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("model.w", (4, 0))] = metadata.storage_data[MetadataIndex("step")]


LIES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "a part is missing": (_chunks(chunk((0, 0), (4, 4))), "16: chunks are missing"),
    "no part": (_chunks(), "found none"),
    "parts overlap": (_chunks(chunk((0, 0), (4, 4)), chunk((2, 0), (2, 4))), "chunks that overlap"),
    "parts are the same": (_chunks(chunk((0, 0), (4, 4)), chunk((0, 0), (2, 4))), "chunks that overlap"),
    "parts overlap, and as many are missing": (
        _chunks(chunk((0, 0), (3, 4)), chunk((2, 0), (3, 4))), "chunks that overlap"),
    "a part is outside": (_chunks(chunk((0, 0), (4, 4)), chunk((5, 0), (2, 4))), "within the shape"),
    "a part is outside of an empty tensor": (_size(0, 4), "within the shape"),
    "a part has other dims": (_chunks(chunk((0, 0), (4, 4)), chunk((4,), (2,))), "chunks of 2 dims"),
    "another shape of the same size": (_size(4, 6), "within the shape"),
    "more elements than there are": (_size(7, 4), "chunks of all 28 elements"),
    "a huge shape": (_size(2**40, 2**40), "fewer than 2\\^63 bits"),
    "a part has no place": (lambda m: m.storage_data.pop(MetadataIndex("model.w", (4, 0))), "the place of its part"),
    "another file": (_info(relative_path="__1_0.distcp"), "the file '__1_0.distcp'"),
    "a path to the parent": (_info(relative_path="../__0_0.distcp"), "plain file names"),
    "an absolute path": (_info(relative_path="/etc/passwd.distcp"), "plain file names"),
    "a path with a backslash": (_info(relative_path="..\\__0_0.distcp"), "plain file names"),
    "a path with a null": (_info(relative_path="a\0.distcp"), "plain file names"),
    "a path with a surrogate": (_info(relative_path="\udcff.distcp"), "plain file names"),
    "a file of another kind": (_info(relative_path="config.json"), "plain file names"),
    "an empty path": (_info(relative_path=""), "plain file names"),
    "an offset behind the end": (_info(offset=10**6), "a file of"),
    "an offset of more than 64 bits": (_info(offset=2**64), "an offset and a length"),
    "a negative offset": (_info(offset=-1), "an offset and a length"),
    "a length behind the end": (_info(length=10**6), "a file of"),
    "a length of nothing": (_info(length=0), "an archive of 0 bytes"),
    "an offset inside another part": (_info(offset=7), "torch.save"),
    "a place that is that of another part, too": (
        lambda m: m.storage_data.update(
            {MetadataIndex("model.w", (4, 0)): m.storage_data[MetadataIndex("model.w", (0, 0))]}
        ), "where another ends"),
    "the place of another part": (_swapped, "as .metadata says"),
    "the place of an object": (_of_an_object, "expected a tensor, found 3"),
    "another dtype": (_dtype, "I32 of the shape"),
    "a place that is no place": (
        lambda m: m.storage_data.update({MetadataIndex("model.w", (4, 0)): "__0_0.distcp"}), "class _StorageInfo"),
    "a chunk that is no chunk": (lambda m: _w(m).chunks.append("chunk"), "class ChunkStorageMetadata"),  # type: ignore[arg-type]
    "no size": (lambda m: setattr(_w(m), "size", None), "a size and a list"),
    "no tensors": (lambda m: m.state_dict_metadata.clear(), "at least one tensor"),
    "a number of tensors": (lambda m: setattr(m, "state_dict_metadata", 3), "expected a dict"),
    "a list of places": (lambda m: setattr(m, "storage_data", [1]), "expected a dict"),
    "places by name": (lambda m: m.storage_data.update({"model.w": 1}), "class MetadataIndex"),
    "a name of two tensors": (lambda m: m.planner_data.update({"model.b": ("model", "w")}), "a path of its own"),
    "a name below a tensor": (lambda m: m.planner_data.update({"model.b": ("model", "w", "b")}), "a path of its own"),
    "a deep name": (lambda m: m.planner_data.update({"model.b": ("a",) * 65}), "at most 64 keys"),
    "an empty path of keys": (lambda m: m.planner_data.update({"model.b": ()}), "at most 64 keys"),
    "a long name": (lambda m: m.planner_data.update({"model.b": ("model", "b" * 600)}), "at most 512 bytes"),
    "a name that is no text": (lambda m: m.planner_data.update({"model.b": ("model", "\udcff")}), "at most 512 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies(folder: Path, lie: str) -> None:
    change, words = LIES[lie]
    edit(folder, change)
    with pytest.raises(CorruptModelCheckpointError, match=words) as caught:
        formats.index(folder)
    assert len(str(caught.value)) < 1500


def test_parts_that_are_cut_along_many_dims(tmp_path: Path) -> None:
    write(tmp_path / "saved", {"w": torch.zeros(1, 1, 1, 1, 1)})

    def change(metadata: Metadata) -> None:
        of = metadata.state_dict_metadata["w"]
        assert isinstance(of, TensorStorageMetadata)
        of.size = torch.Size((2,) * 5)

    edit(tmp_path / "saved", change)
    with pytest.raises(CorruptModelCheckpointError, match="at most 4 dims"):
        formats.index(tmp_path / "saved")


def test_metadata_holds_only_so_many_objects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lading.formats.torch_save.unpickle.MAX_OBJECTS", 10)
    with pytest.raises(CorruptModelCheckpointError, match="at most 40 lists, dicts and tuples"):
        formats.index(folder)


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_cut_file(folder: Path, keep: float) -> None:
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptModelCheckpointError):
        formats.index(folder)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_cut_metadata(folder: Path, keep: float) -> None:
    path = folder / ".metadata"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CorruptModelCheckpointError):
        formats.index(folder)


@pytest.mark.parametrize(
    "content", [b"more", b"{}", b"\x80\x04N.", b"version https://git-lfs.github.com/spec/v1\n", pickle.dumps({"a": 1})]
)
def test_other_metadata(folder: Path, content: bytes) -> None:
    path = folder / ".metadata"
    path.write_bytes(path.read_bytes() + content if content == b"more" else content)
    with pytest.raises(CorruptModelCheckpointError):
        formats.index(folder)


def test_a_save_that_was_interrupted(folder: Path) -> None:
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match="The save was interrupted"):
        formats.index(folder)


def test_metadata_that_is_no_file(folder: Path) -> None:
    (folder / ".metadata").unlink()
    (folder / ".metadata").mkdir()
    with pytest.raises(CorruptModelCheckpointError, match="regular file"):
        formats.index(folder)
    (folder / ".metadata").rmdir()
    os.mkfifo(folder / ".metadata")
    with pytest.raises(CorruptModelCheckpointError, match="regular file"):
        formats.index(folder)


def test_a_byte_of_metadata_is_another(folder: Path) -> None:
    """Whatever byte it is: a manifest, or an error of ours."""
    path = folder / ".metadata"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            formats.index(folder)
        except LadingError:
            pass


# --- code -------------------------------------------------------------------------------------------------------------


class _Calls:
    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self._reduced = function, args

    def __reduce__(self) -> Any:
        return self._reduced


@pytest.mark.parametrize("where", ["value", "key", "planner_data", "instead"])
def test_metadata_that_runs_code(folder: Path, where: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    call: Any = _Calls(os.system, f"touch {canary}")
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if where == "value":
        metadata.state_dict_metadata["more"] = call
    elif where == "key":
        metadata.storage_data[call] = 1
    elif where == "planner_data":
        metadata.planner_data["more"] = (call,)
    (folder / ".metadata").write_bytes(pickle.dumps(call if where == "instead" else metadata))
    with pytest.raises(RefusedPickleError, match=r"posix\.system"):
        formats.index(folder)
    try:
        formats.index(folder, restrict=False)
    except CorruptModelCheckpointError:
        assert where == "instead"
    assert not canary.exists()


def test_a_part_that_runs_code(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    lower = tmp_path / "lower.pt"
    torch.save(_Calls(os.system, f"touch {canary}"), lower)
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data + lower.read_bytes())
    edit(folder, _info(offset=len(data), length=lower.stat().st_size))
    for restrict in (True, False):
        with pytest.raises(RefusedPickleError, match=r"posix\.system"):
            formats.index(folder, restrict=restrict)
    assert not canary.exists()


# --- what is not supported --------------------------------------------------------------------------------------------


def test_transformed_bytes(folder: Path) -> None:
    edit(folder, _info(transform_descriptors=["zstd"]))
    with pytest.raises(NotSupportedError, match="transformed by 'zstd'"):
        formats.index(folder)


def test_metadata_of_each_rank(tmp_path: Path) -> None:
    write(tmp_path / "saved", {"w": W})
    (tmp_path / "saved" / ".metadata").rename(tmp_path / "saved" / "__0.metadata")
    with pytest.raises(NotSupportedError, match="use_collectives=True"):
        formats.index(tmp_path / "saved")


def test_a_part_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "saved", {"w": torch.zeros(3, 4).T})
    with pytest.raises(NotSupportedError, match="row-major"):
        formats.index(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32])
def test_a_dtype_that_no_manifest_has(tmp_path: Path, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex32
        write(tmp_path / "saved", {"w": torch.zeros(3, dtype=dtype)})
    with pytest.raises(NotSupportedError, match="one of the dtypes"):
        formats.index(tmp_path / "saved")


# --- what is ignored --------------------------------------------------------------------------------------------------


def test_what_else_a_checkpoint_holds_is_not_looked_at(folder: Path) -> None:
    def change(metadata: Metadata) -> None:
        of = metadata.state_dict_metadata
        of["optimizer.w"], of["rng"] = replace(_w(metadata), chunks=[chunk((9, 9), (9, 9))]), BytesStorageMetadata()
        metadata.planner_data["optimizer.w"] = ("optimizer", "w")
        metadata.planner_data["rng"] = ("rng", 0)
        metadata.storage_data[MetadataIndex("optimizer.w", (9, 9))] = _StorageInfo("../gone.distcp", 0, 1)

    edit(folder, change)
    assert sorted(formats.index(folder).names) == ["b", "w"]


def test_metadata_without_paths_is_flat(folder: Path) -> None:
    edit(folder, lambda metadata: setattr(metadata, "planner_data", None))
    assert sorted(formats.index(folder).names) == ["model.b", "model.w"]


def test_other_checkpoints_in_the_folder_come_first(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"consolidated": torch.ones(2)}, folder / "model.safetensors")
    assert list(formats.index(folder).names) == ["consolidated"]
