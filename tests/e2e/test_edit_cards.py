"""Cards that are removed, renamed and told that their checkpoints moved; no weights are touched."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import lading
from lading.errors import (
    AssetCardError,
    AssetNotFoundError,
    CheckpointNotFoundError,
    ModelCheckpointMismatchError,
    PolicyError,
)
from lading.system.uris import path_uri
from tests.helpers.cached_repository import tree
from tests.helpers.make_checkpoint import make


@pytest.fixture
def models(catalog: Path, tmp_path: Path) -> Path:
    """A folder with two checkpoints that have cards; a file of cards based on one of them is imported."""
    folder = tmp_path / "models"
    for name in ("a", "b"):
        make(folder / name, shards=1 if name == "a" else 2)
    lading.add_checkpoints(folder)
    return folder


def imported(folder: Path, text: str, name: str = "cards.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    lading.import_cards(path, replace=True)
    return path


def watched(home: Path, text: str) -> Path:
    path = home / "config" / "lading" / "cards" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    lading.catalog.store._store.cache_clear()  # type: ignore[attr-defined]
    return path


def names() -> set[str]:
    return {name for name in lading.get_asset_store().asset_names if not name.startswith(("qwen", "llama", "hg_"))}


def fields(name: str) -> dict[str, object]:
    return dict(lading.get_asset_store().retrieve_card(name).metadata)


def sound(cli: Callable[..., Result]) -> None:
    assert cli("db", "check").stdout == "ok\n"


# --- remove -----------------------------------------------------------------------------------------------------------


def test_a_card_is_removed_and_its_weights_stay(models: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    imported(tmp_path, "name: a@lab\nlicense: mit\n---\nname: a@user\nowner: me\n")
    before = tree(models)

    dry = lading.remove_cards("a", dry_run=True)
    assert "a" in names()
    removed = lading.remove_cards("a")

    assert dry == removed
    assert [(change.card, change.field, change.after) for change in removed] == [
        ("a", "name", None), ("a@lab", "name", None), ("a@user", "name", None),
    ]  # fmt: skip
    assert "a" not in names()
    assert not lading.query("select * from cards where name = 'a'").rows
    assert tree(models) == before
    assert lading.get_asset_store().checkpoint(path_uri(models / "a")) is not None
    assert {each.name: each.status for each in lading.add_checkpoints(models)} == {"a": "added", "b": "unchanged"}
    sound(cli)


def test_several_cards_are_removed_as_models_are(models: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    imported(tmp_path, "name: run-1\nmodel_family: qwen\n---\nname: run-2\nbase: run-1\n---\nname: run-1@lab\n")

    for words in (("a", "b"), ("run-*",), ("run-[12]", "a")):
        refused = cli("remove-card", *words, code=7)
        assert refused.stdout == ""
        assert "stdin is not a terminal. Nothing was removed. Add `--yes`" in refused.stderr
    assert refused.stderr.splitlines()[:-1] == ["lading: run-1", "lading: run-1@lab", "lading: run-2", "lading: a"]
    assert "nothing was removed" in cli("remove-card", "a", "none-*", "--yes", code=2).stderr
    assert {"a", "b", "run-1", "run-2"} <= names()
    assert cli("remove-card", "run-*", "--dry-run", "-q").stdout == "run-1\nrun-1@lab\nrun-2\n"
    assert "3 cards removed" in cli("remove-card", "run-*", "--yes").stderr
    assert "1 card removed" in cli("remove-card", "a").stderr
    assert not {"a", "run-1", "run-2"} & names()


def test_one_overlay_is_removed(models: Path, tmp_path: Path) -> None:
    imported(tmp_path, "name: a@user\nlicense: mit\n")
    lading.remove_cards("a@user")
    assert "a" in names()
    assert "license" not in fields("a")


def test_a_card_that_others_need_is_not_removed(models: Path, tmp_path: Path) -> None:
    imported(tmp_path, "name: child\nbase: a\n---\nname: other\ntokenizer_ref: b\n---\nname: a_text\nnote: '\"a\"'\n")
    with pytest.raises(PolicyError, match="child"):
        lading.remove_cards("a")
    with pytest.raises(PolicyError, match="other"):
        lading.remove_cards("b", "a", "child")
    assert {"a", "b", "child"} <= names()
    lading.remove_cards("a", "child")
    assert not {"a", "child"} & names()


def test_cards_that_come_back_by_themselves_are_not_changed(models: Path, home: Path) -> None:
    path = watched(home, f"name: mine\ncheckpoint: {models}/a\nmodel_family: qwen\n---\nname: b@user\nlicense: mit\n")
    for change in (
        lambda: lading.remove_cards("mine"),
        lambda: lading.remove_cards("b"),
        lambda: lading.rename_card("mine", "yours"),
        lambda: lading.rename_card("b", "c"),
        lambda: lading.relocate_checkpoints(models / "a", models / "b"),
    ):
        with pytest.raises((PolicyError, ModelCheckpointMismatchError), match=r"mine\.yaml|other"):
            change()
    with pytest.raises(PolicyError, match=str(path)):
        lading.remove_cards("a", "mine")
    with pytest.raises(PolicyError, match=r"qwen\.yaml.*overlay"):
        lading.remove_cards("qwen3_0.6b")
    assert {"a", "b", "mine"} <= names()


def test_a_card_of_a_package_that_was_hidden_comes_back(models: Path, tmp_path: Path) -> None:
    imported(tmp_path, f"name: qwen3_0.6b\nmodel_family: qwen\ncheckpoint: {models}/a\n")
    assert lading.get_asset_store().models("qwen3_0.6b")[0].status == "ready"

    lading.remove_cards("qwen3_0.6b")

    lading.catalog.store._store.cache_clear()  # type: ignore[attr-defined]
    assert lading.get_asset_store().models("qwen3_0.6b")[0].status == "remote"


# --- rename -----------------------------------------------------------------------------------------------------------


def test_a_card_gets_another_name_wherever_it_is_named(
    models: Path, cli: Callable[..., Result], tmp_path: Path
) -> None:
    imported(
        tmp_path,
        "name: child\nbase: a\n---\nname: grandchild\nbase: child\n---\nname: a@user\nlicense: mit\n---\n"
        "name: other\nmodel_family: qwen\ntokenizer_ref: a\nnote: a\n",
    )
    before = lading.query("select checkpoint_id from card_checkpoints c join cards on id = card_id where name = 'a'")

    dry = lading.rename_card("a", "ä new/name", dry_run=True)
    assert "a" in names()
    changes = lading.rename_card("a", "ä new/name")

    assert dry == changes
    assert {(change.card, change.field, change.after) for change in changes} == {
        ("a", "name", "ä new/name"), ("a@user", "name", "ä new/name@user"), ("child", "base", "ä new/name"),
        ("other", "tokenizer_ref", "ä new/name"),
    }  # fmt: skip
    assert "a" not in names()
    assert fields("ä new/name")["license"] == "mit"
    assert fields("other")["note"] == "a"
    card = lading.get_asset_store().retrieve_card("grandchild")
    assert [each.name for each in card.chain()] == ["grandchild", "child", "ä new/name"]
    after = "select checkpoint_id from card_checkpoints c join cards on id = card_id where name = 'ä new/name'"
    assert lading.query(after).rows == before.rows
    assert lading.get_asset_store().models("ä*", search="new name")[0].status == "ready"
    sound(cli)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("a", "b", AssetCardError),
        ("a", "a", AssetCardError),
        ("a", "qwen3_0.6b", AssetCardError),
        ("a", "", AssetCardError),
        ("a", "x" * 201, AssetCardError),
        ("a", "x\ny", AssetCardError),
        ("a", "x@user", AssetCardError),
        ("a", "./x", AssetCardError),
        ("a", "hg://org/x", AssetCardError),
        ("a@user", "x", AssetCardError),
        ("unknown", "x", AssetNotFoundError),
        ("", "x", AssetNotFoundError),
    ],
)
def test_names_that_are_not_free(models: Path, old: str, new: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        lading.rename_card(old, new)
    assert len(raised.value.message.splitlines()) == 1
    assert {"a", "b"} <= names()


def test_a_card_that_a_file_bases_on_it_keeps_its_name(models: Path, home: Path) -> None:
    watched(home, "name: child\nbase: a\n")
    with pytest.raises(PolicyError, match=r"child.*mine\.yaml"):
        lading.rename_card("a", "x")
    assert "a" in names()


# --- relocate ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_checkpoints_is_elsewhere_now(models: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    imported(
        models, f"name: near\nmodel_family: qwen\ncheckpoint: ./a\ntokenizer: ./b\n---\nname: b@user\n"
        f"checkpoint: {models}/b\n---\nname: apart\nmodel_family: qwen\ncheckpoint: {models}2/a\n",
    )  # fmt: skip
    lading.verify_model("a", progress=False)
    moved = tmp_path / "new place"
    models.rename(moved)

    dry = lading.relocate_checkpoints(models, moved, dry_run=True)
    assert fields("a")["checkpoint"] == str(models / "a")
    changes = lading.relocate_checkpoints(models, moved)

    assert dry == changes
    assert {(change.card, change.field, change.after) for change in changes} == {
        ("a", "checkpoint", str(moved / "a")), ("b", "checkpoint", str(moved / "b")),
        ("near", "checkpoint", str(moved / "a")), ("near", "tokenizer", str(moved / "b")),
        ("b@user", "checkpoint", str(moved / "b")),
    }  # fmt: skip
    assert {uri for (uri,) in lading.query("select uri from checkpoints").rows} == {
        path_uri(moved / "a"), path_uri(moved / "b")
    }  # fmt: skip
    for name in ("a", "b", "near"):
        assert lading.get_asset_store().models(name)[0].status == "ready"
    assert lading.get_asset_store().tensor_digests(path_uri(moved / "a"))
    assert lading.verify_model("a", progress=False).good
    assert {each.status for each in lading.add_checkpoints(moved)} == {"unchanged"}
    sound(cli)


def test_only_the_same_checkpoint_takes_the_place(models: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        lading.relocate_checkpoints(models / "a", tmp_path / "nowhere")
    make(tmp_path / "other" / "a")
    with pytest.raises(CheckpointNotFoundError):
        lading.relocate_checkpoints(models, tmp_path / "other")
    with pytest.raises(ModelCheckpointMismatchError, match="lading add"):
        lading.relocate_checkpoints(models / "a", models / "b")
    assert fields("a")["checkpoint"] == str(models / "a")
    with pytest.raises(CheckpointNotFoundError, match="unknown"):
        lading.relocate_checkpoints(tmp_path / "unknown", tmp_path / "other")
    assert lading.relocate_checkpoints(models, models) == ()


def test_a_checkpoint_that_no_digest_can_tell_from_another(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sibling = shutil.copytree(models / "a", models / "a2")
    lading.add_checkpoints(sibling)
    os.utime(sibling / "model.safetensors", (1, 1))
    with pytest.raises(ModelCheckpointMismatchError, match=r"both are still there.*no digests to compare"):
        lading.relocate_checkpoints(models / "a", sibling)
    assert fields("a")["checkpoint"] == str(models / "a")

    shutil.move(models / "a", tmp_path / "a")
    lading.relocate_checkpoints(models / "a", tmp_path / "a")
    assert not caplog.messages, "the times are the same"
    shutil.copytree(tmp_path / "a", tmp_path / "copied", copy_function=shutil.copyfile)
    lading.relocate_checkpoints(tmp_path / "a", tmp_path / "copied")
    assert "compared only the names, dtypes and shapes of the tensors" in caplog.text
    caplog.clear()
    lading.verify_model("a", progress=False)
    shutil.copytree(tmp_path / "copied", tmp_path / "again", copy_function=shutil.copyfile)
    lading.relocate_checkpoints(tmp_path / "copied", tmp_path / "again")
    assert not caplog.messages, "the next load verifies it"


def test_a_link_at_the_old_place(models: Path, tmp_path: Path) -> None:
    shutil.move(models / "a", tmp_path / "a")
    (models / "a").symlink_to(tmp_path / "a")

    changes = lading.relocate_checkpoints(models / "a", tmp_path / "a")

    assert [change.after for change in changes] == [str(tmp_path / "a")]


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands(models: Path, cli: Callable[..., Result], tmp_path: Path) -> None:
    path = imported(tmp_path, f"name: imported\nmodel_family: qwen\ncheckpoint: {models}/a\n")

    result = cli("rename", "imported", "x", "--dry-run")
    assert "imported  name" in result.stdout
    assert f"{path} states it as it was" in result.stderr
    assert "1 card changed (dry run" in result.stderr
    assert json.loads(cli("rename", "a", "x", "--json").stdout) == [
        {"card": "a", "field": "name", "before": "a", "after": "x"}
    ]
    assert "Did you mean" in cli("remove-card", "importe", code=2).stderr
    assert "qwen.yaml" in cli("remove-card", "qwen3_0.6b", code=7).stderr
    assert cli("remove-card", "x", "imported", "--yes", "-q").stdout == "x\nimported\n"
    shutil.move(models / "b", tmp_path / "moved b")
    assert "1 card changed" in cli("relocate", models / "b", tmp_path / "moved b").stderr
    cli("rename", "b", "qwen3_0.6b", code=3)
    cli("relocate", models / "b", tmp_path / "nowhere", code=2)
