"""What a program adds for its process: families, cards, and loaders with families and stores of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file
from torch import nn

import lading
from lading import (
    AssetCard,
    AssetCardError,
    Family,
    GlobalModelLoader,
    ModelFamilyNotKnownError,
    ModelHub,
    ModelHubAccessor,
    get_asset_store,
    load_model,
)
from lading.catalog import memory_cards
from lading.families.qwen import FAMILY, Qwen, get_qwen_model_hub
from lading.system import entry_points
from tests.helpers.make_checkpoint import make, qwen_config

Cli = Callable[..., Result]


class Smoothing(Enum):
    ADD_ONE = 1
    KNESER_NEY = 2


@dataclass(kw_only=True)
class BigramConfig:
    vocab_size: int = 7
    smoothing: Smoothing = Smoothing.ADD_ONE
    counts: torch.dtype = torch.int64


class Bigram(nn.Module):
    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.next = nn.Embedding(config.vocab_size, config.vocab_size)


BIGRAM = Family(
    name="bigram",
    kls=Bigram,
    config_kls=BigramConfig,
    build=Bigram,
    init=lambda model, config, name, parameter: nn.init.ones_(parameter),
)

get_bigram_model_hub = ModelHubAccessor("bigram", Bigram, BigramConfig)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers."""
    monkeypatch.setattr(entry_points, "_HERE", {})
    monkeypatch.setattr(memory_cards, "_CARDS", {})
    monkeypatch.setattr(memory_cards, "_ARCHITECTURES", {})


@pytest.fixture
def bigram(cli: Cli, tmp_path: Path) -> Path:
    """A checkpoint with a card, and another card without; the family is not registered."""
    save_file({"next.weight": torch.arange(49.0).view(7, 7)}, tmp_path / "bigram.safetensors")
    path = tmp_path / "bigram.yaml"
    path.write_text(
        "architecture: small\nfamily: bigram\nconfig: {vocab_size: 7}\n---\n"
        "name: counted\nmodel_family: bigram\nmodel_arch: small\nmodel_config: {smoothing: KNESER_NEY}\n"
        "checkpoint: bigram.safetensors\n---\n"
        "name: asked_for\nmodel_family: bigram\nurl: https://example.com/bigram\n"
    )
    assert "no installed package registers the model family 'bigram'" in cli("import", path).stderr
    return path


# --- families --------------------------------------------------------------------------------------------------------


def test_a_family_of_this_process(bigram: Path, cli: Cli) -> None:
    with pytest.raises(AssetCardError, match="'bigram'"):
        load_model("counted")
    with pytest.raises(ModelFamilyNotKnownError):
        lading.get_model_family_name("counted")

    lading.register_family(BIGRAM)
    lading.register_family(replace(BIGRAM))  # as when a cell of a notebook runs twice
    hub = get_bigram_model_hub()

    assert {card.name for card in hub.iter_cards()} == {"counted", "asked_for"}
    assert hub.get_archs() == {"small"}
    for model in (load_model("counted"), hub.load_model("counted", load_rank0_only=True)):
        assert isinstance(model, Bigram)
        assert model.next.weight.flatten().equal(torch.arange(49.0))
    assert hub.create_new_model(BigramConfig(), init_rank0_only=True).next.weight.eq(1).all()
    assert lading.get_model_family_name("counted") == "bigram"
    assert lading.get_model_family_name(AssetCard("mine", {"model_family": "bigram"})) == "bigram"


def test_the_commands_of_this_process_see_its_families(bigram: Path, cli: Cli, tmp_path: Path) -> None:
    def statuses(*words: str) -> list[str]:
        return cli("list", "--family", "bigram", "--columns", "name,status", *words).stdout.split()[2:]

    assert statuses() == ["asked_for", "unknown-family", "counted", "unknown-family"]
    lading.register_family(BIGRAM)

    assert statuses() == ["asked_for", "gated", "counted", "ready"]
    assert statuses("--status", "ready") == ["counted", "ready"]
    assert statuses("--status", "unknown-family") == []
    assert '"name": "bigram", "registered": true' in cli("families", "--nl").stdout
    bigram.write_text(bigram.read_text() + "license: mit\n")
    assert cli("import", bigram).stderr.startswith("lading: 0 added, 1 changed")
    cli("check", "counted")
    cli("load", "counted")
    for form in ([], ["--json"]):
        shown = cli("show", "counted", *form).stdout
        assert "KNESER_NEY" in shown
        assert "int64" in shown
    (tmp_path / "bigram.safetensors").unlink()
    assert statuses("--status", "broken") == ["counted", "broken"]


def test_a_family_of_a_package_is_not_replaced(catalog: Path) -> None:
    with pytest.raises(ValueError, match=r"'qwen'.*lading\.families\.qwen:FAMILY"):
        lading.register_family(replace(FAMILY))


