from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import deserialize, safe_open
from safetensors.torch import save_file

from lading import formats
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.manifest import BITS, Manifest, Shard
from lading.formats.safetensors import header_length, parse_header


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: str | dict[str, Any], data: bytes = b"") -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def write_shards(folder: Path, shards: dict[str, dict[str, int]], **index: Any) -> Path:
    """Shards of U8 vectors, and their index."""
    for file, tensors in shards.items():
        header, at = {}, 0
        for name, size in tensors.items():
            header[name] = entry("U8", [size], at, at + size)
            at += size
        write(folder / file, {"__metadata__": {"shard": file}, **header}, bytes(at))

    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map, **index}, indent=2) + "\n")
    return path


def rows(manifest: Manifest) -> list[tuple[str, str, tuple[int, ...], str, int, int]]:
    return [(t.name, t.dtype, t.shape, t.shard.name, t.offset, t.nbytes) for t in manifest]


def torch_dtypes() -> list[torch.dtype]:
    return sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_dtype_that_torch_can_save(tmp_path: Path) -> None:
    seen: set[str] = set()
    for dtype in torch_dtypes():
        path = tmp_path / f"{dtype}.safetensors"
        tensors = {
            "b": torch.empty(2, 6, dtype=dtype),
            "a": torch.empty(4, dtype=dtype),
            "none": torch.empty(0, 3, dtype=dtype),
        }
        try:
            save_file(tensors, path)
        except (KeyError, ValueError):  # the format has no name for it
            continue

        manifest = formats.index(path)
        raw = path.read_bytes()
        expected = dict(deserialize(raw))
        assert {t.name for t in manifest} == expected.keys()
        for t in manifest:
            reference = expected[t.name]
            assert (t.dtype, list(t.shape)) == (reference["dtype"], reference["shape"])
            assert raw[t.offset : t.offset + t.nbytes] == reference["data"]
        seen.update(manifest.dtypes)

    # Some came to torch, and to the reference writer, later than the first versions that lading runs with.
    assert seen >= BITS.keys() - {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


def test_columns_and_shard(tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.safetensors",
        {"__metadata__": {"format": "pt"}, "w": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [3], 24, 30)},
        bytes(30),
    )
    size = path.stat().st_size

    manifest = formats.index(str(path))

    assert rows(manifest) == [
        ("w", "F32", (2, 3), "x.safetensors", size - 30, 24),
        ("b", "BF16", (3,), "x.safetensors", size - 6, 6),
    ]
    assert manifest.format == "safetensors"
    assert manifest.shards == (Shard(name="x.safetensors", size=size, sha256=None),)
    assert manifest.metadata == {"format": "pt"}
    assert manifest.index_name is None
    assert (manifest.shard_ids.typecode, manifest.offsets.typecode) == ("I", "q")
    assert (manifest.total_bytes, manifest.parameters) == (30, 9)


def test_columns_are_in_the_order_of_the_bytes(tmp_path: Path) -> None:
    header = {
        "last": entry("U8", [3], 5, 8),
        "first": entry("U8", [5], 0, 5),
        "empty": entry("U8", [0], 5, 5),
        "empty too": entry("F64", [7, 0], 5, 5),
    }

    manifest = formats.index(write(tmp_path / "x.safetensors", header, bytes(8)))

    assert list(manifest.names) == ["first", "empty", "empty too", "last"]
    assert [manifest.nbytes(i) for i in range(4)] == [5, 0, 0, 3]
    base = manifest.offsets[0]
    assert [offset - base for offset in manifest.offsets] == [0, 5, 5, 5]


@pytest.mark.parametrize(
    "header",
    [
        "{}",
        "{}     ",
        '{"__metadata__":{}}',
        '{"__metadata__":{"dtype":"F32","shape":"[]","data_offsets":"[0,4]"}}',
        '{"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        '{"a":{"dtype":"U8","shape":[0,9223372036854775807],"data_offsets":[0,0]}}',
        '{"\\u0061\\n\\ud83d\\ude00\\u0000":{"dtype":"\\u0055\\u0038","sh\\u0061pe":[0],"data_offsets":[0,0]}}',
        '{\t"é" :\r\n{ "shape" : [ 0 , 1 ] , "data_offsets" : [ 0 , 0 ] , "dtype" : "F4" } }',
        '{"' + "é" * 256 + '":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        '{"r":{"dtype":"U8","shape":[0' + ",1" * 63 + '],"data_offsets":[0,0]}}',
        '{"__metadata__ ":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
    ],
)
def test_unusual_and_legal(tmp_path: Path, header: str) -> None:
    path = write(tmp_path / "x.safetensors", header)

    manifest = formats.index(path)

    reference = dict(deserialize(path.read_bytes()))
    assert {t.name: (t.dtype, list(t.shape)) for t in manifest} == {
        name: (value["dtype"], value["shape"]) for name, value in reference.items()
    }
    with safe_open(path, framework="pt") as f:
        assert manifest.metadata == (f.metadata() or {})


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 5\n")

    with pytest.raises(CorruptModelCheckpointError, match=r"pointer of Git LFS.*`git lfs pull`"):
        formats.index(tmp_path)


