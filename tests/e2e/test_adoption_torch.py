"""What `torch.save` wrote and is on this machine already, taken into the catalog where it lies; nothing is run."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lading
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.records import CheckpointContents
from lading.errors import CorruptModelCheckpointError, NotSupportedError, PolicyError, RefusedPickleError
from lading.formats import index
from lading.operations.adopt import Adoption
from lading.system.uris import path_uri
from tests.helpers.cached_repository import add_cards, add_snapshot, tree
from tests.helpers.make_checkpoint import make, tensors
from tests.helpers.torch_files import save, save_shards


@pytest.fixture(autouse=True)
def _offline(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "1")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def before_safetensors(folder: Path, count: int) -> Path:
    """A repository of a model as old versions of transformers wrote it."""
    make(folder)
    (folder / "model.safetensors").unlink()
    if count == 1:
        torch.save(tensors(), folder / "pytorch_model.bin")
    else:
        save_shards(folder, tensors(), count)
    return folder


def loads(name: str) -> None:
    model = lading.load_model(name, device="cpu", dtype="auto", progress=False)
    expected = tensors()
    assert all(torch.equal(p.detach(), expected[n]) for n, p in model.named_parameters())


def adopt(*paths: Path) -> dict[str, Adoption]:
    return {each.path.name: each for each in lading.adopt_checkpoints(*paths, progress=False)}


@pytest.mark.few(1)
@pytest.mark.parametrize("count", [1, 3])
def test_a_repository_in_the_cache_is_loaded_without_a_network(tmp_path: Path, cache: Path, count: int) -> None:
    snapshot = add_snapshot(cache, "Qwen/Tiny", before_safetensors(tmp_path / "made", count))
    add_cards(tmp_path, tiny="hg://qwen/TINY")
    before = tree(cache)

    (adoption,) = lading.adopt_checkpoints()

    assert (adoption.path, adoption.status, adoption.cards) == (snapshot, "adopted", ("tiny",))
    loads("tiny")
    stored = lading.get_asset_store().checkpoint("hg://qwen/TINY")
    assert stored is not None
    assert stored.revision == snapshot.name
    assert {(copy.kind, copy.verified_at is not None) for copy in stored.copies if "json" not in copy.file} == {
        ("adopted", True)
    }
    assert [check.result for check in lading.verify_model("tiny", progress=False).checks] == ["match"] * count
    assert lading.adopt_checkpoints()[0].status == "known"
    with pytest.raises(PolicyError):
        lading.remove_model("tiny")
    assert tree(cache) == before


def test_files_under_names_of_their_own_are_a_checkpoint_each(tmp_path: Path, models: Path) -> None:
    names = {"one.pt": False, "two.pth": False, "three.ckpt": False, "old.bin": True}
    for name, legacy in names.items():
        (models / name).write_bytes(save({"model": tensors()}, legacy=legacy))
    add_cards(tmp_path, tiny=str(models / "two.pth"))

    found = adopt(models)

    assert {name: each.status for name, each in found.items()} == dict.fromkeys(names, "adopted")
    assert found["two.pth"].cards == ("tiny",)
    assert {each.checkpoint for each in found.values()} == {path_uri(models / name) for name in names}
    assert {name: each.status for name, each in adopt(models).items()} == dict.fromkeys(names, "known")
    loads("tiny")


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_folder_holds_as_a_whole_is_one(tmp_path: Path, models: Path, count: int) -> None:
    folder = before_safetensors(models / "whole", count)
    (folder / "training_args.bin").write_bytes(save({"lr": 0.1}))
    add_cards(tmp_path, tiny=str(folder))

    found = adopt(models)

    assert (found.keys(), found["whole"].status, found["whole"].cards) == ({"whole"}, "adopted", ("tiny",))
    loads("tiny")


def test_safetensors_come_first(models: Path) -> None:
    folder = make(models / "both")
    torch.save(tensors(), folder / "pytorch_model.bin")
    torch.save(tensors(), folder / "other.pt")

    assert adopt(models).keys() == {"both"}
    stored = lading.get_asset_store().checkpoint(path_uri(folder))
    assert stored is not None
    assert stored.manifest.format == "safetensors"


def test_what_torch_distributed_checkpoint_saved_is_one(models: Path) -> None:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a save without a process group
        dcp.save({"model": tensors(), "step": 3}, checkpoint_id=models / "step-3", no_dist=True)
    torch.save({"rng": torch.zeros(3)}, models / "step-3" / "rng.pt")
    (models / "step-4").mkdir()
    (models / "step-4" / "__0_0.distcp").write_bytes(b"PK")

    found = adopt(models)

    assert {name: each.status for name, each in found.items()} == {"step-3": "adopted", "step-4": "failed"}
    stored = lading.get_asset_store().checkpoint(path_uri(models / "step-3"))
    assert stored is not None
    assert set(stored.manifest.names) == set(tensors())


@pytest.mark.parametrize("parts", [["consolidated.00.pth"], ["pp_00/tp_00/sdp_00.pt"]])
def test_parts_of_ranks(models: Path, parts: list[str]) -> None:
    for name in parts:
        path = models / "ranks" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(save({"model": tensors()} if "pp_" in name else tensors()))

    found = adopt(models)

    assert (found.keys(), found["ranks"].status) == ({"ranks"}, "adopted")


def test_bytes_of_a_card_are_known_by_their_sha256(tmp_path: Path, models: Path) -> None:
    """Under any name, if the catalog knows the digest of what the card's address has."""
    from dataclasses import replace
    from hashlib import sha256

    data, uri = save({"model": tensors()}), "https://example.com/model.pt"
    (models / "mine.pth").write_bytes(data)
    (models / "model.pt").write_bytes(data[:-1])
    other = {name: tensor + 1 for name, tensor in tensors().items()}
    (models / "other.pt").write_bytes(save({"model": other}))
    manifest = index(models / "mine.pth")
    (shard,) = manifest.shards
    shard = replace(shard, name="model.pt", sha256=sha256(data).hexdigest())
    database = lading.get_asset_store().database
    record_checkpoint(database, CheckpointContents(uri=uri, manifest=replace(manifest, shards=(shard,))))
    add_cards(tmp_path, tiny=uri)

    found = adopt(models)

    assert (found["mine.pth"].cards, found["mine.pth"].verified) == (("tiny",), True)
    assert (found["other.pt"].cards, found["model.pt"].status) == ((), "failed")
    loads("tiny")


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_what_cannot_be_used_is_listed_and_nothing_of_it_is_run(tmp_path: Path, home: Path, models: Path) -> None:
    outside = tmp_path / "outside.pt"
    outside.write_bytes(save(tensors()))
    (models / "runs.pt").write_bytes(save({"a": torch.ones(2), "b": Runs(tmp_path / "ran")}))
    (models / "args.bin").write_bytes(save({"lr": 0.1}))
    (models / "cut.pt").write_bytes(save(tensors())[:-100])
    (models / "turned.pt").write_bytes(save({"a": torch.ones(3, 2).t()}))
    (models / "deep" / "er").mkdir(parents=True)
    (models / "deep" / "er" / "leaves.pt").symlink_to(outside)
    (models / "deep" / "pp_00" / "tp_00").mkdir(parents=True)
    (models / "deep" / "pp_00" / "tp_00" / "sdp_00.pt").symlink_to(outside)
    (models / "linked" / "pp_00").mkdir(parents=True)
    shutil.copy(outside, tmp_path / "sdp_00.pt")
    (models / "linked" / "pp_00" / "tp_00").symlink_to(tmp_path)
    (models / "gguf").mkdir()
    (models / "gguf" / "model.gguf").write_bytes(b"GGUF")
    before = tree(home / "cache")

    found = adopt(models)

    assert {name: type(each.error) for name, each in found.items()} == {
        "runs.pt": RefusedPickleError,
        "args.bin": CorruptModelCheckpointError,
        "cut.pt": CorruptModelCheckpointError,
        "turned.pt": NotSupportedError,
        "leaves.pt": PolicyError,
        "deep": PolicyError,
        "linked": PolicyError,
        "model.gguf": CorruptModelCheckpointError,
    }
    assert not (tmp_path / "ran").exists()
    assert tree(home / "cache") == before, "nothing was made of what is no ranges of bytes"
