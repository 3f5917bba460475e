"""The same manifest as that of a folder, from files that can be anywhere."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lading import formats
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, FetchError, NotSupportedError
from lading.formats import remote
from lading.formats.manifest import BITS
from lading.formats.safetensors import MAX_HEADER_SIZE
from lading.formats.shard_index import MAX_INDEX_SIZE

INDEX = "model.safetensors.index.json"


@dataclass
class Memory:
    """Files in memory, which remembers what was read."""

    contents: dict[str, bytes]
    label: str = "https://host/m"
    sizes: dict[str, int] = field(default_factory=dict)
    """Lies."""
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def names(self) -> Collection[str]:
        return list(self.contents)

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.contents[name]))

    def read(self, name: str, offset: int, size: int) -> bytes:
        with self.lock:
            self.reads.append((name, offset, size))
        assert size > 0
        assert 0 <= offset <= offset + size <= self.size(name)
        return self.contents[name][offset : offset + size]


def pack(header: dict[str, Any] | str, data: int = 0) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def vectors(tensors: dict[str, int], metadata: dict[str, str] | None = None) -> bytes:
    """A file of U8 vectors of these sizes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    return pack(header, at)


def sharded(shards: dict[str, dict[str, int]]) -> dict[str, bytes]:
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return {INDEX: index, **{file: vectors(tensors, {"shard": file}) for file, tensors in shards.items()}}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


TWO = sharded({"model-2.safetensors": {"c": 3, "d": 4}, "model-1.safetensors": {"b": 1, "a": 2}})


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, bytes]:
    names = draw(st.lists(st.text(max_size=8).filter(lambda n: n != "__metadata__"), max_size=8, unique=True))
    count = draw(st.integers(1, 4))
    files: list[dict[str, Any]] = [{} for _ in range(count)]
    ends = [0] * count
    weight_map = {}
    for name in names:
        i = draw(st.integers(0, count - 1))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        dtype = draw(st.sampled_from(["U8", "BF16", "F32", "F8_E4M3"]))
        size = BITS[dtype] // 8
        for n in shape:
            size *= n
        files[i][name] = {"dtype": dtype, "shape": shape, "data_offsets": [ends[i], ends[i] + size]}
        ends[i] += size
        weight_map[name] = f"model-{i}.safetensors"
    parts = [pack(header, end) for header, end in zip(files, ends, strict=True)]
    if count == 1 and draw(st.booleans()):
        return {"model.safetensors": parts[0], "config.json": b"{}"}

    contents = {f"model-{i}.safetensors": part for i, part in enumerate(parts)}
    return {INDEX: json.dumps({"weight_map": weight_map}).encode(), **contents}


def outcome(index: Any) -> tuple[type[Exception], str] | Any:
    try:
        return index()
    except (CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError) as error:
        return type(error), str(error)