def test_scalar(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(1.5)}, tmp_path / "x.safetensors")

    (tensor,) = formats.index(tmp_path / "x.safetensors")

    assert (tensor.shape, tensor.nbytes) == ((), 4)


def test_dtypes_of_less_than_a_byte(tmp_path: Path) -> None:
    header = {"a": entry("F4", [2, 3], 0, 3), "b": entry("F6_E2M3", [4], 3, 6), "c": entry("F6_E3M2", [8], 6, 12)}

    manifest = formats.index(write(tmp_path / "x.safetensors", header, bytes(12)))

    assert [t.nbytes for t in manifest] == [3, 3, 6]


def test_the_way_a_header_is_written_does_not_matter() -> None:
    header = {f"t{i}": entry("F32", [i % 3, 2], 0, 0) for i in range(12)}
    at = 0
    for value in header.values():
        value["data_offsets"] = [at, at := at + math.prod(value["shape"]) * 4]

    texts = [json.dumps(header, separators=(",", ":")), json.dumps(header), json.dumps(header, indent=1)]
    for order in (
        ("data_offsets", "dtype", "shape"),
        ("shape", "dtype", "data_offsets"),
        ("dtype", "data_offsets", "shape"),
    ):
        texts.append(json.dumps({name: {key: value[key] for key in order} for name, value in header.items()}))
    texts.append(json.dumps(header).replace('"t', '"\\u0074').replace('"F32"', '"F\\u00332"'))
    texts.append(json.dumps(header).replace('"F32"', '"F\\u00332"', 5).replace("[2", "[ 2", 2))
    width = max(map(len, texts))

    results = [parse_header(text.ljust(width).encode(), buffer_size=at, label="x") for text in texts]

    assert list(results[0].names) == list(header)
    assert all(result == results[0] for result in results)


def test_equal_dtypes_and_shapes_are_one_object() -> None:
    header = {f"t{i}": entry("F32", [7, 300], i * 8400, (i + 1) * 8400) for i in range(3)}

    result = parse_header(json.dumps(header).encode(), buffer_size=3 * 8400, label="x")

    assert len({id(dtype) for dtype in result.dtypes}) == len({id(shape) for shape in result.shapes}) == 1


def test_memory_is_a_few_times_the_header() -> None:
    count = 20_000
    header = {
        f"model.layers.{i}.self_attn.q_proj.weight": entry("BF16", [4, 8], i * 64, i * 64 + 64) for i in range(count)
    }
    data = json.dumps(header, separators=(",", ":")).encode()
    del header

    tracemalloc.start()
    result = parse_header(data, buffer_size=count * 64, label="x")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(result.names) == count
    assert kept < 1.5 * len(data)
    assert peak < 4 * len(data)


def test_the_header_of_an_address() -> None:
    """Nothing about the rules needs a file: a range of a URL will do."""
    text = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'

    assert header_length(struct.pack("<Q", len(text)), file_size=8 + len(text) + 3, label="https://host/x") == len(text)
    result = parse_header(text, buffer_size=3, label="https://host/x")
    assert list(result.offsets) == [8 + len(text)]
    with pytest.raises(CorruptModelCheckpointError, match=r"^https://host/x: tensor 'a'"):
        parse_header(text, buffer_size=2, label="https://host/x")


