"""Checkpoints on a disk that become cards of the catalog, by one command."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import lading
from lading.errors import (
    AddressError,
    AssetNotFoundError,
    CardFileError,
    CatalogError,
    CheckpointNotFoundError,
    CorruptModelCheckpointError,
    FetchError,
    NotSupportedError,
    PolicyError,
)
from lading.system.uris import path_uri
from tests.helpers.cached_repository import add_cards, add_snapshot
from tests.helpers.catalog_tools import nobody, public_folder
from tests.helpers.make_adapter import Q_PROJ, factors, write_adapter
from tests.helpers.make_checkpoint import make, tensors

README = """\
---
license: apache-2.0
base_model:
- Qwen/Qwen3-0.6B
pipeline_tag: text-generation
---
# A model
"""

ARCHITECTURE = """\
architecture: tiny_qwen
family: qwen
config: {model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2, num_attn_heads: 4,
  num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true, ffn_inner_dim: 64}
"""


@pytest.fixture(autouse=True)
def _catalog(catalog: Path, cache: Path) -> None:
    pass


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a checkpoint that is described in full."""
    make(tmp_path / "models" / "Tiny")
    (tmp_path / "models" / "Tiny" / "README.md").write_text(README)
    return tmp_path / "models"


def add(*paths: Path | str, **options: object) -> dict[str | None, lading.AddedCard]:
    """The results by name; those without one are told apart by their place."""
    found = lading.add_checkpoints(*paths, progress=False, **options)  # type: ignore[arg-type]
    return {each.name or each.checkpoint: each for each in found}


def statuses(found: dict[str | None, lading.AddedCard]) -> dict[str | None, str]:
    return {name: each.status for name, each in found.items()}


def own_fields(name: str) -> dict[str, object]:
    return dict(lading.get_asset_store().retrieve_card(name).metadata)


def dump() -> str:
    """All rows of the catalog."""
    path = lading.get_asset_store().database.path
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as connection:
        return "\n".join(connection.iterdump())


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_gets_a_card(models: Path) -> None:
    (added,) = lading.add_checkpoints(models)

    assert (added.name, added.status, added.checkpoint) == ("Tiny", "added", str(models / "Tiny"))
    assert (added.family, added.arch, added.license) == ("qwen", None, "apache-2.0")
    assert (added.bytes, added.dtypes) == (43_648, "BF16")
    assert own_fields("Tiny") == {
        "model_family": "qwen",
        "checkpoint": str(models / "Tiny"),
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-0.6B",
        "pipeline_tag": "text-generation",
    }
    (summary,) = lading.get_asset_store().models("Tiny")
    assert (summary.status, summary.bytes, summary.source) == ("ready", 43_648, "added")
    (found,) = lading.get_asset_store().models(search="text generation tiny")
    assert found.name == "Tiny"


def test_an_architecture_of_these_numbers_is_stated(models: Path, tmp_path: Path) -> None:
    (tmp_path / "arch.yaml").write_text(ARCHITECTURE)
    lading.import_cards(tmp_path / "arch.yaml")
    make(models / "Longer", max_position_embeddings=256)

    found = add(models)

    assert {name: each.arch for name, each in found.items()} == {"Tiny": "tiny_qwen", "Longer": None}
    assert lading.check_model("Tiny").fits
    model = lading.load_model("Tiny", device="cpu", progress=False)
    assert sum(p.numel() for p in model.parameters()) == 21_824