@given(st.data())
def test_the_same_manifest_and_errors_as_of_the_folder(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    contents = dict(data.draw(checkpoints()))
    for _ in range(data.draw(st.sampled_from([0, 0, 1, 1, 2]))):
        name = data.draw(st.sampled_from(sorted(contents)))
        raw = contents[name]
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        match data.draw(st.sampled_from(["gone", "cut", "byte", "longer"])):
            case "gone" if len(contents) > 1:
                del contents[name]
            case "cut":
                contents[name] = raw[:at]
            case "byte":
                contents[name] = raw[:at] + data.draw(st.binary(min_size=1, max_size=1)) + raw[at + 1 :]
            case "longer":
                contents[name] = raw + b"\0"

    folder = write(tmp_path_factory.mktemp("m"), contents)
    files = Memory(contents, label=str(folder))

    assert outcome(lambda: formats.index_files(files)) == outcome(lambda: formats.index(folder))
    for name in contents:
        assert outcome(lambda name=name: formats.index_files(files, name=name)) == outcome(
            lambda name=name: formats.index(folder / name)
        )


def test_headers_take_one_read_each() -> None:
    shards = {
        f"model-{i:05}.safetensors": {f"model.layers.{i}.mlp.experts.{n}.down_proj.weight": n for n in range(300)}
        for i in range(5)
    }
    files = Memory({**sharded(shards), "model-99999.safetensors": b"not of the checkpoint"})

    manifest = formats.index_files(files)

    assert len(manifest) == 1500
    assert sorted(name for name, _, _ in files.reads) == sorted([INDEX, *shards])
    assert sum(size for _, _, size in files.reads) < 400_000


def test_no_more_than_the_file_is_read_and_no_tensor_of_a_large_one() -> None:
    small = Memory({"model.safetensors": vectors({"a": 1})})
    formats.index_files(small)
    assert small.reads == [("model.safetensors", 0, len(small.contents["model.safetensors"]))]

    large = Memory({"model.safetensors": vectors({"a": 10_000_000})})
    formats.index_files(large)
    assert [size for _, _, size in large.reads] == [1 << 18]


def test_a_long_header_takes_a_second_read() -> None:
    raw = vectors({f"{'t' * 400}{i}": 1 for i in range(1000)})
    files = Memory({"model.safetensors": raw})

    assert len(formats.index_files(files)) == 1000
    assert files.reads == [
        ("model.safetensors", 0, 1 << 18),
        ("model.safetensors", 1 << 18, len(raw) - 1000 - (1 << 18)),
    ]


def test_shards_are_read_at_once() -> None:
    shards = {f"model-{i:02}.safetensors": {f"t{i}": 1} for i in range(remote.MAX_THREADS)}
    barrier = threading.Barrier(remote.MAX_THREADS, timeout=30)

    class Waiting(Memory):
        def read(self, name: str, offset: int, size: int) -> bytes:
            if name != INDEX:
                barrier.wait()
            return super().read(name, offset, size)

    assert len(formats.index_files(Waiting(sharded(shards)))) == remote.MAX_THREADS


def test_the_folder_of_a_name(tmp_path: Path) -> None:
    contents = {
        **{f"original/{name}": raw for name, raw in TWO.items()},
        "original/extra.safetensors": vectors({"x": 1}),
        "model.safetensors": vectors({"top": 1}),
    }
    folder, files = write(tmp_path, contents), Memory(contents)

    for name in (None, "original", "original/", f"original/{INDEX}", "original/extra.safetensors", "model.safetensors"):
        assert formats.index_files(files, name=name) == formats.index(folder / (name or ""))


@pytest.mark.parametrize("name", ["nope", "", "/", "../m", "model.safetensors/", "/model.safetensors", "a\nb"])
def test_a_name_that_is_not_there(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"https://host/m: expected .*, found 'model.safetensors'"):
        formats.index_files(Memory({"model.safetensors": vectors({"a": 1})}), name=name)


def test_nothing_that_can_be_read() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"^https://host/m: .* found an empty folder"):
        formats.index_files(Memory({}))
    with pytest.raises(CheckpointNotFoundError, match="found no files"):
        formats.index_files(Memory({}), name="x")
    for name in (None, "pytorch_model.bin"):
        with pytest.raises(NotSupportedError, match=r"https://host/m.*pytorch_model\.bin"):
            formats.index_files(Memory({"pytorch_model.bin": b""}), name=name)


def test_what_ranks_saved_together_is_refused_by_name() -> None:
    for names in ([".metadata", "__0_0.distcp"], ["__0_0.distcp", "config.json"]):
        with pytest.raises(NotSupportedError, match=r"https://host/m.*torch\.distributed\.checkpoint.*Fetch the"):
            formats.index_files(Memory(dict.fromkeys(names, b"")))


