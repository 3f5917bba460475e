"""What is written as safetensors, read by the reference reader and by lading's strict one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lading import InternalError, formats
from lading.formats.manifest import BITS
from lading.formats.safetensors_writer import Entry, Writer, header_of, index_of, shard_names, shards_of
from lading.transfer.dtypes import TORCH_DTYPES

DTYPES = ["F32", "BF16", "F16", "F64", "I64", "U8", "BOOL", "F8_E4M3"]
ENTRIES = [
    Entry(name="a.weight", dtype="F32", shape=(3, 5)),
    Entry(name='ein Name: "ü"\n', dtype="BF16", shape=(7,)),
    Entry(name="scalar", dtype="I64", shape=()),
    Entry(name="empty", dtype="F16", shape=(0, 4)),
    Entry(name="flag", dtype="BOOL", shape=(3,)),
]


def data_of(entry: Entry) -> torch.Tensor:
    count = math.prod(entry.shape)
    if entry.dtype == "BOOL":
        return (torch.arange(count) % 2).bool().reshape(entry.shape)
    return torch.arange(1, count + 1).to(TORCH_DTYPES[entry.dtype]).reshape(entry.shape)


def write(path: Path, entries: list[Entry]) -> None:
    with path.open("xb") as file, Writer(file, entries) as writer:
        for entry in entries:
            writer.write(data_of(entry).reshape(-1).view(torch.uint8).numpy().data)


def test_both_readers_read_it(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, ENTRIES)

    loaded = load_file(path)
    assert loaded.keys() == {entry.name for entry in ENTRIES}
    for entry in ENTRIES:
        assert loaded[entry.name].dtype == TORCH_DTYPES[entry.dtype]
        assert torch.equal(loaded[entry.name], data_of(entry))
    manifest = formats.index(path)
    assert list(manifest.names) == [entry.name for entry in ENTRIES]
    assert manifest.metadata == {"format": "pt"}
    assert min(manifest.offsets) % 8 == 0


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", [])
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize(
    "entries",
    [
        [ENTRIES[0], ENTRIES[0]],
        [Entry(name="x" * 513, dtype="F32", shape=(1,))],
        [Entry(name="__metadata__", dtype="F32", shape=(1,))],
        [Entry(name="x", dtype="F4", shape=(2,))],
    ],
)
def test_what_the_format_cannot_say(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(InternalError):
        write(tmp_path / "model.safetensors", entries)
    assert (tmp_path / "model.safetensors").read_bytes() == b""


def test_other_bytes_than_the_header_says(tmp_path: Path) -> None:
    with (tmp_path / "a").open("xb") as file:
        with pytest.raises(InternalError, match=r"60 bytes of 'a\.weight'"), Writer(file, ENTRIES) as writer:
            writer.write(memoryview(b"123"))
        with pytest.raises(InternalError, match="1 tensors were not written"), Writer(file, ENTRIES[:1]):
            pass
        with pytest.raises(InternalError, match="no further tensor"), Writer(file, []) as writer:
            writer.write(memoryview(b""))


@given(
    st.lists(
        st.tuples(
            st.text(max_size=20).filter(lambda name: name != "__metadata__"),
            st.sampled_from(DTYPES),
            st.lists(st.integers(0, 30), max_size=3),
        ),
        max_size=12,
        unique_by=lambda t: t[0],
    ),
    st.integers(1, 20_000),
)
def test_no_file_is_larger_than_asked(tensors: list[tuple[str, str, list[int]]], size: int) -> None:
    entries = [
        Entry(name=name, dtype=dtype, shape=tuple(shape))
        for name, dtype, shape in tensors
        if name.isprintable() or not any("\ud800" <= c <= "\udfff" for c in name)
    ]
    shards = shards_of(entries, size)

    assert sorted(i for shard in shards for i in shard) == list(range(len(entries)))
    for shard in shards:
        own = [entries[i] for i in shard]
        assert len(header_of(own)) + sum(entry.nbytes for entry in own) <= size or len(shard) <= 1
        widths = [BITS[entry.dtype] for entry in own]
        assert widths == sorted(widths, reverse=True)


def test_an_index(tmp_path: Path) -> None:
    names = shard_names(2)
    assert shard_names(1) == ["model.safetensors"]
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shards = dict(zip(names, (ENTRIES[:2], ENTRIES[2:]), strict=True))
    for name, entries in shards.items():
        write(tmp_path / name, entries)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index_of(shards)))

    assert len(formats.index(tmp_path)) == len(ENTRIES)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 60 + 14 + 8 + 3, "total_parameters": 15 + 7 + 1 + 3}
