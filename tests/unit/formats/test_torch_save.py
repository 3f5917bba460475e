"""What ``torch.save`` writes, compared with what ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.package import PackageExporter

from lading import formats
from lading.errors import (
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    ModelCheckpointError,
    NotSupportedError,
    PolicyError,
    RefusedPickleError,
)
from lading.formats.manifest import BITS
from lading.formats.torch_save import rewrite
from lading.system.filesystem import FileStat
from lading.transfer.dtypes import TORCH_DTYPES
from tests.helpers.torch_files import (
    GOOD,
    Member,
    archive,
    checkpoint,
    dictionary,
    equal,
    pickled,
    read_all,
    save,
    storage,
    tensor,
)

BASE = torch.arange(24, dtype=torch.float32).reshape(4, 6)


class Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)
        self.tied = self.linear
        self.norm = torch.nn.BatchNorm1d(5)
        self.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))


def _with_attribute() -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = "kept by torch"  # type: ignore[attr-defined]
    return parameter


STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "a module": lambda: Module().state_dict(),
    "a plain dict": lambda: {"a": torch.randn(2, 3), "b": torch.randn(4)},
    "an ordered dict": lambda: OrderedDict(b=torch.randn(2), a=torch.randn(3)),
    "parameters": lambda: {"p": torch.nn.Parameter(torch.randn(2, 2)), "q": _with_attribute()},
    "views": lambda: {"all": BASE, "rows": BASE[1:3], "row": BASE[2], "tail": BASE.view(-1)[5:], "one": BASE[3, 4]},
    "one storage twice": lambda: {"a": BASE, "b": BASE},
    "strides that do not matter": lambda: {"a": BASE[:, :1].t()[:1, :1], "b": BASE[1:2].t().t(), "c": BASE[None, :1]},
    "no elements": lambda: {"a": torch.empty(0), "b": torch.empty(3, 0, 2), "c": BASE[4:], "d": torch.randn(2)},
    "no elements, and strides": lambda: {"a": torch.empty(3, 0).t(), "b": BASE[:, 6:].t(), "c": torch.ones(1)},
    "scalars": lambda: {"a": torch.tensor(1.5), "b": torch.tensor(True), "c": torch.tensor(-7)},
    "nothing": dict,
    "odd names": lambda: {"": torch.ones(1), "é/..\\ \n": torch.ones(2), "x" * 512: torch.ones(3)},
    "other values": lambda: {"w": torch.ones(2), "step": 3, "lr": 0.1, "name": "x", "none": None, "yes": True,
                             "list": [1, (2, {"k": torch.ones(1)})], "big": 1 << 300, "bytes": b"abc",
                             "array": bytearray(b"abc"), "set": {1, 2}, "complex": 1j, "dtype": torch.float16,
                             "device": torch.device("cpu"), "size": torch.Size([1, 2]), 3: torch.ones(1),
                             (1, 2): 4, "counter": Counter("aab"), "empty": {}, "long": 2**40, "neg": -(2**31)},
    "many": lambda: {f"layers.{i}.w": torch.full((i % 5,), float(i)) for i in range(700)},
    "channels last of one channel": lambda: {"a": torch.randn(2, 1, 3, 3).to(memory_format=torch.channels_last)},
}  # fmt: skip


def _written(path: Path, value: object, **options: Any) -> Path:
    path.write_bytes(save(value, **options))
    return path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", STATES)
def test_what_torch_saves_is_where_the_manifest_says(tmp_path: Path, kind: str, legacy: bool) -> None:
    path = _written(tmp_path / "model.pt", STATES[kind](), legacy=legacy)
    expected = torch.load(path, weights_only=True)
    expected = {k: v for k, v in expected.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}

    manifest = formats.index(path)
    found = read_all(path)

    assert manifest.format == "torch"
    assert found.keys() == expected.keys()
    assert all(equal(found[name], expected[name]) for name in expected)
    assert list(manifest.offsets) == sorted(manifest.offsets)
    assert manifest.shards[0].size == path.stat().st_size


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(16, dtype=torch.uint8)
    value = bits.view(dtype) if dtype != torch.bool else bits > 7
    path = _written(tmp_path / "model.pt", {"w": value, "part": value[1:2]})

    assert all(equal(tensor, torch.load(path, weights_only=True)[k]) for k, tensor in read_all(path).items())
    assert BITS.keys() >= set(formats.index(path).dtypes)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol_of_binary_pickles(tmp_path: Path, protocol: int) -> None:
    others = {"n": {"x": "y"}, "numbers": (True, 3, 1 << 40, 1 << 90, 0.5), "bytes": [b"x", bytearray(b"y"), {1}]}
    path = _written(tmp_path / "model.pt", {"w": BASE, "p": torch.nn.Parameter(BASE), **others}, protocol=protocol)

    assert equal(read_all(path)["w"], BASE)


@pytest.mark.parametrize("protocol", [2, 4])
def test_the_state_of_modules_of_transformer_engine_is_passed_over(tmp_path: Path, protocol: int) -> None:
    path = _written(tmp_path / "model.pt", {"w": BASE, "_extra_state": io.BytesIO(b"x")}, protocol=protocol)

    assert read_all(path).keys() == {"w"}


def test_a_pickle_of_text_is_called_by_its_protocol(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt", {"w": BASE}, protocol=0)

    with pytest.raises(CorruptModelCheckpointError, match=r"expected a pickle of protocol 1 to 5, found .* protocol 0"):
        formats.index(path)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"model": {"w": BASE}, "fs2": True}, ["w"]),
        ({"model": {"w": BASE}, "args": None, "optimizer_history": [{"x": 1}]}, ["w"]),
        ({"state_dict": {"w": BASE}, "epoch": 3}, ["w"]),
        ({"model_state_dict": {"w": BASE}, "loss": torch.tensor(1.0)}, ["w"]),
        ({"model": {"w": BASE}, "state_dict": {"v": BASE}}, ["w"]),
        ({"model": {"name": "no tensor"}, "state_dict": {"v": BASE}}, ["v"]),
        ({"model": "a name", "w": BASE}, ["w"]),
        ({"model": BASE}, ["model"]),
    ],
)
def test_which_part_is_the_state_dict(tmp_path: Path, value: object, names: list[str]) -> None:
    assert list(formats.index(_written(tmp_path / "model.pt", value)).names) == names


@pytest.mark.parametrize("value", [[BASE], BASE, 3, {"a": {"w": BASE}}, {"encoder": 1}])
def test_what_holds_no_state_dict(tmp_path: Path, value: object) -> None:
    with pytest.raises(CorruptModelCheckpointError, match="expected a state dict"):
        formats.index(_written(tmp_path / "model.pt", value))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_other_objects_take_a_call_argument_and_are_passed_over(tmp_path: Path, legacy: bool) -> None:
    value = {"args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1])), "model": {"w": BASE}}
    path = _written(tmp_path / "model.pt", value, legacy=legacy)

    with pytest.raises(PolicyError, match=r"found 'argparse\.Namespace'.*`restrict=False`"):
        formats.index(path)

    assert list(formats.index(path, restrict=False).names) == ["w"]


def test_a_whole_module_is_no_state_dict(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt", torch.nn.Linear(2, 2))

    with pytest.raises(PolicyError, match=r"torch\.nn\.modules\.linear\.Linear"):
        formats.index(path)
    with pytest.raises(CorruptModelCheckpointError, match=r"expected a state dict.*Save `model\.state_dict"):
        formats.index(path, restrict=False)


@pytest.mark.parametrize("strided", [False, True])
def test_a_record_that_is_read_whole_has_the_right_crc(tmp_path: Path, strided: bool) -> None:
    """A flipped bit in a tensor; where all of it is rewritten, it is read anyway."""
    value = torch.arange(512, dtype=torch.float32).reshape(16, 32)
    path = _written(tmp_path / "model.pt", {"a": value.t() if strided else value, "b": torch.ones(3).t()})
    assert formats.index(path, cache=tmp_path / "good") is not None

    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<2f", 100, 101))] ^= 1
    path.write_bytes(data)
    if strided:
        with pytest.raises(CorruptModelCheckpointError, match=r"record .*/data/0': expected bytes with the CRC"):
            formats.index(path, cache=tmp_path / "cache")
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
    else:
        formats.index(path, cache=tmp_path / "cache")  # which reads no tensor


def test_torchscript_is_a_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "constants.pkl"):
            file.writestr(f"m/{name}", GOOD)

    with pytest.raises(PolicyError, match="TorchScript"):
        formats.index(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TypedStorage")
@pytest.mark.parametrize("restrict", [True, False])
def test_what_torch_writes_of_a_program(tmp_path: Path, restrict: bool) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    torch.jit.save(torch.jit.script(layers), tmp_path / "script.pt")
    with PackageExporter(tmp_path / "package.pt") as exporter:
        exporter.save_pickle("model", "model.pkl", {"w": BASE})

    for name, what in (("script.pt", "a TorchScript archive"), ("package.pt", r"an archive of torch\.package")):
        with pytest.raises(RefusedPickleError, match=f"expected a state dict, found {what}"):
            formats.index(tmp_path / name, restrict=restrict)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex128), "C128"),
        (torch.ones(2, device="meta"), "_rebuild_meta_tensor"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugation"),
    ],
)
def test_tensors_that_are_no_bytes(tmp_path: Path, value: torch.Tensor, found: str) -> None:
    with pytest.raises(NotSupportedError, match=rf"tensor 'w'.*{found}"):
        formats.index(_written(tmp_path / "model.pt", {"w": value}))


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(byteorder=Member("a/byteorder", b"big")))
    with pytest.raises(NotSupportedError, match="'big'"):
        formats.index(path)


def test_a_file_of_before_byteorder(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint(byteorder=Member("a/old", b"")))
    assert equal(read_all(path)["w"], torch.arange(6, dtype=torch.float32).reshape(2, 3))


def test_a_file_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = _written(tmp_path / "model.pt", {"w": BASE})
    finally:
        torch.serialization.set_crc32_options(before)
    assert equal(read_all(path)["w"], BASE)


def test_old_ways_to_rebuild(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    data = pickled(dictionary(w=tensor(storage())).replace(b"_rebuild_tensor_v2", b"_rebuild_tensor"))
    path.write_bytes(checkpoint(data.replace(b"\x89}tR", b"tR")))
    assert list(formats.index(path).names) == ["w"]


# --- rewriting ---

STRIDED: dict[str, torch.Tensor] = {
    "t": BASE.t(),
    "columns": BASE[:, 2:5],
    "expanded": torch.arange(4).expand(3, 4),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
    "cube": torch.randn(2, 3, 4, dtype=torch.float64).permute(2, 0, 1),
    "bool": (BASE > 7).t(),
    "whole": BASE,
    "steps": torch.arange(20, dtype=torch.uint8)[::3],
    "large": torch.randn(3, 4096, 1024).transpose(0, 1),
    "wide": torch.randn(9_000_000, 2).t(),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_strided_tensors_are_rewritten_once(tmp_path: Path, legacy: bool) -> None:
    path, cache = _written(tmp_path / "model.pt", {"model": STRIDED}, legacy=legacy), tmp_path / "cache"

    with pytest.raises(NotSupportedError, match=r"strides.*cache folder"):
        formats.index(path)

    new = formats.readable(path, cache=cache)
    stat = FileStat.from_stat(new.stat())
    manifest = formats.index(path, cache=cache)
    found = load_file(new)

    assert found.keys() == STRIDED.keys() == set(manifest.names)
    assert all(equal(found[name], STRIDED[name]) for name in found)
    assert manifest == formats.index(new)
    assert all(tensor.offset % (BITS[tensor.dtype] // 8) == 0 for tensor in manifest)
    assert formats.readable(path, cache=cache) == new
    assert FileStat.from_stat(new.stat()) == stat
    assert [p.name for p in new.parent.iterdir()] == [new.name]
    assert new.stat().st_mode & 0o777 == 0o444

    # Another state of the file is another checkpoint.
    _written(path, {"t": BASE.t().add(1).t().t()}, legacy=legacy)
    assert formats.readable(path, cache=cache) != new


def test_what_needs_no_rewriting_stays(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt", {"w": BASE})

    assert formats.readable(path, cache=tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()


def test_policy_comes_before_the_cache(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt", {"args": argparse.Namespace(), "model": {"t": BASE.t()}})
    cache = tmp_path / "cache"

    assert list(formats.index(path, cache=cache, restrict=False).names) == ["t"]
    with pytest.raises(PolicyError, match="argparse"):
        formats.index(path, cache=cache)


def test_a_few_bytes_do_not_become_a_terabyte(tmp_path: Path) -> None:
    path = _written(tmp_path / "model.pt", {"w": torch.zeros(1).expand(10**6, 10**6)})

    with pytest.raises(PolicyError, match="repeat their elements"):
        formats.readable(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / rewrite.FOLDER).iterdir())


def test_the_child_has_a_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "SECONDS", 0)
    path = _written(tmp_path / "model.pt", {"w": BASE.t()})

    with pytest.raises(ModelCheckpointError, match="within the limits of time and memory"):
        formats.readable(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache" / rewrite.FOLDER).iterdir())


_LIMITED = """
import os, socket, subprocess
from lading.errors import PolicyError
from lading.formats.torch_save.rewrite_child import limit
limit(seconds=20, size=1, parent=os.getppid())
for forbidden in (socket.socket, lambda: subprocess.run(["true"]), lambda: os.system("true"), os.fork):
    try:
        forbidden()
    except (PolicyError, OSError):
        pass
    else:
        raise SystemExit(f"{forbidden} worked")