def test_errors_name_the_address() -> None:
    files = Memory({"model.safetensors": pack('{"a":1}')}, label="hg://org/name/")
    with pytest.raises(CorruptModelCheckpointError, match=r"^hg://org/name/model\.safetensors: tensor 'a'") as caught:
        formats.index_files(files)
    assert caught.value.path == "hg://org/name/model.safetensors"

    contents = dict(TWO)
    del contents["model-1.safetensors"]
    with pytest.raises(CorruptModelCheckpointError, match=rf"(?s)^https://host/m/{INDEX}: .*'model-1.saf.*' is mis"):
        formats.index_files(Memory(contents))


# --- what lies -------------------------------------------------------------------------------------------------------


def test_a_header_that_is_said_to_be_huge_is_not_read() -> None:
    for length in (2**63, 2**64 - 1, MAX_HEADER_SIZE + 1):
        raw = struct.pack("<Q", length) + b"{}"
        files = Memory({"model.safetensors": raw}, sizes={"model.safetensors": 2**50})
        files.contents["model.safetensors"] = raw.ljust(1 << 18)
        with pytest.raises(CorruptModelCheckpointError, match=f"header length: expected at most {MAX_HEADER_SIZE}"):
            formats.index_files(files)
        assert files.reads == [("model.safetensors", 0, 1 << 18)]


@pytest.mark.parametrize("lie", [-1, 0, 1, 7, 8, 20, "-1", "+1", 2**40])
def test_a_size_that_is_not_true(lie: int | str) -> None:
    raw = vectors({"a": 3})
    size = len(raw) + int(lie) if isinstance(lie, str) else lie

    with pytest.raises(CorruptModelCheckpointError, match=r"^https://host/m/model\.safetensors: "):
        formats.index_files(Memory({"model.safetensors": raw}, sizes={"model.safetensors": size}))


def test_an_index_that_is_said_to_be_huge_is_not_read() -> None:
    files = Memory(TWO, sizes={INDEX: MAX_INDEX_SIZE + 1})
    with pytest.raises(CorruptModelCheckpointError, match=f"expected at most {MAX_INDEX_SIZE} bytes"):
        formats.index_files(files)
    assert not files.reads


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
@pytest.mark.parametrize("victim", [INDEX, "model-1.safetensors"])
def test_reads_of_another_length(victim: str, change: Any) -> None:
    class Liar(Memory):
        def read(self, name: str, offset: int, size: int) -> bytes:
            data = super().read(name, offset, size)
            return change(data) if name == victim else data

    with pytest.raises(CorruptModelCheckpointError, match=rf"^https://host/m/{victim}: bytes 0 to"):
        formats.index_files(Liar(TWO))


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "sub/x.safetensors", "/x.safetensors", "a\\x.safetensors", "x.bin"]
)
def test_an_index_names_files_beside_it_only(file: str) -> None:
    index = json.dumps({"weight_map": {"a": file}}).encode()
    files = Memory({INDEX: index, file: vectors({"a": 1})})

    with pytest.raises(CorruptModelCheckpointError, match="plain file names"):
        formats.index_files(files)
    assert [name for name, _, _ in files.reads] == [INDEX]


def test_all_reads_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_READ", 20_000)
    shards = {f"model-{i:02}.safetensors": {f"t{i}": 100_000} for i in range(40)}
    files = Memory(sharded(shards))

    with pytest.raises(CorruptModelCheckpointError, match="at most 20000 bytes together, found more"):
        formats.index_files(files)
    assert sum(size for _, _, size in files.reads) <= 20_000


def test_the_first_failure_is_passed_on_and_ends_the_rest() -> None:
    shards = {f"model-{i:03}.safetensors": {f"t{i}": 1} for i in range(200)}

    class Broken(Memory):
        def read(self, name: str, offset: int, size: int) -> bytes:
            if name != INDEX:
                self.reads.append((name, offset, size))
                raise FetchError(f"no route to {name}")
            return super().read(name, offset, size)

    files = Broken(sharded(shards))
    with pytest.raises(FetchError, match=r"no route to model-000\.safetensors"):
        formats.index_files(files)