def test_a_loader_with_families_of_its_own(bigram: Path, tmp_path: Path) -> None:
    loader = GlobalModelLoader(get_asset_store(), {"bigram": BIGRAM})

    assert isinstance(loader.load("counted", None, torch.device("cpu"), torch.bfloat16, None, True, False), Bigram)
    assert isinstance(loader.load("counted", lading.create_fake_gangs("cpu")), Bigram)
    with pytest.raises(AssetCardError, match=r"'qwen'.*The families of this loader: bigram"):
        loader.load("qwen3_0.6b")
    with pytest.raises(AssetCardError, match="'bigram'"):
        GlobalModelLoader(get_asset_store(), {}).load("counted")
    with pytest.raises(ValueError, match="together"):
        loader.load("counted", lading.create_fake_gangs("cpu"), "cpu")  # type: ignore[call-overload]


# --- the current device -----------------------------------------------------------------------------------------------


def test_the_current_device_is_the_one_of_new_tensors() -> None:
    assert lading.get_current_device() == lading.CPU == lading.Device("cpu")
    with torch.device("meta"):
        assert lading.get_current_device() == torch.empty(()).device == torch.device("meta")
    assert lading.DataType is torch.dtype


def test_a_new_model_is_on_the_current_device(bigram: Path) -> None:
    lading.register_family(BIGRAM)
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        load_model("counted")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_without_a_family_is_deprecated() -> None:
    with pytest.warns(DeprecationWarning, match="`family`"):
        error = lading.ModelArchitectureNotKnownError("7b")
    assert (error.arch, error.family) == ("7b", None)
    assert "qwen" in str(lading.ModelArchitectureNotKnownError("7b", "qwen"))


# --- cards in memory --------------------------------------------------------------------------------------------------


TINY = {"model_family": "qwen", "model_config": {"_set_": asdict(qwen_config())}}


@pytest.fixture
def tiny(catalog: Path, tmp_path: Path) -> Path:
    return make(tmp_path / "tiny")


def test_cards_in_memory(tiny: Path, cli: Cli) -> None:
    report = lading.import_cards(
        [
            {"architecture": "tinier", "family": "qwen", "config": {"num_layers": 1}},
            {"name": "mine", **TINY, "checkpoint": tiny},
            {"name": "mine@cluster", "license": "mit"},
            {"name": "later", "base": "mine", "model_config": None, "model_arch": "tinier"},
        ],
        source="memory",
    )

    assert report.added == ("mine", "mine@cluster", "later", "qwen/tinier (architecture)")
    store, hub = get_asset_store(), get_qwen_model_hub()
    assert {"mine", "later"} <= store.asset_names
    assert {card.name for card in store.find_cards("checkpoint", str(tiny))} == {"mine", "later"}
    assert {"mine", "later"} <= {card.name for card in hub.iter_cards()}
    assert store.retrieve_card("mine@cluster").field("license").value == "mit"
    assert "tinier" in hub.get_archs()
    assert hub.get_model_config("later").num_layers == 1
    assert isinstance(hub.load_model("mine"), Qwen)
    for command in ("check", "load", "plan", "pull", "verify", "path"):
        cli(command, "mine")
    shown = json.loads(cli("show", "mine", "--json").stdout)
    assert (shown["family"], shown["status"], shown["cards"][0]["source"]) == ("qwen", "ready", "memory[1]")
    assert cli("show", "later").stdout
    assert "'mine' is in the catalog" in cli("list", "mine", code=2).stderr
    with pytest.raises(lading.AssetNotFoundError, match="Did you mean 'mine'"):
        store.retrieve_card("mina")
    assert lading.query("select count(*) from models where name = 'mine'").rows == [(0,)]


def test_cards_in_memory_are_laid_over_the_catalog(tiny: Path) -> None:
    store = get_asset_store()
    card = {"name": "qwen3_0.6b", **TINY, "checkpoint": str(tiny)}
    with pytest.raises(lading.CardFileError, match="expected a name that the catalog"):
        lading.import_cards([card], source="memory")
    assert store.retrieve_card("qwen3_0.6b").field("model_arch")

    lading.import_cards([card], source="memory", replace=True)
    assert not store.retrieve_card("qwen3_0.6b").has_field("model_arch")
    assert lading.import_cards([card], source="memory", replace=True).unchanged == ("qwen3_0.6b",)
    assert lading.import_cards([{**card, "url": "x"}], source="memory", replace=True, dry_run=True).changed
    assert not store.retrieve_card("qwen3_0.6b").has_field("url")


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model_family": "qwen", "url": "https://example.com"}, "gated"),
        ({"model_family": "qwen", "checkpoint": "hg://a/b;gated=true"}, "gated"),
        ({"model_family": "qwen", "checkpoint": "hg://a/b"}, "remote"),
        ({"model_family": "qwen", "checkpoint": "/gone"}, "broken"),
        ({"model_family": "qwen", "checkpoint": ""}, "broken"),
        ({"model_family": "nobody", "checkpoint": "hg://a/b"}, "unknown-family"),
        ({"license": "mit"}, None),
    ],
)
def test_the_status_of_cards_in_memory(catalog: Path, fields: dict[str, object], status: str | None) -> None:
    lading.import_cards([{"name": "mine", **fields}], source="memory")
    store = get_asset_store()
    summary = store.summary(store.retrieve_card("mine"))
    assert summary is not None
    assert (summary.status, summary.source) == (status, "memory")
    assert (summary.problem is not None) == (status == "broken")


