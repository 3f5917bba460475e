"""All weights on this machine: also those without a card, and those that lading does not load."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

import lading
from lading.errors import CorruptModelCheckpointError, LadingError, PolicyError
from lading.operations.adopt import Adoption
from tests.helpers.cached_repository import add_cards, add_snapshot, use_cache
from tests.helpers.make_checkpoint import make

Cli = Callable[..., Result]


@pytest.fixture
def disk(tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LADING_OFFLINE", "1")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def gguf(*, version: int = 3, tensors: int = 3, pairs: int = 2, size: int = 200, order: str = "<") -> bytes:
    counts = struct.pack(f"{order}{'II' if version == 1 else 'QQ'}", tensors, pairs)
    return (b"GGUF" + struct.pack(f"{order}I", version) + counts).ljust(size, b"\0")


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _tensor(name: str, shape: tuple[int, ...], kind: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, 0)


GGUF = b"".join([
    struct.pack("<4sIQQ", b"GGUF", 3, 4, 5),
    _text("general.architecture") + struct.pack("<I", 8) + _text("qwen3"),
    _text("qwen3.block_count") + struct.pack("<II", 4, 28),
    _text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + _text("<s>") + _text("é"),
    _text("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.0, 1.0),
    _text("general.quantized") + struct.pack("<I?", 7, True),
    _tensor("token_embd.weight", (64, 100), 12), _tensor("output_norm.weight", (64,), 0),
    _tensor("blk.0.attn_q.weight", (64, 64), 12), _tensor("new", (3,), 200),
])  # fmt: skip
"""A header with each kind of value, as llama.cpp writes it."""


def fill(folder: Path, files: dict[str, bytes | str | dict[str, torch.Tensor]]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            save_file(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


HALF = {"a": torch.zeros(4, 2, dtype=torch.float16)}
LORA = {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 8}), "adapter_model.safetensors": HALF}
ZIP = b"PK\x03\x04" + bytes(60)


def adopt(*folders: Path) -> dict[str, Adoption]:
    found = lading.adopt_checkpoints(*folders, progress=False)
    return {os.path.relpath(each.path, folders[0]): each for each in found}


def listed(**conditions: str) -> dict[str, lading.catalog.records.ModelSummary]:
    models = lading.get_asset_store().models(include_all=True, unregistered=True, **conditions)
    return {model.name: model for model in models if model.kind is not None}


ARTIFACTS: dict[str, tuple[dict[str, bytes | str | dict[str, torch.Tensor]], str, str, int, tuple[str, ...]]] = {
    # files, the path, the kind, the number of files, the dtypes
    "gguf": ({"q4.gguf": GGUF}, "q4.gguf", "gguf", 1, ("Q4_K", "F32", "type 200")),
    "gguf, without what its counts promise": ({"q4.gguf": gguf(size=100)}, "q4.gguf", "gguf", 1, ()),
    "gguf, in parts": (
        {f"q8-0000{i}-of-00002.gguf": gguf(tensors=i) for i in (1, 2)}, "q8-00001-of-00002.gguf", "gguf", 2, ("F32",),
    ),
    "gguf, other versions": ({"old.gguf": gguf(version=1)}, "old.gguf", "gguf", 1, ("F32",)),
    "gguf, big-endian": ({"big.GGUF": gguf(order=">")}, "big.GGUF", "gguf", 1, ("F32",)),
    "gguf, a blob of ollama": ({"blobs/sha256-0123": gguf()}, "blobs/sha256-0123", "gguf", 1, ("F32",)),
    "ggml": ({"m.ggml": b"lmgg" + bytes(9)}, "m.ggml", "ggml", 1, ()),
    "lora": (LORA, ".", "lora adapter", 2, ("F16",)),
    "ia3": (LORA | {"adapter_config.json": '{"peft_type": "IA3"}'}, ".", "ia3 adapter", 2, ("F16",)),
    "dora": (
        LORA | {"adapter_config.json": '{"peft_type": "LORA", "use_dora": true}'}, ".", "adapter", 2, ("F16",),
    ),
    "lora, of an old version of peft": (
        {"adapter_config.json": '{"peft_type": "LORA"}', "adapter_model.bin": b"x"}, ".", "adapter", 2, (),
    ),
    "an adapter of another kind": (LORA | {"adapter_config.json": '{"peft_type": [1]}'}, ".", "adapter", 2, ("F16",)),
    "lora, as a trainer saves it": (
        LORA | {"optimizer.pt": b"x", "training_args.bin": b"x", "rng.pth": b"x"}, ".", "lora adapter", 2, ("F16",),
    ),
    "diffusers": (
        {
            "model_index.json": "{}",
            "unet/diffusion_pytorch_model.safetensors": HALF,
            "text_encoder/model.safetensors": {"b": torch.zeros(64)},
        },
        ".", "diffusers", 3, ("F32", "F16"),
    ),
    "SavedModel": ({"saved_model.pb": b"\x08\x01", "variables/variables.index": b"x"}, ".", "tensorflow", 2, ()),
    "a checkpoint of tensorflow": (
        {"m.ckpt.data-00000-of-00001": b"x", "m.ckpt.index": b"x", "m.ckpt.meta": b"x"},
        "m.ckpt.data-00000-of-00001", "tensorflow", 3, (),
    ),
    "hdf5": ({"tf_model.h5": b"\x89HDF\r\n\x1a\n" + bytes(9)}, "tf_model.h5", "hdf5", 1, ()),
    "keras": ({"m.keras": ZIP}, "m.keras", "keras", 1, ()),
    "flax": ({"flax_model.msgpack": b"\xde\x00\x01"}, "flax_model.msgpack", "flax", 1, ()),
    "onnx": ({"m.onnx": b"\x08\x07\x12\x00", "m.onnx_data": b"x", "m.onnx.data": b"x"}, "m.onnx", "onnx", 3, ()),
    "numpy": ({f"{i}.npz": ZIP for i in range(20)}, "0.npz", "numpy", 20, ()),
    "pickle": ({"m.pkl": b"cos\nsystem\n(S'touch ran'\ntR."}, "m.pkl", "pickle", 1, ()),
}  # fmt: skip


QUICK = {
    "gguf", "gguf, without what its counts promise", "gguf, in parts", "lora", "dora", "diffusers", "SavedModel",
    "a checkpoint of tensorflow", "onnx", "numpy", "pickle",
}  # fmt: skip
"""A file, a series, a folder, a whole folder, files beside one another, and many files."""


@pytest.mark.few(6)
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in ARTIFACTS]
)
def test_weights_that_lading_does_not_load_are_in_the_inventory(cli: Cli, disk: Path, case: str) -> None:
    files, where, kind, count, dtypes = ARTIFACTS[case]
    fill(disk, files)
    path = (disk / where).resolve()
    sizes = [each.stat().st_size for each in disk.rglob("*") if each.is_file()]

    (found,) = adopt(disk).values()

    status = "adopted" if kind == "lora adapter" else "unloadable"
    assert (found.path, found.status, found.kind, found.error) == (path, status, kind, None)
    assert found.dtypes == dtypes
    assert found.bytes <= sum(sizes)
    assert len(sizes) != count or found.bytes == sum(sizes)
    assert found.problem
    row = listed()[str(path)]
    shown = "unregistered" if kind == "lora adapter" else "unloadable"
    assert (row.status, row.kind, row.bytes, row.shards) == (shown, kind, found.bytes, count)
    assert (row.dtypes, row.problem, row.local_path) == (",".join(dtypes) or None, found.problem, str(path))
    (entry,) = lading.disk_usage().holdings
    assert (entry.name, entry.bytes, entry.files) == (str(path), found.bytes, count)
    assert f"{path}: {kind}: {found.problem}" in cli("adopt", disk).stderr


@pytest.mark.few(2)
@pytest.mark.parametrize("scheme", ["awq", "gptq", "fp8", "bitsandbytes", "compressed-tensors"])
def test_quantized_checkpoints_are_in_the_inventory(disk: Path, scheme: str) -> None:
    made = make(disk / "model", quantization_config={"quant_method": scheme})

    found = adopt(disk)["model"]

    assert (found.status, found.kind, found.dtypes) == ("unloadable", f"quantized ({scheme})", ("BF16",))
    assert found.bytes == (made / "model.safetensors").stat().st_size
    add_cards(disk.parent, mine=str(made))
    with pytest.raises(lading.NotSupportedError):
        lading.load_model("mine", progress=False)


@pytest.mark.parametrize("weights", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
@pytest.mark.parametrize(
    ("name", "stated", "scheme"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "gptq"),
        ("quant_config.json", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "awq"),
    ],
)
def test_quantized_checkpoints_of_early_tools(
    cli: Cli, disk: Path, name: str, stated: object, scheme: str, weights: str
) -> None:
    made = make(disk / "model")
    (made / "model.safetensors").rename(made / weights)
    (made / name).write_text(json.dumps(stated))

    found = adopt(disk)["model"]

    assert (found.status, found.kind) == ("unloadable", f"quantized ({scheme})")
    assert found.bytes == (made / weights).stat().st_size
    assert f"quantized ({scheme})" in cli("add", disk).stderr
    add_cards(disk.parent, mine=str(made / weights))
    with pytest.raises(lading.NotSupportedError, match=scheme):
        lading.load_model("mine", progress=False)
    (made / name).write_text('{"other": 1}')
    assert adopt(disk)["model"].kind == "checkpoint"


@pytest.mark.parametrize("look", [lading.index_checkpoint, lambda path: lading.verify_model(path, progress=False)])
def test_the_size_of_a_quantized_checkpoint_that_was_read_counts_once(
    disk: Path, look: Callable[[Path], object]
) -> None:
    path = make(disk / "model", quantization_config={"quant_method": "awq"})
    adopt(disk)

    look(path)

    (entry,) = lading.disk_usage().holdings
    assert entry.bytes == (path / "model.safetensors").stat().st_size


@pytest.mark.few(2)
@pytest.mark.parametrize("stated", ["unknown", {"quant_method": "a" * 999}, {"quant_method": "\x1b[31m"}, [1], {}])
def test_no_scheme_is_shown_that_is_no_word(disk: Path, stated: object) -> None:
    make(disk / "model", quantization_config=stated)

    assert adopt(disk)["model"].kind == "quantized (unknown)"


HOSTILE: dict[str, tuple[str, bytes]] = {
    "empty": ("m.gguf", b""),
    "cut": ("m.gguf", gguf()[:23]),
    "2^63 tensors": ("m.gguf", gguf(tensors=1 << 63)),
    "all bits of the keys": ("m.gguf", gguf(pairs=(1 << 64) - 1)),
    "one tensor more than fits": ("m.gguf", gguf(tensors=9, pairs=0)),
    "one key more than fits": ("m.gguf", gguf(tensors=0, pairs=16)),
    "version 0": ("m.gguf", gguf(version=0)),
    "version 4": ("m.gguf", gguf(version=4)),
    "version of all bits": ("m.gguf", b"GGUF" + b"\xff" * 40),
    "another format": ("m.gguf", b"\x89HDF\r\n\x1a\n" + bytes(99)),
    "a pointer of Git LFS": ("m.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a web page": ("m.onnx", b"<!doctype html>"),
    "a web page for Keras": ("m.h5", b"<!doctype html>"),
    "no map": ("m.msgpack", b"\x01"),
    "no zip": ("m.npz", b"x"),
    "an empty pickle": ("m.pkl", b""),
    "a pipeline of nothing": ("model_index.json", b""),
}


@pytest.mark.few(5)
@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_what_its_name_says_failed(disk: Path, case: str) -> None:
    name, content = HOSTILE[case]
    fill(disk, {name: content})

    (found,) = adopt(disk).values()

    assert (found.status, found.bytes) == ("failed", len(content) if name != "model_index.json" else 0)
    assert found.kind == name.rpartition(".")[2].replace("h5", "hdf5").replace("msgpack", "flax").replace(
        "npz", "numpy"
    ).replace("pkl", "pickle").replace("json", "diffusers")
    assert isinstance(found.error, CorruptModelCheckpointError)
    assert not listed()


def test_the_most_that_a_header_can_state_is_read(disk: Path) -> None:
    fill(disk, {"m.gguf": gguf(tensors=8, pairs=0), "n.gguf": gguf(tensors=0, pairs=15)})

    assert {each.status for each in adopt(disk).values()} == {"unloadable"}
    assert lading.query("SELECT tensors FROM unregistered ORDER BY name").rows == [(8,), (None,)]


def test_odd_files_and_folders(disk: Path, tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", {"m.gguf": gguf(), "deep/n.gguf": gguf()})
    for name in ("fifo", "loop", "leaves", "inside", "locked", "pipeline/unet", "folder/m.gguf"):
        (disk / name).mkdir(parents=True)
    os.mkfifo(disk / "fifo" / "m.gguf")
    os.mkfifo(disk / "pipeline" / "unet" / "model.safetensors")
    (disk / "pipeline" / "model_index.json").write_text("{}")
    (disk / "pipeline" / "unet" / "up").symlink_to("..")
    (disk / "loop" / "m.gguf").symlink_to("m.gguf")
    (disk / "loop" / "down").symlink_to(".")
    (disk / "leaves" / "m.gguf").symlink_to(outside / "m.gguf")
    (disk / "leaves" / "folder").symlink_to(outside / "deep")
    fill(disk / "inside", {"blob": b"x"})
    (disk / "inside" / "m.gguf").symlink_to("../real.gguf")
    fill(disk, {"real.gguf": gguf()})
    fill(disk / "locked", {"m.gguf": gguf()}).chmod(0)

    found = adopt(disk)

    assert {name: (each.status, type(each.error)) for name, each in found.items()} == {
        "fifo/m.gguf": ("failed", CorruptModelCheckpointError),
        "pipeline": ("failed", CorruptModelCheckpointError),
        "loop/m.gguf": ("failed", CorruptModelCheckpointError),
        "leaves/m.gguf": ("failed", PolicyError),
        "inside/m.gguf": ("unloadable", type(None)),
        "real.gguf": ("unloadable", type(None)),
        **({} if os.geteuid() == 0 else {"locked": ("failed", PermissionError)}),
        **({"locked/m.gguf": ("unloadable", type(None))} if os.geteuid() == 0 else {}),
    }
    assert all(isinstance(each.error, LadingError | OSError | None) for each in found.values())


def test_artifacts_beside_a_checkpoint(disk: Path) -> None:
    made = make(disk / "model")
    fill(made, {"tf_model.h5": b"\x89HDF\r\n\x1a\n", "flax_model.msgpack": b"\xde\x00\x01", "onnx/m.onnx": b"\x08\x07"})
    fill(disk / "adapted", LORA)
    shutil.copy(made / "model.safetensors", disk / "adapted")

    assert {(name, each.status, each.kind) for name, each in adopt(disk).items()} >= {
        ("model", "adopted", "checkpoint"), ("model/tf_model.h5", "unloadable", "hdf5"),
        ("model/flax_model.msgpack", "unloadable", "flax"), ("model/onnx/m.onnx", "unloadable", "onnx"),
    }  # fmt: skip
    both = lading.adopt_checkpoints(disk / "adapted", progress=False)
    assert {(each.status, each.kind) for each in both} == {("adopted", "lora adapter"), ("known", "checkpoint")}


def test_an_adapter_that_a_card_adds_belongs_to_the_card(cli: Cli, disk: Path, tmp_path: Path) -> None:
    fill(disk / "lora", LORA)
    assert adopt(disk)["lora"].cards == ()
    assert listed()[str(disk / "lora")].status == "unregistered"

    add_cards(tmp_path, mine=f"{make(tmp_path / 'base')}\nadapter: {disk / 'lora'}")

    found = adopt(disk)["lora"]
    assert (found.status, found.kind, found.cards, found.problem) == ("adopted", "lora adapter", ("mine",), None)
    cli("load", "mine", code=4)  # it fits no module, but the catalog knows it now
    assert not listed()


def test_an_adapter_that_gets_a_card_is_listed_no_more(disk: Path) -> None:
    make(disk / "base")
    fill(disk / "lora", LORA)
    adopt(disk)
    assert listed().keys() == {str(disk / "base"), str(disk / "lora")}

    lading.add_checkpoints(disk / "base", progress=False)
    (added,) = lading.add_checkpoints(disk / "lora", fields={"base": "base"}, progress=False)

    assert added.status == "added"
    assert not listed()


@pytest.mark.parametrize("named", ["the folder", "the files"])
def test_cards_are_not_added_for_artifacts(cli: Cli, disk: Path, named: str) -> None:
    make(disk / "good")
    fill(disk, {"q.gguf": gguf(), "adapter/adapter_config.json": LORA["adapter_config.json"]})
    fill(disk / "adapter", {"adapter_model.safetensors": HALF})
    make(disk / "awq", quantization_config={"quant_method": "awq"})
    paths = [disk] if named == "the folder" else [disk / "good", disk / "q.gguf", disk / "adapter", disk / "awq"]

    found = {each.checkpoint: each for each in lading.add_checkpoints(*paths, progress=False)}

    assert {path: each.status for path, each in found.items()} == {
        str(disk / "good"): "added", str(disk / "q.gguf"): "skipped", str(disk / "adapter"): "skipped",
        str(disk / "awq"): "skipped",
    }  # fmt: skip
    assert "gguf: It is of the format of llama.cpp" in (found[str(disk / "q.gguf")].problem or "")
    assert {row.kind for row in listed().values()} == {"gguf", "quantized (awq)"}


def test_a_repository_of_the_cache(tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = disk / "hub"
    use_cache(cache, monkeypatch)
    only = add_snapshot(cache, "org/gguf", {"q4.gguf": gguf(), "q8.gguf": gguf(), "README.md": b"x"})
    made = make(tmp_path / "made", quantization_config={"quant_method": "awq"})
    quantized = add_snapshot(cache, "org/awq", made)
    mixed = add_snapshot(
        cache, "org/mixed", {**{p.name: p.read_bytes() for p in make(tmp_path / "m").iterdir()}, "m.onnx": b"\x08\x07"}
    )
    add_cards(tmp_path, mixed="hg://org/mixed")

    found = {each.path: each for each in lading.adopt_checkpoints()}

    assert {path: (each.status, each.kind) for path, each in found.items()} == {
        only / "q4.gguf": ("unloadable", "gguf"),
        only / "q8.gguf": ("unloadable", "gguf"),
        quantized: ("unloadable", "quantized (awq)"),
        mixed: ("adopted", "checkpoint"),
        mixed / "m.onnx": ("unloadable", "onnx"),
    }
    assert listed().keys() == {str(path) for path in found} - {str(mixed)}


def test_what_has_no_card_is_listed_until_it_has_one(cli: Cli, disk: Path, tmp_path: Path) -> None:
    mine = make(disk / "mine")
    torch.save({"a": torch.zeros(3)}, disk / "best.pt")
    add_cards(tmp_path, other=str(make(disk / "other")))
    adopt(disk)

    assert {(name, model.status, model.kind) for name, model in listed().items()} == {
        (str(mine), "unregistered", "checkpoint"), (str(disk / "best.pt"), "unregistered", "checkpoint"),
    }  # fmt: skip
    row = listed()[str(mine)]
    assert (row.checkpoint, row.format, row.dtypes, row.shards) == (f"file://{mine}", "safetensors", "BF16", 1)
    assert (row.local_path, row.source, row.problem) == (str(mine / "model.safetensors"), None, None)
    assert str(mine) not in cli("list").stdout
    assert "unregistered" in cli("list", "--all").stdout
    assert cli("list", "--status", "unregistered", "-q").stdout.splitlines() == [str(disk / "best.pt"), str(mine)]
    assert cli("list", str(mine), "--all", "-q").stdout == f"{mine}\n"
    assert cli("list", "--all", f"{disk}/*", "--dtype", "bf16", "--sort", "size", "-q").stdout == f"{mine}\n"
    assert str(mine) not in [model.name for model in lading.get_asset_store().models(include_all=True)]
    assert lading.query("SELECT name FROM models WHERE name LIKE '/%'").rows == []

    add_cards(tmp_path, other=str(disk / "other"), mine=str(mine))

    assert listed().keys() == {str(disk / "best.pt")}
    (disk / "best.pt").unlink()
    assert not listed()
    assert "unregistered" not in cli("list", "--all").stdout


@pytest.mark.slow
def test_a_folder_that_is_found_to_be_a_card_s_is_listed_no_more(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_cache(tmp_path / "hub", monkeypatch)
    mine = make(disk / "mine")
    adopt(disk)
    assert listed().keys() == {str(mine)}
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(tmp_path / "hub", "Qwen/Tiny", mine)
    lading.index_checkpoint("tiny")
    shutil.rmtree(snapshot.parents[1])

    lading.adopt_checkpoints(disk, dry_run=True)
    assert listed().keys() == {str(mine)}
    assert adopt(disk)["mine"].cards == ("tiny",)
    assert not listed()
    assert adopt(disk)["mine"].status == "known"


def test_an_adoption_replaces_the_last_one_of_its_folder(disk: Path, tmp_path: Path) -> None:
    fill(disk, {"a/m.gguf": gguf(), "a b/m.gguf": gguf(), "b/m.gguf": gguf(), "a%/m.gguf": gguf()})
    fill(tmp_path / "disk2", {"m.gguf": gguf()})
    adopt(disk, tmp_path / "disk2")
    assert len(listed()) == 5
    for name in ("a", "b"):
        (disk / name / "m.gguf").unlink()
        fill(disk, {f"{name}/n.onnx": b"\x08\x07"})

    before = lading.query("SELECT * FROM artifacts ORDER BY uri").rows
    lading.adopt_checkpoints(disk, dry_run=True)
    assert lading.query("SELECT * FROM artifacts ORDER BY uri").rows == before
    adopt(disk / "a")

    uris = [uri.removeprefix(f"file://{tmp_path}/") for (uri,) in lading.query("SELECT uri FROM artifacts").rows]
    assert sorted(uris) == ["disk/a b/m.gguf", "disk/a%/m.gguf", "disk/a/n.onnx", "disk/b/m.gguf", "disk2/m.gguf"]
    assert {row.kind for row in listed().values()} == {"onnx", "gguf"}
    assert str(disk / "b" / "m.gguf") not in listed(), "it is gone"


def test_an_artifact_is_shown_and_forgotten_by_its_path(cli: Cli, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(disk, {"m.gguf": gguf(), "lora/adapter_config.json": LORA["adapter_config.json"]})
    fill(disk / "lora", {"adapter_model.safetensors": HALF})
    mine = make(disk / "mine")
    adopt(disk)
    monkeypatch.chdir(disk)

    for spelled in ("./m.gguf", disk / "m.gguf", f"file://{disk}/lora/../m.gguf"):
        shown = dict(line.split(maxsplit=1) for line in cli("show", spelled).stdout.splitlines())
        assert (shown["name"], shown["kind"], shown["status"]) == (str(disk / "m.gguf"), "gguf", "unloadable")
        assert (shown["size"], shown["problem"]) == ("200 B", listed()[str(disk / "m.gguf")].problem)
    assert json.loads(cli("show", "./lora", "--json").stdout)["kind"] == "lora adapter"
    assert "llama.cpp" in cli("show", "./m.gguf", "--tensors", code=2).stderr
    assert json.loads(cli("show", mine, "--json").stdout)["checkpoint"]["indexed"]["tensors"] == 24
    assert len(cli("show", mine, "--tensors", "-q").stdout.splitlines()) == 24
    cli("show", "./none.gguf", code=2)

    before = sorted(disk.rglob("*"))
    cli("rm", "./m.gguf", "--dry-run")
    assert str(disk / "m.gguf") in listed()
    assert "m.gguf stays: adopted, not fetched by lading" in cli("rm", "./m.gguf").stderr
    assert listed().keys() == {str(mine), str(disk / "lora")}
    cli("rm", "./m.gguf", code=2)
    assert sorted(disk.rglob("*")) == before


def test_a_load_by_path_says_what_is_there(cli: Cli, disk: Path) -> None:
    fill(disk, {"m.gguf": gguf(), "bad.gguf": b"x", "saved/saved_model.pb": b"\x08\x01"})

    for name, kind in (("m.gguf", "gguf"), ("saved", "tensorflow")):
        for command in ("load", "check", "plan"):
            assert f"{disk / name}: {kind}: It is" in cli(command, disk / name, code=2).stderr
    assert "has no config.json" in cli("load", disk / "bad.gguf", code=2).stderr


def test_nothing_is_run(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(disk)
    fill(
        disk,
        {
            "m.pkl": b"cos\nsystem\n(S'touch ran'\ntR.",
            ".metadata": b"\x80\x04cos\nsystem\n(S'touch ran'\ntR.",
            "0.distcp": b"x",
        },
    )

    adopt(disk)

    assert not (disk / "ran").exists()


def test_one_note_for_each_reason(cli: Cli, disk: Path) -> None:
    fill(disk, {f"{i}.gguf": gguf() for i in range(9)} | {"m.onnx": b"\x08\x07"})

    result = cli("adopt", disk)

    assert result.stderr.count("llama.cpp") == 1
    assert f"{disk}/0.gguf and 8 more: gguf: It is of the format of llama.cpp" in result.stderr
    assert "10 artifacts that lading does not load" in result.stderr
    rows = json.loads(cli("adopt", disk, "--json").stdout)
    assert [(row["kind"], row["status"], bool(row["problem"])) for row in rows] == [
        *([("gguf", "unloadable", True)] * 9), ("onnx", "unloadable", True),
    ]  # fmt: skip