try:
    bytearray(3 << 30)
except MemoryError:
    print("limited")
"""


def test_the_child_has_no_network_no_children_and_little_memory() -> None:
    child = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=False)

    assert (child.returncode, child.stdout) == (0, "limited\n"), child.stderr


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / rewrite.FOLDER
    folder.mkdir(parents=True)
    old, young = folder / ".old.tmp", folder / ".young.tmp"
    for file in (old, young):
        file.touch()
    os.utime(old, (0, 0))

    formats.readable(_written(tmp_path / "model.pt", {"w": BASE.t()}), cache=tmp_path / "cache")
    assert not old.exists()
    assert young.exists()


# --- folders ---


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    _written(tmp_path / "pytorch_model.bin", {"w": BASE})
    assert equal(read_all(tmp_path)["w"], BASE)

    save_file({"v": BASE}, tmp_path / "model.safetensors")
    assert list(formats.index(tmp_path).names) == ["v"]


def test_a_folder_with_one_file_to_rewrite(tmp_path: Path) -> None:
    _written(tmp_path / "pytorch_model.bin", {"w": BASE.t()})
    assert equal(load_file(formats.readable(tmp_path, cache=tmp_path / "cache"))["w"], BASE.t())


def test_an_index_of_several(tmp_path: Path) -> None:
    a, b = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    _written(tmp_path / a, {"v": BASE[0]})
    _written(tmp_path / b, {"w": BASE})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(f'{{"weight_map": {{"v": "{a}", "w": "{b}"}}}}')

    manifest = formats.index(tmp_path)
    assert manifest.format == "torch"
    assert manifest.index_name == index.name
    assert equal(read_all(tmp_path)["w"], BASE)

    index.write_text(f'{{"weight_map": {{"v": "{b}", "w": "{a}"}}}}')
    with pytest.raises(CorruptModelCheckpointError, match="agree"):
        formats.index(tmp_path)
    index.write_text(f'{{"weight_map": {{"v": "{a}", "w": "{a}"}}}}')  # whether `w` is needed, the model says
    assert list(formats.index(tmp_path).names) == ["v"]
    index.write_text('{"weight_map": {"v": "../x.bin"}}')
    with pytest.raises(CorruptModelCheckpointError, match=r"end in \.bin"):
        formats.index(tmp_path)


def test_strided_tensors_in_several_files_are_rewritten_once(tmp_path: Path) -> None:
    a, b = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    _written(tmp_path / a, {"v": BASE[0]})
    _written(tmp_path / b, {"w": BASE.t()})
    index, cache = tmp_path / "pytorch_model.bin.index.json", tmp_path / "cache"
    index.write_text(f'{{"weight_map": {{"v": "{a}", "w": "{b}"}}}}')

    with pytest.raises(formats.NonContiguousError, match=r"strides.*cache folder"):
        formats.index(tmp_path)
    new = formats.readable(tmp_path, cache=cache)
    states = {path: FileStat.from_stat(path.stat()) for path in new.parent.iterdir()}
    assert len(states) == 3
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in states)
    manifest = formats.index(tmp_path, cache=cache)
    assert (manifest.format, manifest.index_name) == ("safetensors", new.name)
    found = read_all(new)
    assert found.keys() == {"v", "w"}
    assert equal(found["v"], BASE[0])
    assert equal(found["w"], BASE.t())
    assert formats.readable(index, cache=cache) == new
    assert {path: FileStat.from_stat(path.stat()) for path in new.parent.iterdir()} == states

    # What the index and the files say is compared before.
    index.write_text(f'{{"weight_map": {{"v": "{b}", "w": "{a}"}}}}')
    with pytest.raises(CorruptModelCheckpointError, match="agree"):
        formats.index(tmp_path, cache=cache)
    index.write_text(f'{{"weight_map": {{"v": "{a}", "w": "{b}"}}}}')
    (tmp_path / a).unlink()
    with pytest.raises(CorruptModelCheckpointError, match=rf"'{a}' is missing"):
        formats.index(tmp_path, cache=cache)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["consolidated", "fairseq2"])
def test_strided_parts_of_ranks_are_rewritten(tmp_path: Path, kind: str) -> None:
    for tp in range(2):
        file = tmp_path / ("pp_00/tp_{:02}/sdp_00.pt" if kind == "fairseq2" else "consolidated.{:02}.pth").format(tp)
        file.parent.mkdir(parents=True, exist_ok=True)
        _written(file, {"w": (BASE + tp).t(), "norm": BASE[0]})

    found = read_all(formats.readable(tmp_path, cache=tmp_path / "cache"))
    suffix = ".0" if kind == "fairseq2" else ""
    assert found.keys() == {f"{name}#{tp}{suffix}" for name in ("w", "norm") for tp in range(2)}
    assert all(equal(found[f"w#{tp}{suffix}"], (BASE + tp).t()) for tp in range(2))


def test_the_same_tensor_of_two_pipeline_ranks_is_not_rewritten(tmp_path: Path) -> None:
    for pp in range(2):
        (tmp_path / f"pp_{pp:02}" / "tp_00").mkdir(parents=True)
        _written(tmp_path / f"pp_{pp:02}" / "tp_00" / "sdp_00.pt", {"w": BASE.t()})
    with pytest.raises(CorruptModelCheckpointError, match="tensor 'w'"):
        formats.readable(tmp_path, cache=tmp_path / "cache")


def test_consolidated(tmp_path: Path) -> None:
    for i in range(3):
        _written(tmp_path / f"consolidated.{i:02}.pth", {"w": BASE + i, "norm": BASE[0]})

    manifest = formats.index(tmp_path)
    assert [shard.name for shard in manifest.shards] == [f"consolidated.{i:02}.pth" for i in range(3)]
    assert sorted(manifest.names) == [f"{name}#{i}" for name in ("norm", "w") for i in range(3)]
    found = read_all(tmp_path)
    assert all(equal(found[f"w#{i}"], BASE + i) for i in range(3))

    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(CorruptModelCheckpointError, match=r"consolidated\.01\.pth"):
        formats.index(tmp_path)
    (tmp_path / "consolidated.02.pth").unlink()
    assert sorted(formats.index(tmp_path).names) == ["norm", "w"]


def test_what_fairseq2_saves(tmp_path: Path) -> None:
    for pp in range(2):
        for tp in range(2):
            for sdp in range(3):
                file = tmp_path / f"pp_{pp:02}" / f"tp_{tp:02}" / f"sdp_{sdp:02}.pt"
                file.parent.mkdir(parents=True, exist_ok=True)
                _written(file, {f"layers.{pp}.w": BASE + 100 * pp + 10 * tp + sdp})

    found = read_all(tmp_path)
    assert len(found) == 12
    assert equal(found["layers.1.w#1.2"], BASE + 112)

    (tmp_path / "pp_01" / "tp_01" / "sdp_02.pt").unlink()
    with pytest.raises(CorruptModelCheckpointError, match="the same number"):
        formats.index(tmp_path)


def test_pipeline_ranks_hold_different_tensors(tmp_path: Path) -> None:
    for pp in range(2):
        (tmp_path / f"pp_{pp:02}" / "tp_00").mkdir(parents=True)
        _written(tmp_path / f"pp_{pp:02}" / "tp_00" / "sdp_00.pt", {f"w{pp}": BASE})
    assert sorted(formats.index(tmp_path).names) == ["w0", "w1"]

    _written(tmp_path / "pp_01" / "tp_00" / "sdp_00.pt", {"w0": BASE})
    with pytest.raises(CorruptModelCheckpointError, match="tensor 'w0'"):
        formats.index(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for name in ("model.pt", "model.bin"):
        with pytest.raises(CheckpointNotFoundError):
            formats.index(tmp_path / name)


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    """ZIP64, and a manifest that takes no longer than for a small file: the tensor is a hole of 5 GB."""
    size = 5 << 30
    small = checkpoint(pickled(dictionary(w=tensor(storage(count=size // 4), shape=(size // 4,), strides=(1,)))), {})
    wide = struct.pack("<2H2Q", 1, 16, size, size)
    header = archive(Member("a/data/0", b"", local={"packed": 2**32 - 1, "size": 2**32 - 1, "extra": wide}))
    local = header[: header.index(b"PK\x01\x02")]
    at = small.index(b"PK\x01\x02")
    directory = small[at : small.index(b"PK\x05\x06")]
    directory += struct.pack(
        "<4s6H3L5H2L", b"PK\x01\x02", 0, 0, 0x800, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 8, len(wide), 0, 0, 0, 0, at
    )
    directory += b"a/data/0" + wide
    start = at + len(local) + size
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 45, 0, 0, 4, 4, len(directory), start)
    end += struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
    end += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 4, 4, len(directory), 2**32 - 1, 0)

    path = tmp_path / "model.pt"
    with path.open("wb") as file:
        file.write(small[:at] + local)
        file.truncate(start)
        file.seek(start)
        file.write(directory + end)

    manifest = formats.index(path)
    assert manifest.nbytes(0) == size
    assert manifest.offsets[0] == at + len(local)
    with zipfile.ZipFile(io.BytesIO(small)) as again:
        assert again.testzip() is None