def test_an_overlay_in_memory(tiny: Path) -> None:
    lading.import_cards([{"name": "qwen3_0.6b@user", "checkpoint": tiny}], source="memory")
    store = get_asset_store()
    assert store.retrieve_card("qwen3_0.6b").field("checkpoint").value == str(tiny)
    assert store.retrieve_card("qwen3_0.6b@").field("checkpoint").value != str(tiny)
    assert [(model.name, model.status) for model in store.models("qwen3_0.6b")] == [("qwen3_0.6b", "ready")]


def test_mappings_are_kept_in_the_catalog(tiny: Path, cli: Cli) -> None:
    one, two = ({"name": name, **TINY, "checkpoint": tiny} for name in ("one", "two"))
    assert lading.import_cards([one], [two]).added == ("one", "two")
    assert lading.import_cards([one]).removed == ()  # a program may import piece by piece
    assert lading.import_cards([{**one, "name": "three"}, {**one, "name": "four"}], source="team").added
    assert lading.import_cards([{**one, "name": "four"}], source="team").removed == ("three",)
    assert cli("list", "-q", "--family", "qwen", "--status", "ready").stdout.split() == ["four", "one", "two"]


@pytest.mark.parametrize(
    ("card", "error", "match"),
    [
        ({"model_family": "qwen"}, lading.CardFileError, r"program\[0\].*'name'"),
        ({"name": "x", "model_family": 3}, lading.CardFileError, r"program\[0\]\.model_family"),
        ({"name": "x", "rate": float("nan")}, lading.CardFileError, "program"),
        ({"name": "x", "dtype": torch.float32}, TypeError, "torch.float32"),
        ({"name": "x", "data": b""}, TypeError, "b''"),
        ("name: x", lading.CardFileError, "mapping"),
    ],
)
def test_mappings_that_are_no_cards(catalog: Path, card: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lading.import_cards([card])  # type: ignore[list-item]


def test_files_are_sources_of_their_own(bigram: Path) -> None:
    with pytest.raises(ValueError, match="`source`"):
        lading.import_cards(bigram, source="memory")


# --- checkpoints of fairseq2's trainer -------------------------------------------------------------------------------


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A folder that fairseq2's trainer has written to."""
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 100):
        shutil.copytree(tiny, folder / f"step_{step}" / "model")
    (folder / "step_200.tmp" / "model").mkdir(parents=True)
    (folder / "step_last").mkdir()
    (folder / "step_300").touch()
    (folder / "scores").mkdir()
    for step, score in ((9, "-1.5"), (10, "-0.5")):
        (folder / "scores" / f"step_{step}.txt").write_text(f"{score}\n")
    (folder / "model.yaml").write_text(json.dumps({"name": "checkpoint", **TINY}))
    return folder


def test_checkpoints_of_a_training_run(run: Path, cli: Cli) -> None:
    assert set(lading.register_checkpoint_models(run).added) == {
        *("checkpoint", "checkpoint_step_9", "checkpoint_step_10", "checkpoint_step_100", "last_checkpoint"),
        *("best_checkpoint", "best_checkpoint_0", "best_checkpoint_1"),
    }

    def step(name: str) -> str:
        return Path(get_asset_store().retrieve_card(name).field("checkpoint").as_(str)).parent.name

    assert step("last_checkpoint") == step("checkpoint_step_100") == "step_100"
    assert step("best_checkpoint") == step("best_checkpoint_0") == "step_10"
    assert step("best_checkpoint_1") == "step_9"
    assert isinstance(load_model("last_checkpoint"), Qwen)
    with pytest.raises(lading.ModelGatedError):
        load_model("checkpoint")
    shutil.rmtree(run / "step_100")
    assert lading.register_checkpoint_models(str(run)).changed == ("last_checkpoint",)
    assert step("last_checkpoint") == "step_10"