def test_any_size_is_loaded_by_its_name(models: Path, cli: Callable[..., Result]) -> None:
    make(models / "Longer", max_position_embeddings=256)
    add(models)

    for name in ("Tiny", "Longer"):
        assert lading.check_model(name).fits
        model = lading.load_model(name, device="cpu", dtype="auto", progress=False)
        same = lading.load_model(models / name, device="cpu", dtype="auto", progress=False)
        assert type(model) is type(same)
        assert all(map(torch.equal, model.parameters(), same.parameters()))
    shown = json.loads(cli("show", "Longer", "--json").stdout)
    assert (shown["config"]["max_seq_len"], shown["config"]["model_dim"]) == (256, 32)
    assert shown["config_from"]["max_seq_len"] == {"kind": "file", "name": "config.json"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model_type": "of_tomorrow"},
        {"architectures": ["Qwen3ForSequenceClassification"], "hidden_act": "relu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    ],
)
def test_what_no_family_reads_is_a_model_of_transformers(tmp_path: Path, changes: dict[str, object]) -> None:
    make(tmp_path / "other", **changes)

    assert add(tmp_path / "other")["other"].family == "hg"


def test_given_fields_come_before_found_ones(models: Path) -> None:
    add(models, fields={"license": "mit", "owner": "me", "restrict": True})

    assert own_fields("Tiny") | {"license": "mit", "owner": "me", "restrict": True} == own_fields("Tiny")


def test_files_of_torch_have_cards_too(tmp_path: Path) -> None:
    folder = make(tmp_path / "run")
    (folder / "model.safetensors").unlink()
    torch.save(tensors(), folder / "best.pt")
    torch.save({name: tensor.t() for name, tensor in tensors().items() if tensor.ndim == 2}, folder / "strided.pth.tar")
    torch.save(tensors(), tmp_path / "alone.pt")

    found = add(tmp_path)
    assert statuses(found) == {"best": "added", "strided": "added", str(tmp_path / "alone.pt"): "skipped"}
    assert (found["best"].bytes, found["strided"].bytes) == (43_648, None), "only a rewrite tells"
    assert "--set model_family" in str(found[str(tmp_path / "alone.pt")].problem)

    assert statuses(add(tmp_path / "alone.pt", fields={"model_family": "qwen"})) == {"alone": "added"}
    assert lading.get_asset_store().checkpoint(path_uri(tmp_path / "alone.pt")) is not None


def test_repositories_of_the_hub_beside_folders(tmp_path: Path, cache: Path) -> None:
    folder = make(tmp_path / "Tiny-0.1")
    snapshot = add_snapshot(cache, "Org/Tiny-0.1", folder)

    found = add("hg://Org/Tiny-0.1", f"hg://Org/Tiny-0.1@{snapshot.name}", folder, name_from="path")
    assert sorted(each.status for each in found.values()) == ["added", "failed", "failed"]
    (tmp_path / "again").mkdir()
    found = add("hg://Org/Tiny-0.1", make(tmp_path / "again" / "Tiny-0.1", shards=2))
    assert statuses(found) == {"Org/Tiny-0.1": "added", "again/Tiny-0.1": "added"}
    assert statuses(add(f"hg://Org/Tiny-0.1@{snapshot.name}", name_from="pinned")) == {"pinned": "added"}
    assert own_fields("pinned")["checkpoint"] == f"hg://Org/Tiny-0.1@{snapshot.name}"


def test_a_repository_is_described_by_its_files(tmp_path: Path, cache: Path) -> None:
    folder = make(tmp_path / "Tiny")
    (folder / "README.md").write_text(README)
    snapshot = add_snapshot(cache, "Org/Tiny-0.1", folder)

    (added,) = lading.add_checkpoints("hg://Org/Tiny-0.1", name_from="path")

    assert (added.name, added.status, added.license, added.bytes) == ("Org/Tiny-0.1", "added", "apache-2.0", 43_648)
    assert own_fields("Org/Tiny-0.1")["checkpoint"] == "hg://Org/Tiny-0.1"
    stored = lading.get_asset_store().checkpoint("hg://Org/Tiny-0.1")
    assert stored is not None
    assert stored.revision == snapshot.name
    assert statuses(add("hg://Org/Tiny-0.1")) == {"Org/Tiny-0.1": "unchanged"}

    assert statuses(add("hg://Org/Unknown")) == {"hg://Org/Unknown": "failed"}
    with pytest.raises(AddressError):
        lading.add_checkpoints("hg://Org/Tiny/../x")


def test_a_cache_of_the_hub_holds_checkpoints(tmp_path: Path, cache: Path) -> None:
    folder = make(tmp_path / "Tiny")
    (folder / "README.md").write_text(README)
    add_snapshot(cache, "Org/Tiny", folder)
    snapshot = add_snapshot(cache, "Org/Other", make(tmp_path / "Other", shards=2))
    add_cards(tmp_path, known="hg://org/other")

    found = add(cache)

    assert statuses(found) == {"Tiny": "added", "known": "unchanged"}
    assert own_fields("Tiny")["checkpoint"] == "hg://Org/Tiny"
    assert own_fields("Tiny")["license"] == "apache-2.0"
    assert statuses(add(snapshot)) == {"known": "unchanged"}
    (tiny,) = lading.get_asset_store().models("Tiny")
    assert tiny.status == "ready", "the files of the cache are adopted"


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_folders_of_a_folder_and_deeper_ones_on_request(tmp_path: Path, models: Path) -> None:
    make(models / "Tiny" / "checkpoint-500")
    make(models / "run1" / "checkpoint-500")
    make(models / "run2" / "checkpoint-500", shards=2)
    (models / "link").symlink_to(models / "run1" / "checkpoint-500")

    assert statuses(add(models)) == {"Tiny": "added"}
    assert statuses(add(models / "Tiny")) == {"Tiny": "unchanged"}, "a checkpoint is not searched"
    assert statuses(add(models, recursive=True)) == {
        "Tiny": "unchanged",
        "Tiny/checkpoint-500": "added",
        "run1/checkpoint-500": "added",
        "run2/checkpoint-500": "added",
    }
    assert statuses(add(models / "link")) == {"run1/checkpoint-500": "unchanged"}, "a link is the folder it leads to"
    assert statuses(add(f"{models}/run1/../run1/checkpoint-500/.")) == {"run1/checkpoint-500": "unchanged"}
    assert statuses(add(models / "run2", models, recursive=True)).keys() == statuses(add(models, recursive=True)).keys()


def test_links_to_other_folders_are_named_not_followed(tmp_path: Path, models: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    make(links / "own")
    (links / "inside").symlink_to(links / "own")
    (links / "outside").symlink_to(models / "Tiny")
    (links / "no-model").symlink_to(tmp_path / "home")
    (links / "broken").symlink_to(tmp_path / "nowhere")
    (links / "loop").symlink_to(links / "loop")

    found = add(links)

    assert statuses(found) == {"own": "added", str(links / "outside"): "skipped"}
    assert str(models / "Tiny") in str(found[str(links / "outside")].problem)
    assert statuses(add(links / "outside")) == {"Tiny": "added"}
    assert statuses(add(links)) == {"own": "unchanged", str(links / "outside"): "skipped"}


def test_what_a_trainer_keeps_beside_checkpoints_is_none(models: Path) -> None:
    run = make(models / "run" / "checkpoint-5").parent
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_3.pth"):
        (run / name).write_bytes(b"x")
        (run / "checkpoint-5" / name).write_bytes(b"x")
    for name in ("random_states_0.pkl", "optimizer.bin", "optimizer_1.bin"):
        (models / name).write_bytes(b"x")

    assert statuses(add(models, recursive=True)) == {"Tiny": "added", "checkpoint-5": "added"}


def test_a_name_that_another_card_has(tmp_path: Path) -> None:
    make(tmp_path / "models" / "qwen3_0.6b")

    assert statuses(add(tmp_path / "models" / "qwen3_0.6b")) == {"models/qwen3_0.6b": "added"}
    for rule in ("path", "qwen3_0.6b"):
        make(tmp_path / "more" / "qwen3_0.6b")
        (failed,) = lading.add_checkpoints(tmp_path / "more", name_from=rule)
        assert (failed.name, failed.status) == (None, "failed")
        assert "'qwen3_0.6b'" in str(failed.problem)
        assert "--name-from" in str(failed.problem)


def test_rules_for_names(tmp_path: Path) -> None:
    for name in ("a/x", "b/x", "b/y"):
        make(tmp_path / name)

    assert statuses(add(tmp_path, recursive=True, name_from="{folder}")) == {
        str(tmp_path / "a" / "x"): "failed",
        str(tmp_path / "b" / "x"): "failed",
        "y": "added",
    }
    assert statuses(add(tmp_path, recursive=True, name_from="me/{parent}-{folder}")) == {
        "me/a-x": "added",
        "me/b-x": "added",
        "y": "unchanged",
    }
    with pytest.raises(ValueError, match="rule for names"):
        lading.add_checkpoints(tmp_path, name_from="{family}")


def test_odd_names(tmp_path: Path) -> None:
    odd = [
        " two  words",
        "ünï-çödé",
        "日本語",
        "--help",
        "semi;gated=true",
        "a@b",
        "line\nbreak",
        "x" * 201,
        "~",
        "50%",
    ]
    for name in odd:
        make(tmp_path / "models" / name)
    os.mkdir(os.fsencode(tmp_path / "models") + b"/\xff")
    shutil.copytree(tmp_path / "models" / "~", os.fsdecode(os.fsencode(tmp_path / "models") + b"/\xff/tiny"))

    found = add(tmp_path / "models", recursive=True)

    good = {name.strip() for name in odd[:4]} | {"50%"}
    assert {name for name, each in found.items() if each.status == "added"} == good
    for name in good:
        card = lading.get_asset_store().retrieve_card(name)
        assert Path(card.field("checkpoint").as_uri().removeprefix("file://")) in (tmp_path / "models").iterdir()
        assert lading.get_asset_store().models(name)[0].status == "ready"
    before = dump()
    assert {name for name, each in add(tmp_path / "models", recursive=True).items() if each.name} == good
    assert dump() == before
    assert statuses(add(tmp_path / "models" / "a@b", name_from="a-b")) == {"a-b": "added"}


# --- a second time ----------------------------------------------------------------------------------------------------


def test_the_second_time_writes_nothing(models: Path) -> None:
    make(models / "Other", shards=3)
    add(models)
    before = dump()

    assert set(statuses(add(models)).values()) == {"unchanged"}
    assert dump() == before


def test_a_card_is_kept_under_its_new_name(models: Path) -> None:
    add(models)
    lading.rename_card("Tiny", "mine")

    found = add(models, fields={"owner": "me"})

    assert statuses(found) == {"mine": "changed"}
    assert own_fields("mine")["owner"] == "me"
    assert own_fields("mine")["license"] == "apache-2.0"
    assert statuses(add(models, fields={"owner": "me"})) == {"mine": "unchanged"}


def test_another_rule_for_names_renames_no_card(models: Path) -> None:
    add(models)
    assert "`lading rename Tiny NEW`" in str(add(models, name_from="mine")["Tiny"].problem)
    for rule in ("folder", "path", "{folder}"):
        assert add(models, name_from=rule)["Tiny"].problem is None


def test_a_card_from_a_file_stays_as_it_is(models: Path, tmp_path: Path) -> None:
    add_cards(tmp_path, mine=str(models / "Tiny"))

    found = add(models, fields={"owner": "me"})

    assert statuses(found) == {"mine": "unchanged"}
    assert "cards.yaml" in str(found["mine"].problem)
    assert "owner" not in own_fields("mine")


def test_a_card_whose_base_is_gone_is_kept(models: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("name: recipe\nmodel_family: qwen\ntask: chat\n")
    lading.import_cards(tmp_path / "base.yaml")
    write_adapter(models / "lora", factors(Q_PROJ, 32, 32), base_model_name_or_path="Org/Unknown")
    assert statuses(add(models, fields={"base": "recipe"})) == {"Tiny": "added", "lora": "added"}
    (tmp_path / "base.yaml").write_text("name: other\n")
    lading.import_cards(tmp_path / "base.yaml")

    found = add(models)
    assert statuses(found) == {"Tiny": "unchanged", "lora": "unchanged"}
    for name in ("Tiny", "lora"):
        assert "'recipe', which is not in the catalog" in str(found[name].problem)

    models.rename(tmp_path / "moved")
    found = add(tmp_path / "moved", fields={"owner": "me"})
    assert statuses(found) == {"Tiny": "moved", "lora": "moved"}
    assert statuses(add(tmp_path / "moved", fields={"base": "qwen3_0.6b"})) == {"Tiny": "changed", "lora": "changed"}
    assert own_fields("Tiny") | {"base": "qwen3_0.6b", "owner": "me"} == own_fields("Tiny")
    shutil.rmtree(tmp_path / "moved" / "Tiny")
    assert statuses(add(tmp_path / "moved"))["Tiny"] == "gone"


def test_a_checkpoint_that_moved_takes_its_card_along(models: Path, tmp_path: Path) -> None:
    make(models / "Other", hidden_act="swish")
    add(models, fields={"owner": "me"})
    add_cards(tmp_path, child="./nowhere\nbase: Tiny")
    lading.verify_model("Tiny", progress=False)
    (models / "Tiny").rename(tmp_path / "Renamed")

    dry = add(tmp_path / "Renamed", dry_run=True)
    found = add(tmp_path / "Renamed")

    assert statuses(dry) == statuses(found) == {"Tiny": "moved"}
    assert found["Tiny"].moved_from == str(models / "Tiny")
    assert own_fields("Tiny") | {"checkpoint": str(tmp_path / "Renamed"), "owner": "me"} == own_fields("Tiny")
    assert lading.get_asset_store().models("Tiny")[0].status == "ready"
    assert lading.get_asset_store().tensor_digests(path_uri(tmp_path / "Renamed")), "the digests came along"
    assert lading.get_asset_store().checkpoint(path_uri(models / "Tiny")) is None
    assert lading.verify_model("Tiny", progress=False).good
    assert set(statuses(add(tmp_path / "Renamed", models)).values()) == {"unchanged"}


def test_what_is_gone_is_reported_and_kept(models: Path, tmp_path: Path) -> None:
    make(models / "Other", shards=2)
    add(models)
    shutil.rmtree(models / "Tiny")

    assert statuses(add(models)) == {"Other": "unchanged", "Tiny": "gone"}
    assert statuses(add(make(tmp_path / "elsewhere" / "New", vocab_size=99))) == {"New": "added"}
    assert "lading relocate" in str(add(models)["Tiny"].problem)
    assert own_fields("Tiny")["license"] == "apache-2.0"


def test_a_checkpoint_that_a_file_states_at_its_earlier_path(models: Path, tmp_path: Path) -> None:
    add_cards(tmp_path, mine=str(models / "Tiny"))
    lading.index_checkpoint("mine")
    (models / "Tiny").rename(models / "Moved")

    (found,) = lading.add_checkpoints(models)

    assert (found.status, found.name) == ("skipped", None)
    assert "'mine'" in str(found.problem)
    assert "lading relocate" in str(found.problem)


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_one_failure_does_not_hinder_the_others(models: Path, tmp_path: Path) -> None:
    make(models / "awq", quantization_config={"quant_method": "awq"})
    make(models / "nonsense", hidden_size="wide")
    make(models / "no-type", model_type=None)
    (make(models / "no-json") / "config.json").write_text("{")
    (make(models / "cut") / "model.safetensors").write_bytes(b"\0\0")
    (make(models / "fifo") / "README.md").unlink(missing_ok=True)
    os.mkfifo(models / "fifo" / "README.md")
    outside = make(tmp_path / "outside")
    (models / "leads-out").mkdir()
    (models / "leads-out" / "model.safetensors").symlink_to(outside / "model.safetensors")

    found = add(models)

    def kind(name: str) -> tuple[str, type[Exception]]:
        each = found[str(models / name)]
        assert name in str(each.problem)
        return each.status, type(each.error)

    assert {name for name, each in found.items() if each.status == "added"} == {"Tiny", "fifo"}
    assert kind("awq") == ("skipped", NotSupportedError)
    assert kind("no-type") == ("skipped", NotSupportedError)
    assert kind("nonsense")[0] == "failed"
    assert kind("no-json") == ("failed", CorruptModelCheckpointError)
    assert kind("cut") == ("failed", CorruptModelCheckpointError)
    assert kind("leads-out") == ("failed", PolicyError)
    assert lading.get_asset_store().checkpoint(path_uri(models / "nonsense")) is None, "nothing is half-written"


def test_nothing_is_written_before_all_arguments_are_right(models: Path) -> None:
    before = dump()
    with pytest.raises(CheckpointNotFoundError, match=r"hg://Org/Name"):
        lading.add_checkpoints(models, "Org/Name")
    with pytest.raises(CheckpointNotFoundError, match="at ''"):
        lading.add_checkpoints("")
    with pytest.raises(CardFileError):
        lading.add_checkpoints(models, fields={"license": 5})
    with pytest.raises(AssetNotFoundError, match="nope"):
        lading.add_checkpoints(models, fields={"base": "nope"})
    assert statuses(add(models, dry_run=True)) == {"Tiny": "added"}
    assert dump() == before


def test_a_catalog_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, catalog: Path) -> None:
    with public_folder() as folder:
        shutil.copy(catalog, folder / "catalog.sqlite")
        (folder / "catalog.sqlite").chmod(0o444)
        for file in make(folder / "models" / "Tiny").iterdir():
            file.chmod(0o644)
        monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{folder / 'catalog.sqlite'}")
        with nobody():
            assert statuses(add(folder / "models", dry_run=True)) == {"Tiny": "added"}
            with pytest.raises(CatalogError, match="cannot be written"):
                lading.add_checkpoints(folder / "models")


def test_offline_an_unknown_repository_is_one_failure(models: Path) -> None:
    found = add(models, "hg://Org/Unknown")

    assert statuses(found) == {"Tiny": "added", "hg://Org/Unknown": "failed"}
    assert isinstance(found["hg://Org/Unknown"].error, FetchError)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command(cli: Callable[..., Result], models: Path) -> None:
    make(models / "awq", quantization_config={"quant_method": "awq"})
    result = cli("add", models, "--set", "owner=me", "--set", "note=@x", "--set", "stars=3")
    assert "Tiny  added" in result.stdout
    assert "the name of the folder" in result.stderr
    assert "Did you mean 'tokenizer'" in cli("add", models, "--set", "tokeniser=x").stderr
    assert "'qwn'" in cli("add", models, "--set", "model_family=qwn").stderr
    cli("add", models, "--set", "model_family=qwen")
    assert "2 checkpoints: 1 added, 1 skipped" in result.stderr
    assert own_fields("Tiny") | {"owner": "me", "note": "@x", "stars": 3} == own_fields("Tiny")

    (models / "cut").mkdir()
    (models / "cut" / "model.safetensors").write_bytes(b"")
    assert cli("add", models, "-q", code=4).stdout == "Tiny\n"
    rows = json.loads(cli("add", models, "--json", "--dry-run", code=4).stdout)
    assert sorted((row["name"] or "", row["status"]) for row in rows) == [
        ("", "failed"), ("", "skipped"), ("Tiny", "unchanged"),
    ]  # fmt: skip
    for words in (["--set", "x"], ["--set", "name=x"], ["--name-from", "{x}"], ["--set", "license=[a"]):
        cli("add", models / "none", *words, code=2)
    cli("add", code=2)
    assert "--recursive" in cli("add", models.parent / "home").stderr


@pytest.mark.slow
def test_cards_can_be_exported_and_imported_elsewhere(
    cli: Callable[..., Result], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(models / " odd; name")
    cli("add", models, "--set", "tags=[a, 1, {b: null}]")
    cli("export-cards", "*", "-o", tmp_path / "all.yaml")
    before = cli("export-cards", "*").stdout

    assert "0 added, 0 changed" in cli("import", tmp_path / "all.yaml").stderr
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{tmp_path / 'other.sqlite'}")
    assert "2 added" in cli("import", tmp_path / "all.yaml").stderr
    assert own_fields("Tiny")["tags"] == ["a", 1, {"b": None}]
    assert sorted(cli("export-cards", "*").stdout) == sorted(before)


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_an_adapter_shows_the_family_of_its_base(models: Path, cli: Callable[..., Result]) -> None:
    write_adapter(models / "lora", factors(Q_PROJ, 32, 32), base_model_name_or_path=str(models / "Tiny"))
    first, second = (json.loads(cli("add", models, "--json").stdout) for _ in range(2))
    assert {row["name"]: row["family"] for row in first} == {"Tiny": "qwen", "lora": "qwen"}
    assert [row["family"] for row in second] == [row["family"] for row in first]
    write_adapter(models / "more", factors(Q_PROJ, 32, 32, seed=2), base_model_name_or_path=str(models / "Tiny"))
    assert json.loads(cli("add", models / "more", "--json").stdout)[0]["family"] == "qwen"


def test_an_adapter_is_based_on_the_card_of_its_model(models: Path, tmp_path: Path) -> None:
    (tmp_path / "arch.yaml").write_text(ARCHITECTURE + "---\nname: far\nmodel_family: qwen\ncheckpoint: hg://Org/Far\n")
    lading.import_cards(tmp_path / "arch.yaml")
    write_adapter(models / "a-lora", factors(Q_PROJ, 32, 32), base_model_name_or_path=str(models / "Tiny"))
    write_adapter(models / "far-lora", factors(Q_PROJ, 32, 32), base_model_name_or_path="Org/Far")
    write_adapter(models / "lost-lora", factors(Q_PROJ, 32, 32, seed=2), base_model_name_or_path="Org/Unknown")
    write_adapter(models / "ia3", factors(Q_PROJ, 32, 32), peft_type="IA3")
    (models / "far-lora" / "README.md").write_text(README)

    found = add(models)

    assert {name: each.status for name, each in found.items() if each.name} == dict.fromkeys(
        ["Tiny", "a-lora", "far-lora"], "added"
    )
    assert own_fields("a-lora") == {"base": "Tiny", "adapter": str(models / "a-lora")}
    assert own_fields("far-lora")["base"] == "far"
    assert own_fields("far-lora")["license"] == "apache-2.0"
    for name in ("lost-lora", "ia3"):
        assert found[str(models / name)].status == "skipped"
    assert "--set base=NAME" in str(found[str(models / "lost-lora")].problem)
    assert statuses(add(models / "lost-lora", fields={"base": "Tiny"})) == {"lost-lora": "added"}
    plain, merged = (
        dict(lading.load_model(n, device="cpu", progress=False).named_parameters()) for n in ("Tiny", "a-lora")
    )
    assert not torch.equal(plain[f"{Q_PROJ}.weight"], merged[f"{Q_PROJ}.weight"])
    before = dump()
    assert set(statuses(add(models)).values()) == {"unchanged", "skipped"}
    assert dump() == before


@pytest.mark.slow
def test_adapters_move_and_are_relocated_like_checkpoints(models: Path, tmp_path: Path) -> None:
    write_adapter(models / "lora", factors(Q_PROJ, 32, 32), base_model_name_or_path=str(models / "Tiny"))
    add(models)
    (models / "lora").rename(models / "lora-2")

    found = add(models)
    assert statuses(found) == {"Tiny": "unchanged", "lora": "moved"}
    assert found["lora"].moved_from == str(models / "lora")
    assert own_fields("lora") == {"base": "Tiny", "adapter": str(models / "lora-2")}

    lading.register_model("two", models / "Tiny", adapters=[{"checkpoint": str(models / "lora-2"), "weight": 0.5}])
    models.rename(tmp_path / "moved")
    lading.relocate_checkpoints(models, tmp_path / "moved")
    assert own_fields("lora")["adapter"] == str(tmp_path / "moved" / "lora-2")
    assert own_fields("two")["adapters"] == [{"checkpoint": str(tmp_path / "moved" / "lora-2"), "weight": 0.5}]

    shutil.rmtree(tmp_path / "moved" / "lora-2")
    assert statuses(add(tmp_path / "moved"))["lora"] == "gone"
