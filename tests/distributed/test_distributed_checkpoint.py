"""What FSDP2 and torch.distributed.checkpoint save, loaded by other gangs than saved it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lading import DigestMismatchError, LadingError, convert_checkpoint, formats, import_cards, load_model, verify_model
from lading.families.qwen import get_qwen_model_hub
from tests.distributed.gang_tools import gangs_of
from tests.distributed.tiny_models import whole
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, qwen_config, tensors


def save_fsdp2(source: Path, folder: Path, size: int, nested: bool) -> None:
    """A step of training over all ranks, and a save of model and optimizer."""
    torch.set_num_threads(1)
    gangs_of(device="cpu", sdp=size)  # starts torch.distributed
    model = load_model(source, dtype="auto", device="cpu", progress=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state, of_optimizer = get_state_dict(model, optimizer)
    if nested:
        dcp.save({"model": state, "optimizer": of_optimizer, "step": 3}, checkpoint_id=folder)
    else:
        dcp.save({**state, "optimizer": of_optimizer}, checkpoint_id=folder)
    dist.barrier()


def load(folder: Path, axes: dict[str, int], cooperative: bool = False) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    model = load_model(
        folder, gangs=gangs_of(device="cpu", **axes), dtype="auto", progress=False, cooperative=cooperative
    )
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


def check(found: dict[str, torch.Tensor]) -> None:
    expected = tensors()
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert found.keys() >= tensors().keys()


def saved(pool: Pool, tmp_path: Path, *, nested: bool = True) -> Path:
    folder = tmp_path / "step-3"
    make(tmp_path / "in")
    pool.values(save_fsdp2, tmp_path / "in", folder, pool.size, nested)
    (folder / "config.json").write_bytes((tmp_path / "in" / "config.json").read_bytes())
    return folder


@pytest.mark.few(1)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
def test_two_ranks_of_fsdp2(pool2: Pool, tmp_path: Path, nested: bool) -> None:
    folder = saved(pool2, tmp_path, nested=nested)
    manifest = formats.index(folder)
    assert set(manifest.names) - {"lm_head.weight"} == set(tensors())
    assert len(manifest.pieces) == len(manifest)
    assert {shard.name for shard in manifest.shards} == {"__0_0.distcp", "__1_0.distcp"}

    for mmap in (False, True):
        check(load_model(folder, dtype="auto", mmap=mmap, progress=False).state_dict())
    for axes in ({"tp": 2}, {"sdp": 2}, {"pp": 1}):
        for found in pool2.values(load, folder, axes):
            check(found)
    for found in pool2.values(load, folder, {"sdp": 2}, True):
        check(found)


def load_card(home: Path, name: str, axes: dict[str, int], cooperative: bool) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    before = dict(os.environ)
    os.environ |= {"LADING_DATABASE_URL": f"sqlite:///{home}/c.sqlite", "XDG_CONFIG_HOME": str(home)}
    try:
        gangs = gangs_of(device="cpu", **axes)
        model = load_model(name, gangs=gangs, dtype="auto", progress=False, verify="always", cooperative=cooperative)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


@pytest.mark.slow
def test_four_ranks_of_fsdp2_by_card(pool4: Pool, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{home}/c.sqlite")
    folder = saved(pool4, tmp_path)
    cards = tmp_path / "cards.yaml"
    config = json.dumps({k: v for k, v in vars(qwen_config()).items() if not k.startswith("_")})
    cards.write_text(f"name: mine\nmodel_family: qwen\nmodel_config: {config}\ncheckpoint: {folder}\n")
    import_cards(cards)
    for verify in ("auto", "always", "auto"):
        check(get_qwen_model_hub().load_model("mine", dtype=torch.bfloat16, verify=verify).state_dict())
    assert verify_model("mine").good
    for axes, cooperative in (({"tp": 2, "sdp": 2}, False), ({"tp": 2, "sdp": 2}, True)):
        for found in pool4.values(load_card, home, "mine", axes, cooperative):
            check(found)

    report = convert_checkpoint("mine", tmp_path / "out", progress=False)
    assert not report.dropped
    check(load_file(tmp_path / "out" / "model.safetensors"))

    # A byte of a part is wrong: the digests that the first load took show it.
    manifest = formats.index(folder)
    piece = manifest.pieces[manifest.names.index("model.layers.1.mlp.down_proj.weight")][-1]
    damaged = folder / manifest.shards[piece.shard].name
    data = bytearray(damaged.read_bytes())
    data[piece.offset] ^= 1
    damaged.write_bytes(data)
    assert not verify_model("mine").good
    with pytest.raises(DigestMismatchError):
        get_qwen_model_hub().load_model("mine", dtype=torch.bfloat16, verify="always")
    outcomes = pool4.run(load_card, home, "mine", {"tp": 2, "sdp": 2}, True)
    assert all(isinstance(outcome.error, LadingError) for outcome in outcomes), outcomes


MESHES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "grid": ((2, 2), [Shard(0), Shard(1)]),
    "replicated": ((4,), [Replicate()]),
    "hybrid": ((2, 2), [Replicate(), Shard(0)]),
}


def save_dtensors(folder: Path) -> None:
    gangs_of(device="cpu", sdp=4)
    state: dict[str, Any] = {}
    for name, (mesh, placements) in MESHES.items():
        tensor = torch.arange(35.0).reshape(5, 7)
        state[name] = distribute_tensor(tensor, init_device_mesh("cpu", mesh), placements)
        state[f"{name}.few"] = distribute_tensor(tensor[:2, :2].contiguous(), init_device_mesh("cpu", mesh), placements)
    state |= {"whole": torch.arange(3, dtype=torch.int64), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    dcp.save({"model": state}, checkpoint_id=folder)
    dist.barrier()


def test_any_mesh(pool4: Pool, tmp_path: Path) -> None:
    from lading.checkpoints.checkpoint import path_checkpoint
    from lading.models.tensors import read_tensors

    pool4.values(save_dtensors, tmp_path / "saved")
    checkpoint = path_checkpoint(tmp_path / "saved", cache=tmp_path / "cache")
    manifest = checkpoint.manifest
    read = read_tensors(checkpoint, range(len(manifest)), manifest.dtypes)
    found = dict(zip(manifest.names, read, strict=True))
    for name in MESHES:
        assert torch.equal(found[name], torch.arange(35.0).reshape(5, 7)), name
        assert torch.equal(found[f"{name}.few"], torch.arange(35.0).reshape(5, 7)[:2, :2]), name
    assert torch.equal(found["whole"], torch.arange(3))
    assert found["scalar"] == 2.5
    assert found["empty"].shape == (0, 3)