def test_folders_that_no_trainer_has_written(run: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lading.register_checkpoint_models(run / "scores")
    (run / "scores" / "step_9.txt").write_text("good\n")
    with pytest.raises(AssetCardError, match=r"step_9\.txt.*'good'"):
        lading.register_checkpoint_models(run)
    (run / "model.yaml").write_text("name: other\n")
    with pytest.raises(AssetCardError, match="'checkpoint'"):
        lading.register_checkpoint_models(run)
    (run / "model.yaml").write_text("name: [\n")
    with pytest.raises(lading.CardFileError):
        lading.register_checkpoint_models(run)
    assert "checkpoint_step_9" not in get_asset_store().asset_names


# --- a store of one's own --------------------------------------------------------------------------------------------


class OwnStore:
    """The four members, and no others."""

    def __init__(self, *cards: AssetCard) -> None:
        self._cards = {card.name: card for card in cards}

    def retrieve_card(self, name: str) -> AssetCard:
        if name not in self._cards:
            raise lading.AssetNotFoundError(name)
        return self._cards[name]

    def maybe_retrieve_card(self, name: str) -> AssetCard | None:
        return self._cards.get(name)

    def find_cards(self, field: str, value: object) -> Iterator[AssetCard]:
        return (c for c in self._cards.values() if (f := c.maybe_get_field(field)) and f.value == value)

    @property
    def asset_names(self) -> Set[str]:
        return self._cards.keys()


class Inheriting(OwnStore, lading.AssetStore):
    """As a subclass of fairseq2's abstract store is written: without the constructor of its base."""


@pytest.mark.parametrize("kls", [OwnStore, Inheriting])
def test_a_store_of_ones_own_works_wherever_one_is_taken(tiny: Path, tmp_path: Path, kls: type[OwnStore]) -> None:
    base = AssetCard("base", TINY)
    card = AssetCard("mine", {"checkpoint": str(tiny)}, base)
    store = kls(base, card)

    hub = ModelHub(FAMILY, store)
    assert [each.name for each in hub.iter_cards()] == ["base", "mine"]
    assert "qwen3_0.6b" in hub.get_archs()
    assert hub.get_model_config("mine") == hub.get_model_config(card) == qwen_config()
    assert isinstance(hub.load_model("mine"), Qwen)
    assert isinstance(hub.load_model(tiny), Qwen)
    assert isinstance(GlobalModelLoader(store).load("mine"), Qwen)
    assert isinstance(load_model(card), Qwen)
    for name in ("qwen3_0.6b", "mina"):
        with pytest.raises(lading.ModelNotKnownError, match=name):
            hub.load_model(name)

    assert lading.check_model("mine", store=store).fits
    assert lading.plan_load("mine", store=store)
    assert not lading.diff_models("mine", tiny, store=store).changes
    assert lading.verify_model("mine", store=store)
    assert lading.pull_model("mine", store=store)
    assert lading.convert_checkpoint("mine", tmp_path / "out", store=store)
    assert lading.query("select 1", store=store).rows == [(1,)]
    assert lading.disk_usage(store=store) is not None


# --- new models ------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """With buffers, as fairseq2's modules have them."""

    table: torch.Tensor
    unused: torch.Tensor | None

    def __init__(self, config: BigramConfig) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(config.vocab_size, dtype=torch.float32), persistent=False)
        self.register_buffer("unused", None, persistent=False)
        self.next = nn.Linear(config.vocab_size, 2)

    def reset_non_persistent_buffers(self) -> None:
        torch.arange(len(self.table), out=self.table)


def draw(model: nn.Module, config: BigramConfig, name: str, parameter: torch.Tensor) -> None:
    nn.init.normal_(parameter)


COUNTING = replace(BIGRAM, name="counting", kls=Counting, build=Counting, init=draw)


def test_buffers_of_modules_of_fairseq2(catalog: Path, tmp_path: Path) -> None:
    hub = ModelHub(COUNTING, get_asset_store())
    new = hub.create_new_model(BigramConfig(), dtype=torch.bfloat16)
    save_file(new.state_dict(), tmp_path / "model.safetensors")
    loaded = hub.load_custom_model(tmp_path / "model.safetensors", BigramConfig())

    for model in (new, loaded):
        assert model.table.equal(torch.arange(7.0))
        assert model.unused is None
    assert hub.create_new_model(BigramConfig(), meta=True).table.is_meta


def test_new_models_advance_the_generator(catalog: Path) -> None:
    hub = ModelHub(COUNTING, get_asset_store())

    def new(**place: object) -> torch.Tensor:
        return hub.create_new_model(BigramConfig(), **place).next.weight  # type: ignore[call-overload]

    torch.manual_seed(5)
    first, second, after = new(), new(), torch.rand(2)
    assert not first.equal(second)
    torch.manual_seed(5)
    with lading.simulate_gangs(0, sdp=1) as gangs:
        assert new(gangs=gangs).equal(first)
    new(meta=True)  # draws nothing
    assert new(device="cpu").equal(second)
    assert torch.rand(2).equal(after)
