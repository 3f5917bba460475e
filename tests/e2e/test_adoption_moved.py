"""Checkpoints that moved on this machine since the catalog last saw them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from sqlalchemy import text

import lading
from lading.catalog.checkpoints.record import record_checkpoint
from lading.checkpoints.checkpoint import LocalCheckpointFiles
from lading.operations.adopt import Adoption
from lading.operations.moved import MoveFinder
from lading.system import filesystem
from lading.system.uris import path_uri
from tests.helpers.cached_repository import add_cards
from tests.helpers.make_checkpoint import make, tensors

Cli = Callable[..., Result]


@pytest.fixture
def models(tmp_path: Path, catalog: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LADING_OFFLINE", "1")
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def adopt(folder: Path) -> dict[str, Adoption]:
    return {each.path.name: each for each in lading.adopt_checkpoints(folder, progress=False)}


def known() -> set[str]:
    return {uri for (uri,) in lading.query("SELECT uri FROM checkpoints").rows}


def copy_with_times(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    shutil.rmtree(source)


def copy_without_times(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        os.utime(target / file.name, ns=(0, 0))
    shutil.rmtree(source)


def flip_last_byte(path: Path) -> None:
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_renamed_folder_keeps_its_records(models: Path, shards: int) -> None:
    before, now = make(models / "before", shards=shards), models / "now"
    assert adopt(models)["before"].status == "adopted"
    lading.verify_model(before, progress=False)
    digests = lading.query("SELECT digest FROM tensors ORDER BY position").rows
    before.rename(now)

    (dry,) = lading.adopt_checkpoints(models, dry_run=True)
    assert (dry.status, known()) == ("moved", {path_uri(before)})
    moved = adopt(models)["now"]

    assert (moved.status, moved.moved_from, moved.left_behind) == ("moved", before, ())
    assert (moved.checkpoint, moved.verified) == (path_uri(now), True)
    assert known() == {path_uri(now)}
    assert lading.query("SELECT digest FROM tensors ORDER BY position").rows == digests
    assert adopt(models)["now"].status == "known"
    assert [check.result for check in lading.verify_model(now, progress=False).checks if check.method == "blake3"] == [
        "match"
    ] * shards


@pytest.mark.few(4)
@pytest.mark.parametrize("digests", ["none", pytest.param("tensors", marks=pytest.mark.slow), "files"])
@pytest.mark.parametrize("move", [copy_with_times, copy_without_times])
@pytest.mark.parametrize("same", [True, False])
def test_a_copied_folder_is_recognized_by_digests_else_by_times(
    models: Path, move: Callable[[Path, Path], None], digests: str, same: bool
) -> None:
    before, now = make(models / "before"), models / "now"
    adopt(models)
    if digests == "tensors":
        lading.verify_model(before, progress=False)
    if digests == "files":
        sha256 = hashlib.sha256((before / "model.safetensors").read_bytes()).hexdigest()
        store = lading.get_asset_store()
        with store.database.session(write=True) as session:
            session.execute(text("UPDATE shards SET sha256 = :sha256"), {"sha256": sha256})
    move(before, now)
    if not same:
        flip_last_byte(now / "model.safetensors")

    moved = adopt(models)["now"]

    recognized = same if digests != "none" else move is copy_with_times
    assert moved.status == ("moved" if recognized else "adopted")
    assert moved.verified == (recognized and digests != "none")
    assert known() == {path_uri(now)} | (set() if recognized else {path_uri(before)})


def test_the_next_step_of_a_training_is_not_the_last_one_moved(models: Path) -> None:
    last = make(models / "checkpoint-100")
    adopt(models)
    stat = (last / "model.safetensors").stat()
    shutil.rmtree(last)
    step = make(models / "checkpoint-200") / "model.safetensors"
    os.utime(step, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    assert adopt(models)["checkpoint-200"].status == "adopted"


def test_another_header_is_another_checkpoint(models: Path) -> None:
    before, now = make(models / "before"), models / "now"
    lading.index_checkpoint(before)  # this records the digest of the header
    copy_with_times(before, now)
    file = now / "model.safetensors"
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b'"format":"pt"', b'"format":"tf"'))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert adopt(models)["now"].status == "adopted"


@pytest.mark.slow
def test_one_file_may_have_another_name(models: Path) -> None:
    torch.save(tensors(), models / "best.pt")
    adopt(models)
    (models / "runs").mkdir()
    (models / "best.pt").rename(models / "runs" / "qwen-run7.pt")

    moved = adopt(models)["qwen-run7.pt"]

    assert (moved.status, moved.moved_from) == ("moved", models / "best.pt")
    add_cards(models.parent, mine=str(models / "runs" / "qwen-run7.pt"))
    lading.load_model("mine", device="cpu", dtype="auto", progress=False)
    assert known() == {path_uri(models / "runs" / "qwen-run7.pt")}


@pytest.mark.slow
def test_of_two_copies_one_is_the_moved_one(models: Path) -> None:
    before = make(models / "before")
    adopt(models)
    shutil.copytree(before, models / "one")
    copy_with_times(before, models / "two")

    assert {name: each.status for name, each in adopt(models).items()} == {"one": "moved", "two": "adopted"}


def test_a_copy_beside_the_original_did_not_move(models: Path) -> None:
    before = make(models / "before")
    adopt(models)
    shutil.copytree(before, models / "copy")

    assert {name: each.status for name, each in adopt(models).items()} == {"before": "known", "copy": "adopted"}


def test_what_another_machine_has_did_not_move(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = make(models / "before")
    real = filesystem._machine_id
    monkeypatch.setattr(filesystem, "_machine_id", lambda: "0" * 32)
    adopt(models)
    monkeypatch.setattr(filesystem, "_machine_id", real)
    before.rename(models / "now")

    assert adopt(models)["now"].status == "adopted"
    assert known() == {path_uri(models / "before"), path_uri(models / "now")}


def test_a_card_that_states_the_earlier_path_keeps_its_records(cli: Cli, models: Path, tmp_path: Path) -> None:
    before, now = make(models / "it's before"), models / "now"
    add_cards(tmp_path, mine=f'"{before}"')
    lading.load_model("mine", device="cpu", progress=False)
    before.rename(now)

    (found,) = lading.adopt_checkpoints(models, dry_run=True)
    assert (found.status, found.cards) == ("adopted", ())
    assert (found.moved_from, found.left_behind) == (before, ("mine",))
    said = cli("adopt", models).stderr
    quoted = str(before).replace("'", "'\"'\"'")
    assert f"the path that mine still states. Run `lading relocate '{quoted}' {now}` to change it" in said
    assert known() == {path_uri(before), path_uri(now)}
    assert lading.get_asset_store().models("mine")[0].status == "broken"


def test_a_move_takes_the_place_of_what_was_recorded_at_the_new_path(models: Path, tmp_path: Path) -> None:
    before, now = make(models / "before"), models / "now"
    adopt(models)
    lading.verify_model(before, progress=False)
    before.rename(now)
    store = lading.get_asset_store()
    here = LocalCheckpointFiles.read(now, cache=tmp_path / "cache")
    move = MoveFinder(store).find(here)
    assert move is not None
    add_cards(tmp_path, mine=str(now))
    lading.index_checkpoint("mine")
    assert known() == {path_uri(before), path_uri(now)}

    record_checkpoint(store.database, move.contents(here.manifest))

    assert known() == {path_uri(now)}
    assert lading.get_asset_store().models("mine")[0].checkpoint == path_uri(now)
    assert len(lading.query("SELECT * FROM card_checkpoints").rows) == 1
    assert store.tensor_digests(path_uri(now))
