"""What is on this machine already, found and taken into the catalog where it lies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import lading
from lading.catalog.checkpoints.record import record_files
from lading.catalog.records import LocalCopy
from lading.checkpoints.locate import local_paths
from lading.errors import (
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    DigestMismatchError,
    NotSupportedError,
    PolicyError,
)
from lading.system import filesystem
from lading.system.filesystem import FileStat
from lading.system.uris import path_uri
from tests.helpers.cached_repository import add_cards, add_snapshot, tree
from tests.helpers.make_checkpoint import make


@pytest.fixture(autouse=True)
def _offline(catalog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LADING_OFFLINE", "1")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make(tmp_path / "made" / "Tiny")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make(tmp_path / "made" / "Sharded", shards=3)


def loads(name: str) -> None:
    model = lading.load_model(name, device="cpu", dtype="auto", progress=False)
    assert sum(p.numel() for p in model.parameters()) == 21_824


def copies(uri: str) -> list[tuple[str, str, bool]]:
    """Return the copies of files with weights; the config.json that a load read is known by its path."""
    stored = lading.get_asset_store().checkpoint(uri)
    assert stored is not None
    weights = [copy for copy in stored.copies if copy.file != str(copy.path)]
    return [(copy.file, copy.kind, copy.verified_at is not None) for copy in weights]


# --- the cache of Hugging Face's libraries ---------------------------------------------------------------------------


def test_a_repository_in_the_cache_is_loaded_without_a_network(tmp_path: Path, cache: Path, tiny: Path) -> None:
    snapshot = add_snapshot(cache, "Qwen/Tiny", tiny)
    add_cards(tmp_path, tiny="hg://qwen/TINY", other="hf://Qwen/Tiny@main", unrelated="hg://Qwen/Tiny2")
    before = tree(cache)

    found = {adoption.checkpoint: adoption for adoption in lading.adopt_checkpoints()}

    assert found.keys() == {"hg://qwen/TINY", "hf://Qwen/Tiny@main"}
    adoption = found["hg://qwen/TINY"]
    assert (adoption.path, adoption.status, adoption.cards) == (snapshot, "adopted", ("tiny",))
    assert (adoption.revision, adoption.verified) == (snapshot.name, False)
    assert adoption.bytes == (tiny / "model.safetensors").stat().st_size
    assert copies("hg://qwen/TINY") == [("model.safetensors", "adopted", False)]
    summary = {model.name: model for model in lading.get_asset_store().models("*")}
    assert [summary[name].status for name in ("tiny", "other", "unrelated")] == ["ready", "ready", "remote"]
    for name in ("tiny", "other"):
        loads(name)
    assert copies("hg://qwen/TINY") == [("model.safetensors", "adopted", True)], "the first load verified it"
    assert tree(cache) == before


def test_it_is_the_same_the_second_time(tmp_path: Path, cache: Path, tiny: Path, sharded: Path) -> None:
    add_snapshot(cache, "Qwen/Tiny", tiny)
    add_snapshot(cache, "Qwen/Sharded", sharded)
    folder = shutil.copytree(sharded, tmp_path / "models" / "Mine")
    add_cards(tmp_path, tiny="hg://qwen/tiny")
    for paths in ((), (folder,)):
        first = lading.adopt_checkpoints(*paths)
        rows = lading.query("select checkpoint_id, file, path, kind, recorded_at from copies order by 1, 2").rows

        second = lading.adopt_checkpoints(*paths)

        assert {each.status for each in first} == {"adopted"}
        assert {each.status for each in second} == {"known"}
        assert [(a.path, a.checkpoint, a.cards, a.overlays) for a in first] == [
            (b.path, b.checkpoint, b.cards, b.overlays) for b in second
        ]
        assert (
            lading.query("select checkpoint_id, file, path, kind, recorded_at from copies order by 1, 2").rows == rows
        )


def test_several_shards_and_a_checkpoint_inside(tmp_path: Path, cache: Path, tiny: Path, sharded: Path) -> None:
    files = {f"deep/er/{p.name}": p.read_bytes() for p in sharded.iterdir()} | {"model.safetensors": b"no such thing"}
    snapshot = add_snapshot(cache, "Qwen/Nested", files)
    add_cards(tmp_path, tiny="hg://Qwen/Nested\ncheckpoint_path: deep/er", same="hg://Qwen/Nested/deep/er")

    (adoption,) = lading.adopt_checkpoints()

    assert (adoption.path, adoption.cards) == (snapshot / "deep" / "er", ("same", "tiny"))
    assert len(copies("hg://Qwen/Nested/deep/er")) == 4
    for name in ("tiny", "same"):
        loads(name)
        assert local_paths(lading.get_asset_store().retrieve_card(name), lading.get_asset_store()) == [adoption.path]


def test_a_copy_on_a_file_system_that_is_gone(
    tmp_path: Path, cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_snapshot(cache, "Qwen/Tiny", tiny)
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    loads("tiny")
    real = filesystem._mount
    shared = shutil.copytree(tiny, tmp_path / "shared") / "model.safetensors"
    monkeypatch.setattr(
        filesystem, "_mount", lambda path: ("nfs4", "far:/shared") if path == shared.parent else real(path)
    )
    copy = LocalCopy(file=shared.name, path=shared, stat=FileStat.from_stat(shared.stat()), kind="adopted")
    record_files(lading.get_asset_store().database, uri="hg://Qwen/Tiny", copies=[copy])
    assert len(copies("hg://Qwen/Tiny")) == 2
    shared.unlink()
    checks = lading.query("SELECT * FROM verifications").rows

    loads("tiny")

    assert lading.query("SELECT * FROM verifications").rows == checks, "the file that is here was hashed again"
    assert lading.verify_model("tiny", progress=False).good


def test_revisions_are_respected(tmp_path: Path, cache: Path, tiny: Path, sharded: Path) -> None:
    main = add_snapshot(cache, "Qwen/Tiny", tiny)
    other = add_snapshot(cache, "Qwen/Tiny", sharded, ref="v2")
    add_cards(
        tmp_path, tiny="hg://Qwen/Tiny", v2="hg://Qwen/Tiny@v2", commit=f"hg://Qwen/Tiny@{other.name}",
        v3="hg://Qwen/Tiny@v3",
    )  # fmt: skip

    found = {cards: each for each in lading.adopt_checkpoints() for cards in each.cards}

    assert {name: each.revision for name, each in found.items()} == {
        "tiny": main.name, "v2": other.name, "commit": other.name,
    }  # fmt: skip


@pytest.mark.slow
def test_what_the_catalog_has_pinned_is_not_replaced(tmp_path: Path, cache: Path, tiny: Path, sharded: Path) -> None:
    old = add_snapshot(cache, "Qwen/Tiny", tiny)
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    lading.adopt_checkpoints()

    new = add_snapshot(cache, "Qwen/Tiny", sharded)
    (adoption,) = lading.adopt_checkpoints()
    assert (adoption.status, adoption.revision) == ("known", old.name)

    shutil.rmtree(old)
    (adoption,) = lading.adopt_checkpoints()
    assert adoption.status == "failed"
    assert isinstance(adoption.error, CheckpointNotFoundError)
    assert old.name in str(adoption.problem)
    assert "`lading index tiny`" in str(adoption.problem)

    lading.index_checkpoint("tiny")
    (adoption,) = lading.adopt_checkpoints()
    assert (adoption.status, adoption.revision) == ("adopted", new.name)
    loads("tiny")


def test_a_blob_that_is_not_what_its_name_says_is_not_loaded(tmp_path: Path, cache: Path, tiny: Path) -> None:
    snapshot = add_snapshot(cache, "Qwen/Tiny", tiny)
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")

    (adoption,) = lading.adopt_checkpoints()

    assert (adoption.status, adoption.verified) == ("adopted", False)
    with pytest.raises(DigestMismatchError):
        loads("tiny")


def test_who_was_given_a_gated_model_need_not_ask(tmp_path: Path, cache: Path, tiny: Path) -> None:
    add_cards(tmp_path, tiny="hg://Qwen/Tiny;gated=true")
    with pytest.raises(lading.ModelGatedError):
        loads("tiny")

    add_snapshot(cache, "Qwen/Tiny", tiny)
    lading.adopt_checkpoints()

    loads("tiny")


def test_a_repository_of_no_card_is_known_by_its_id(tmp_path: Path, cache: Path, tiny: Path) -> None:
    add_snapshot(cache, "Qwen/Tiny", tiny)

    (adoption,) = lading.adopt_checkpoints()
    assert (adoption.status, adoption.checkpoint, adoption.cards) == ("adopted", "hg://Qwen/Tiny", ())

    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    loads("tiny")


def test_blobs_that_repositories_share(tmp_path: Path, cache: Path, tiny: Path) -> None:
    snapshot = add_snapshot(cache, "Qwen/Tiny", tiny)
    blob = (snapshot / "model.safetensors").resolve()
    store = cache / "blobs" / "ab" / "abcd"
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(os.path.relpath(store, blob.parent))
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")

    (adoption,) = lading.adopt_checkpoints()

    assert adoption.status == "adopted"
    loads("tiny")


def test_junk_in_the_cache_is_listed_with_what_is_wrong(tmp_path: Path, cache: Path, tiny: Path, sharded: Path) -> None:
    add_snapshot(cache, "good/Tiny", tiny)
    (add_snapshot(cache, "bad/missing", sharded) / "model-00002-of-00003.safetensors").resolve().unlink()
    add_snapshot(cache, "bad/format", {"pytorch_model.bin": b"x"})
    add_snapshot(cache, "bad/header", {"model.safetensors": b"x" * 100})
    quantized = make(tmp_path / "made" / "quantized", quantization_config={"quant_method": "gptq"})
    add_snapshot(cache, "bad/quantized", quantized)
    (cache / "models--bad--empty" / "snapshots").mkdir(parents=True)
    leaving = add_snapshot(cache, "bad/leaving", tiny) / "model.safetensors"
    leaving.unlink()
    leaving.symlink_to(tiny / "model.safetensors")
    (cache / "models--..--etc").mkdir()
    (cache / "datasets--a--b").mkdir()
    (cache / "models--a--link").symlink_to(cache / "models--good--Tiny")

    found = {
        each.path.relative_to(cache).parts[0].removeprefix("models--"): each for each in lading.adopt_checkpoints()
    }

    assert found.pop("good--Tiny").status == "adopted"
    quantized = found.pop("bad--quantized")
    assert (quantized.status, quantized.kind, quantized.error) == ("unloadable", "quantized (gptq)", None)
    assert {name: type(each.error) for name, each in found.items()} == {
        "bad--missing": CorruptModelCheckpointError,
        "bad--format": CorruptModelCheckpointError,
        "bad--header": CorruptModelCheckpointError,
        "bad--empty": CheckpointNotFoundError,
        "bad--leaving": PolicyError,
    }
    assert all(each.problem for each in found.values())


# --- folders ---------------------------------------------------------------------------------------------------------


def known_elsewhere(folder: Path, cache: Path, files: Path) -> None:
    """A card of whose checkpoint the catalog knows the digests, and which is not on this machine."""
    add_cards(folder, tiny="hg://Qwen/Tiny")
    snapshot = add_snapshot(cache, "Qwen/Tiny", files)
    lading.index_checkpoint("tiny")
    shutil.rmtree(snapshot.parents[1])


def flip_last_byte(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return bytes(data)


@pytest.mark.few(1)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_with_the_bytes_of_a_card(tmp_path: Path, cache: Path, shards: int) -> None:
    folder = make(tmp_path / "models" / "a" / "b" / "renamed", shards=shards)
    known_elsewhere(tmp_path, cache, folder)

    (adoption,) = lading.adopt_checkpoints(tmp_path / "models")

    assert (adoption.path, adoption.status, adoption.cards) == (folder, "adopted", ("tiny",))
    assert adoption.checkpoint == "hg://Qwen/Tiny"
    assert adoption.verified
    assert copies("hg://Qwen/Tiny")[-1][1:] == ("adopted", True)
    loads("tiny")
    (again,) = lading.adopt_checkpoints(tmp_path / "models")
    assert (again.status, again.verified, again.cards) == ("known", True, ("tiny",))


def test_a_folder_with_the_names_but_not_the_bytes_of_a_card(tmp_path: Path, cache: Path, tiny: Path) -> None:
    known_elsewhere(tmp_path, cache, tiny)
    folder = shutil.copytree(tiny, tmp_path / "models" / "tiny")
    data = flip_last_byte(folder / "model.safetensors")

    for status in ("adopted", "known"):
        (adoption,) = lading.adopt_checkpoints(tmp_path / "models")

        assert (adoption.status, adoption.cards) == (status, ())
        assert adoption.checkpoint == path_uri(folder)
        assert adoption.overlays == (f"name: tiny@user\ncheckpoint: {folder}\n",)
    assert lading.get_asset_store().models("tiny")[0].status == "remote"
    shards = lading.query("select sha256 from shards").rows
    assert (hashlib.sha256(data).hexdigest(),) in [tuple(row) for row in shards], "it is not hashed another time"


def test_a_folder_that_was_hashed_is_not_loaded_with_other_bytes(tmp_path: Path, cache: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "models" / "tiny")
    flip_last_byte(tiny / "model.safetensors")
    known_elsewhere(tmp_path, cache, tiny)  # so that the folder is hashed
    lading.adopt_checkpoints(tmp_path / "models")
    add_cards(tmp_path, mine=str(folder))
    flip_last_byte(folder / "model.safetensors")

    with pytest.raises(DigestMismatchError):
        loads("mine")

    flip_last_byte(folder / "model.safetensors")
    loads("mine")


@pytest.mark.slow
def test_a_folder_that_had_the_bytes_of_a_card_before(tmp_path: Path, cache: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "models" / "tiny")
    flip_last_byte(tiny / "model.safetensors")
    known_elsewhere(tmp_path, cache, tiny)  # so that the folder is hashed
    lading.adopt_checkpoints(tmp_path / "models")
    snapshot = add_snapshot(cache, "Qwen/Later", folder)
    add_cards(tmp_path, tiny="hg://Qwen/Tiny", later="hg://Qwen/Later", mine=str(folder))
    lading.index_checkpoint("later")
    shutil.rmtree(snapshot.parents[1])
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1] + b"?")
    with pytest.raises(DigestMismatchError):
        loads("mine")

    (adoption,) = lading.adopt_checkpoints(tmp_path / "models")

    assert adoption.cards == ("mine",)
    assert lading.get_asset_store().models("later")[0].status == "remote"


@pytest.mark.slow
def test_the_suggested_overlay_works(tmp_path: Path, cache: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "it's: my #models" / "tiny")
    add_cards(tmp_path, tiny="hg://Qwen/Tiny")
    (adoption,) = lading.adopt_checkpoints(folder)
    (overlay,) = adoption.overlays

    path = tmp_path / "overlay.yaml"
    path.write_text(overlay)
    lading.import_cards(path)

    loads("tiny")
    (adoption,) = lading.adopt_checkpoints(folder)
    assert (adoption.status, adoption.cards, adoption.overlays) == ("known", ("tiny",), ())


@pytest.mark.slow
def test_a_cache_in_another_place(tmp_path: Path, cache: Path, tiny: Path) -> None:
    snapshot = add_snapshot(tmp_path / "disk" / "hub", "Qwen/Tiny", tiny)
    add_cards(tmp_path, tiny="hg://qwen/tiny")

    for path in (tmp_path / "disk", snapshot, snapshot.parents[1]):
        (adoption,) = lading.adopt_checkpoints(path, dry_run=True)
        assert (adoption.path, adoption.status, adoption.cards) == (snapshot, "adopted", ("tiny",))
    assert lading.query("select * from copies").rows == []

    lading.adopt_checkpoints(tmp_path / "disk")
    loads("tiny")


def test_no_link_leads_out_of_a_folder(tmp_path: Path, cache: Path, tiny: Path) -> None:
    models = tmp_path / "models"
    elsewhere = make(tmp_path / "elsewhere")
    for name in ("file", "index", "config", "inside"):
        (models / name).mkdir(parents=True)
    (models / "folder").symlink_to(elsewhere)
    (models / "file" / "model.safetensors").symlink_to(elsewhere / "model.safetensors")
    (models / "index" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    )
    (models / "index" / "model-00001-of-00001.safetensors").symlink_to(elsewhere / "model.safetensors")
    shutil.copy(elsewhere / "model.safetensors", models / "config")
    (models / "config" / "config.json").symlink_to(elsewhere / "config.json")
    (models / "inside" / "model.safetensors").symlink_to("../config/model.safetensors")

    found = {each.path.name: each for each in lading.adopt_checkpoints(models)}

    assert {name: each.status for name, each in found.items()} == {
        "file": "failed", "index": "failed", "config": "failed", "inside": "adopted",
    }  # fmt: skip
    assert all(isinstance(each.error, PolicyError) for each in found.values() if each.status == "failed")


def test_links_to_files_right_in_the_folder_that_was_named(tmp_path: Path, cache: Path, tiny: Path) -> None:
    folder = tmp_path / "linked"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).symlink_to(tiny / name)

    (adoption,) = lading.adopt_checkpoints(folder)

    assert adoption.status == "adopted"


@pytest.mark.slow
def test_a_folder_is_one_checkpoint_by_every_spelling(
    tmp_path: Path, cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "models"
    shutil.copytree(tiny, models / "deep" / "tiny")
    (tmp_path / "link").symlink_to(models)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "deep").symlink_to(models / "deep")
    monkeypatch.chdir(models)
    spelled = [
        str(models), f"{models}/", f"{models}/.", f"{models}/deep/..", "deep/../../models/", ".", "./deep/tiny",
        tmp_path / "link", f"{tmp_path}/link/", tmp_path / "link" / "deep" / "tiny",
        f"{tmp_path}/elsewhere/deep/../deep/tiny", tmp_path / "elsewhere" / "deep",
    ]  # fmt: skip

    (first,) = lading.adopt_checkpoints(*spelled)
    assert (first.status, first.checkpoint) == ("adopted", f"file://{models}/deep/tiny")
    for path in spelled:
        assert [each.status for each in lading.adopt_checkpoints(path)] == ["known"], path
    for path in (f"{models}/deep/../deep/tiny/", f"{tmp_path}/elsewhere/deep/../deep/tiny"):
        assert lading.index_checkpoint(Path(path)).uri == first.checkpoint
    assert [tuple(row) for row in lading.query("select count(*) from checkpoints").rows] == [(1,)]


@pytest.mark.slow
def test_cards_that_name_a_folder_by_links_name_one_checkpoint(tmp_path: Path, cache: Path, tiny: Path) -> None:
    (tmp_path / "link").symlink_to(tiny.parent)
    (tmp_path / "direct").symlink_to(tiny)
    add_cards(
        tmp_path, a=f"{tmp_path}/link/Tiny", b=f"{tmp_path}/direct", c=f"{tmp_path}/made/../made/Tiny/.",
        d=f"{tmp_path}/link\ncheckpoint_path: Tiny",
    )  # fmt: skip

    (adoption,) = lading.adopt_checkpoints(tmp_path / "link")
    assert (adoption.status, adoption.cards) == ("adopted", ("a", "b", "c", "d"))
    for path in (tmp_path / "link", tmp_path / "direct", tiny):
        (again,) = lading.adopt_checkpoints(path)
        assert (again.status, again.path, again.cards) == ("known", tiny, adoption.cards)
    for name in adoption.cards:
        loads(name)
        assert lading.index_checkpoint(name).uri == path_uri(tiny)
    for path in (tmp_path / "direct", tmp_path / "link" / "Tiny"):
        assert lading.verify_model(path, progress=False).good
    assert [tuple(row) for row in lading.query("select uri from checkpoints").rows] == [(f"file://{tiny}",)]
    assert {each.path for each in lading.disk_usage().holdings} == {str(tiny / "model.safetensors")}


def test_a_link_that_leads_elsewhere_now_names_another_checkpoint(
    tmp_path: Path, cache: Path, tiny: Path, sharded: Path
) -> None:
    latest = tmp_path / "latest"
    latest.symlink_to(tiny)
    add_cards(tmp_path, mine=str(latest))
    loads("mine")

    latest.unlink()
    latest.symlink_to(sharded)

    loads("mine")
    assert {uri for (uri,) in lading.query("select uri from checkpoints").rows} == {path_uri(tiny), path_uri(sharded)}


def test_hostile_and_broken_folders(tmp_path: Path, cache: Path, tiny: Path) -> None:
    models = tmp_path / "models"
    for name in ("fifo", "circle", "adapter", "bin", "empty", "header"):
        (models / name).mkdir(parents=True)
    os.mkfifo(models / "fifo" / "model.safetensors")
    (models / "circle" / "model.safetensors").symlink_to("model.safetensors")
    (models / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    (models / "bin" / "pytorch_model.bin").write_bytes(b"x")
    (models / "header" / "model.safetensors").write_bytes(b"\xff" * 64)
    shutil.copytree(tiny, models / os.fsdecode(b"not \xff text"))
    shutil.copytree(tiny, models / "good")

    found = {each.path.name: each for each in lading.adopt_checkpoints(models)}

    assert found.pop("good").status == "adopted"
    assert {name: type(each.error) for name, each in found.items()} == {
        "fifo": CorruptModelCheckpointError,
        "circle": CorruptModelCheckpointError,
        "adapter": CheckpointNotFoundError,
        "bin": CorruptModelCheckpointError,
        "header": CorruptModelCheckpointError,
        os.fsdecode(b"not \xff text"): NotSupportedError,
    }


def test_paths_that_are_no_folders(tmp_path: Path, cache: Path, tiny: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        lading.adopt_checkpoints(tmp_path / "nowhere")
    with pytest.raises(NotSupportedError, match="is a file"):
        lading.adopt_checkpoints(tiny / "model.safetensors")
    assert lading.adopt_checkpoints(tmp_path / "made" / "Tiny" / ".") != ()
    assert lading.adopt_checkpoints() == ()


def test_the_file_of_a_card_stays_the_cards_own(tmp_path: Path, cache: Path, tiny: Path) -> None:
    add_cards(tmp_path, tiny=str(tiny))

    (adoption,) = lading.adopt_checkpoints(tiny)

    assert (adoption.status, adoption.cards) == ("adopted", ("tiny",))
    assert copies(path_uri(tiny)) == [("model.safetensors", "source", False)]


def test_what_is_advised_of_a_folder_of_single_files_can_be_done(cli: Callable[..., Result], tmp_path: Path) -> None:
    folder = make(tmp_path / "many")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    advised = cli("adopt", folder, code=2).stderr
    assert "found 'first.safetensors'. Give one of these to `lading index` by its path, or name it as" in advised
    cli("index", folder / "first.safetensors")