def test_folder_with_one_file(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", {"a": entry("U8", [1], 0, 1)}, b"x")
    write(tmp_path / "adapter.safetensors", "not even JSON")

    assert formats.index(tmp_path) == formats.index(tmp_path / "model.safetensors")


def test_folder_with_an_index(tmp_path: Path) -> None:
    files = {"model-2.safetensors": {"c": 3, "d": 4}, "model-1.safetensors": {"b": 1, "a": 2}}
    path = write_shards(tmp_path, files)
    write(tmp_path / "model-3.safetensors", "not even JSON")

    manifest = formats.index(tmp_path)

    one, two = (tmp_path / f"model-{i}.safetensors" for i in (1, 2))
    assert manifest.shards == tuple(Shard(name=p.name, size=p.stat().st_size) for p in (one, two))
    assert rows(manifest) == [
        ("b", "U8", (1,), one.name, one.stat().st_size - 3, 1),
        ("a", "U8", (2,), one.name, one.stat().st_size - 2, 2),
        ("c", "U8", (3,), two.name, two.stat().st_size - 7, 3),
        ("d", "U8", (4,), two.name, two.stat().st_size - 4, 4),
    ]
    assert list(manifest.shard_ids) == [0, 0, 1, 1]
    assert manifest.index_name == "model.safetensors.index.json"
    assert manifest.metadata == {"shard": "model-1.safetensors"}
    assert formats.index(path) == manifest


def test_the_index_decides_where_there_is_also_a_single_file(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model-1.safetensors": {"a": 1}})
    write(tmp_path / "model.safetensors", {"b": entry("U8", [1], 0, 1)}, b"x")

    assert list(formats.index(tmp_path).names) == ["a"]


def test_an_index_that_leads_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", "{}")
    (tmp_path / "model.safetensors.index.json").symlink_to("gone")

    with pytest.raises(CheckpointNotFoundError, match=r"model\.safetensors\.index\.json"):
        formats.index(tmp_path)


@pytest.mark.parametrize("file", ["model.safetensors", "weights-only.safetensors"])
def test_an_index_may_be_named_by_its_path(tmp_path: Path, file: str) -> None:
    write_shards(tmp_path, {file: {"a": 1}}).rename(tmp_path / "other.safetensors.index.json")

    assert formats.index(tmp_path / "other.safetensors.index.json").index_name == "other.safetensors.index.json"


@pytest.mark.parametrize(
    "metadata",
    [
        {"total_size": 10**12},
        {"total_size": 1.5e9, "deep": [[{"a": [True, False, None, -1, 0.5, 1e300, "x\n", {}, []]}]]},
        {},
    ],
)
def test_the_metadata_of_an_index_is_free_form(tmp_path: Path, metadata: dict[str, Any]) -> None:
    write_shards(tmp_path, {"model.safetensors": {"a": 1}}, metadata=metadata, more=["of", "this"])

    assert formats.index(tmp_path).total_bytes == 1


def test_links_as_in_a_snapshot_folder(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write_shards(blobs, {"model-1.safetensors": {"a": 1}})
    for i, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{i:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064x}")
    (tmp_path / "link").symlink_to(snapshot)

    manifest = formats.index(tmp_path / "link")

    assert rows(manifest)[0][3] == manifest.shards[0].name == "model-1.safetensors"
    assert formats.index(tmp_path / "link" / "model-1.safetensors").shards == manifest.shards
    assert formats.index(blobs / f"{0:064x}").names == ["a"]  # what a link leads to has no suffix


def test_nothing_there(tmp_path: Path) -> None:
    for path in (
        tmp_path / "no.safetensors",
        tmp_path / "no",
        tmp_path / "no" / "no.pt",
        Path(__file__) / "x.safetensors",
    ):
        with pytest.raises(CheckpointNotFoundError) as caught:
            formats.index(path)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, FileNotFoundError)


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="an empty folder"):
        formats.index(tmp_path)

    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointNotFoundError, match=r"expected model\.safetensors\.index\.json or .*config\.json"):
        formats.index(tmp_path)


def test_folder_with_files_of_other_names(tmp_path: Path) -> None:
    write(tmp_path / "adapter_model.safetensors", "{}")
    (tmp_path / "adapter_model.bin").touch()

    with pytest.raises(CheckpointNotFoundError, match=r"adapter_model\.safetensors.*give the path of the file"):
        formats.index(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "tf_model.h5", "model-Q4_K.gguf"])
def test_other_formats(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()

    for path in (tmp_path, tmp_path / name):
        with pytest.raises(NotSupportedError, match=f"found '{name}'"):
            formats.index(path)


def test_import_is_light() -> None:
    heavy = {"torch", "numpy", "safetensors", "pydantic", "sqlalchemy"}
    code = f"import sys, lading.formats; print({heavy} & sys.modules.keys())"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
