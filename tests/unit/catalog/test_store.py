"""What the store answers: cards with their overlays and bases, architectures, lists."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from lading.cards.card_file import dump
from lading.catalog import store as store_module
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.query import run_query as query
from lading.catalog.records import CheckpointContents, ModelSummary
from lading.catalog.store import AssetStore, get_asset_store
from lading.errors import AssetCardError, AssetNotFoundError, ModelArchitectureNotKnownError, SettingsError
from tests.helpers.catalog_tools import card_file, make_copies, make_manifest, settings_in, without_seeds

Stock = Callable[..., AssetStore]

CARDS = """\
name: base
model_family: qwen
checkpoint: ./weights
---
name: leaf
base: base
model_arch: tiny
license: mit
---
name: leaf@user
checkpoint: ./mine
---
name: base@cluster
checkpoint: /cluster/base
---
name: leaf@cluster
license: cluster
---
name: tokens
tokenizer: x
"""


@pytest.fixture
def stock(any_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stock:
    """A store of a catalog with these cards."""
    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(refresh, "files", lambda package: tmp_path / "seeds")

    def make(text: str = CARDS, source: str = "file:///cards/a.yaml", *, env: str | None = None) -> AssetStore:
        settings = settings_in(tmp_path, env=env)
        import_files(open_catalog(settings), [card_file(text, source)])
        return AssetStore(open_catalog(settings))

    return make


@pytest.fixture(scope="module")
def shared_stock(shared_databases: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """The same for tests that do not change it: those of one text share a catalog."""
    folders: dict[str, Path] = {}

    def make(text: str = CARDS, *, env: str | None = None) -> AssetStore:
        is_new = text not in folders
        if is_new:
            folders[text] = tmp_path_factory.mktemp("shared")
        folder = folders[text]
        settings = settings_in(folder, env=env, database_url=shared_databases(folder))
        with without_seeds():
            if is_new:
                import_files(open_catalog(settings), [card_file(text, "file:///cards/a.yaml")])
            return AssetStore(open_catalog(settings))

    return make


# --- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "name", "checkpoint", "license_"),
    [
        (None, "leaf", "file:///cards/mine", "mit"),
        (None, " leaf ", "file:///cards/mine", "mit"),
        (None, "leaf@", "file:///cards/weights", "mit"),
        (None, "leaf@user", "file:///cards/mine", "mit"),
        (None, "leaf@ user ", "file:///cards/mine", "mit"),
        (None, "leaf@cluster", "file:///cluster/base", "cluster"),
        ("cluster", "leaf", "file:///cards/mine", "mit"),  # `user` comes first, and only one is laid over a card
        ("cluster", "leaf@", "file:///cards/weights", "mit"),
        ("cluster", "base", "file:///cluster/base", None),
        ("user", "base", "file:///cards/weights", None),
    ],
)
def test_a_name(shared_stock: Stock, env: str | None, name: str, checkpoint: str, license_: str | None) -> None:
    card = shared_stock(env=env).retrieve_card(name)
    assert card.name == name.partition("@")[0].strip()
    assert card.field("checkpoint").as_uri() == checkpoint
    stated = card.maybe_get_field("license")
    assert (stated.value if stated else None) == license_


def test_what_a_card_knows_of_itself(shared_stock: Stock) -> None:
    card = shared_stock().retrieve_card("leaf@")
    assert card.source == "a.yaml[1]"
    assert card.metadata == {"base": "base", "model_arch": "tiny", "license": "mit"}
    assert card.base is not None
    assert card.base.name == "base"
    assert card.has_field("model_family")


@pytest.mark.parametrize(
    "name", ["nobody", "", "@", "@user", "leaf2", "LEAF", "a\0b", "half \udc80", "'; DROP TABLE cards"]
)
def test_names_of_no_card(shared_stock: Stock, name: str) -> None:
    store = shared_stock()
    assert store.maybe_retrieve_card(name) is None
    with pytest.raises(AssetNotFoundError) as caught:
        store.retrieve_card(name)
    assert caught.value.name == name


def test_a_name_that_is_nearly_right(shared_stock: Stock) -> None:
    store = shared_stock(
        "name: qwen3_0.6b\nmodel_family: qwen\n---\nname: qwen3_1.7b\nmodel_family: qwen\n---\nname: token\n"
    )
    with pytest.raises(AssetNotFoundError, match=r"Did you mean 'qwen3_0\.6b'"):
        store.retrieve_card("Qwen3-0.6B")
    assert store.suggest("qwen3_06b")[0] == "qwen3_0.6b"
    assert store.suggest("tokn") == []  # no model
    assert store.suggest("") == []


def test_names_nearly_right_among_many(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lading.catalog.listing._FEW", 3)
    store = stock("".join(f"name: {c}_model\nmodel_family: f\n---\n" for c in "abcdefg") + "name: z\n")
    assert store.suggest("E_modle") == ["e_model"]


def test_an_unknown_environment(stock: Stock) -> None:
    with pytest.raises(AssetNotFoundError, match=r"'leaf@nope'.* overlay for .*'nope'\. Known: cluster, user\.$"):
        stock().retrieve_card("leaf@nope")
    with pytest.raises(AssetNotFoundError, match="Did you mean 'cluster'"):
        stock().maybe_retrieve_card("leaf@clutser")
    with pytest.raises(AssetNotFoundError, match=r"'leave@nope' is in the catalog\. Did you mean 'leaf'\?$"):
        stock().retrieve_card("leave@nope")
    with pytest.raises(SettingsError, match=r"LADING_ENV names .*'nope'"):
        stock(env="nope").retrieve_card("leaf")
    with pytest.raises(SettingsError, match="LADING_ENV"):
        list(stock(env="nope").find_cards("model_family", "qwen"))
    assert stock(env="nope").retrieve_card("leaf@").name == "leaf"
    assert stock("name: only\n", "file:///c/b.yaml").retrieve_card("only@cluster").name == "only"
    assert stock("name: only\n", "file:///c/b.yaml").retrieve_card("only@user").name == "only"


def test_bad_bases(shared_stock: Stock) -> None:
    store = shared_stock("name: a\nbase: gone\n---\nname: b\n---\nname: b@user\nbase: c\n---\nname: c\nbase: b\n")
    with pytest.raises(AssetCardError, match=r"based on 'gone'.*\(a\.yaml\[0\]\)"):
        store.retrieve_card("a")
    with pytest.raises(AssetCardError, match="cycle: b → c → b"):
        store.retrieve_card("b")  # only the overlay closes it
    assert store.retrieve_card("b@").name == "b"


def test_asset_names(shared_stock: Stock) -> None:
    assert shared_stock().asset_names == {"base", "leaf", "tokens"}


# --- find_cards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("model_family", "qwen", ["base", "leaf"]),
        ("model_arch", "tiny", ["leaf"]),
        ("license", "mit", ["leaf"]),
        ("tokenizer", "x", ["tokens"]),
        ("checkpoint", "./mine", ["leaf"]),
        ("model_family", "llama", []),
        ("model_family", None, []),
        ("model_family", ["qwen"], []),
        ("model_family", "half \udc80", []),
        ("nothing", "x", []),
    ],
)
def test_find_cards(shared_stock: Stock, field: str, value: object, names: list[str]) -> None:
    assert [card.name for card in shared_stock().find_cards(field, value)] == names


OVERLAID = """\
name: a
model_family: one
---
name: b
base: a
---
name: c
base: b
---
name: d
model_family: one
---
name: other
model_family: two
---
name: e
base: other
---
name: a@user
model_family: two
---
name: d@user
base: other
model_family: null
---
name: e@cluster
base: d
"""


@pytest.mark.few(4)
@pytest.mark.parametrize("env", [None, "cluster"])
@pytest.mark.parametrize("family", ["one", "two", "three"])
def test_find_cards_sees_overlays(shared_stock: Stock, env: str | None, family: str) -> None:
    """What the columns know, overlays apart, must not be what is answered."""
    store = shared_stock(OVERLAID, env=env)
    cards = [store.retrieve_card(name) for name in sorted(store.asset_names)]
    expected = [c.name for c in cards if (f := c.maybe_get_field("model_family")) and f.value == family]
    assert [c.name for c in store.find_cards("model_family", family)] == expected


def test_find_cards_never_stops_at_a_bad_card(shared_stock: Stock, caplog: pytest.LogCaptureFixture) -> None:
    store = shared_stock(
        "name: a\nmodel_family: f\n---\nname: b\nbase: gone\nmodel_family: f\n---\nname: c\nmodel_family: f\n---\n"
        "name: c@user\nbase: d\n---\nname: d\nbase: c\n---\nname: e\nmodel_family: f\n"
    )
    for field, value in (("model_family", "f"), ("anything", 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lading"):
            assert [c.name for c in store.find_cards(field, value)] in (["a", "e"], [])
        assert "'gone', which is not in the catalog" in caplog.text
        assert "form a cycle" in caplog.text


def test_a_listing_that_is_left_half_way_holds_no_lock(stock: Stock) -> None:
    store = stock()
    cards = store.find_cards("model_family", "qwen")
    assert next(cards).name == "base"
    stock("name: more\nmodel_family: qwen\n", "file:///c/b.yaml")
    assert [c.name for c in cards] == ["leaf"]


# --- architectures and families --------------------------------------------------------------------------------------


ARCHITECTURES = """\
architecture: tiny
family: qwen
config: {a: 1, b: 2}
---
architecture: tinier
family: qwen
base: tiny
config: {b: 3}
---
architecture: tiny
family: llama
---
architecture: lost
family: qwen
base: gone
"""


def test_architectures(shared_stock: Stock) -> None:
    store = shared_stock(ARCHITECTURES)
    assert store.architecture("tinier", "qwen").overrides == ({"a": 1, "b": 2}, {"b": 3})
    assert store.architecture("tiny", "llama").overrides == ({},)
    assert store.maybe_architecture("tinier", "llama") is None
    assert store.maybe_architecture("half \udc80", "llama") is None
    with pytest.raises(
        ModelArchitectureNotKnownError, match=r"'tini' is not.*of the qwen family\. Did you mean"
    ) as caught:
        store.architecture("tini", "qwen")
    assert (caught.value.arch, caught.value.family) == ("tini", "qwen")
    with pytest.raises(AssetCardError, match="'lost' is based on 'gone'"):
        store.architecture("lost", "qwen")

    assert [(a.family, a.name, a.base, a.overrides) for a in store.architectures()] == [
        ("llama", "tiny", None, {}),
        ("qwen", "lost", "gone", {}),
        ("qwen", "tinier", "tiny", {"b": 3}),
        ("qwen", "tiny", None, {"a": 1, "b": 2}),
    ]
    assert [a.name for a in store.architectures("llama")] == ["tiny"]
    assert store.architectures("llama")[0].source == "file:///cards/a.yaml"
    assert store.architectures("nobody") == []


def test_families(shared_stock: Stock) -> None:
    families = {
        f.name: f for f in shared_stock(CARDS + "---\n" + ARCHITECTURES + "---\nname: x\nmodel_family: zz\n").families()
    }
    assert (families["qwen"].registered, families["qwen"].architectures, families["qwen"].cards) == (True, 3, 2)
    assert (families["zz"].registered, families["zz"].architectures, families["zz"].cards) == (False, 0, 1)


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_columns_of_a_model_are_those_of_the_view(shared_stock: Stock) -> None:
    names = [f.name for f in fields(ModelSummary)]
    assert names[-2:] == ["problem", "kind"]
    assert query(shared_stock().database, "SELECT * FROM models").columns == tuple(names[:-2])
    assert query(shared_stock().database, "SELECT * FROM assets").columns == tuple(names[:-1])
    assert {"name", "status", "problem", "kind"} < set(
        query(shared_stock().database, "SELECT * FROM unregistered").columns
    )


def test_statuses(stock: Stock, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    text = f"""\
name: remote
model_family: qwen
checkpoint: hg://a/remote
---
name: partly
model_family: qwen
checkpoint: hg://a/partly
---
name: fetched
model_family: qwen
checkpoint: hg://a/fetched
license: mit
---
name: cleaned
model_family: qwen
checkpoint: hg://a/cleaned
---
name: local
model_family: qwen
checkpoint: {tmp_path}/here
---
name: lost
model_family: qwen
checkpoint: {tmp_path}/gone
---
name: gated
model_family: qwen
url: https://example.com
---
name: gated_too
model_family: qwen
checkpoint: hg://a/b;gated=true
---
name: unknown
model_family: nobody
checkpoint: hg://a/b
---
name: dangling
base: nowhere
model_family: qwen
---
name: dangling_too
base: nowhere
---
name: no_model
tokenizer: x
"""
    store = stock(text)
    for name, known in (("fetched", tmp_path / "copy"), ("cleaned", tmp_path / "no_copy")):
        manifest = make_manifest()
        record_checkpoint(
            store.database,
            CheckpointContents(
                uri=f"hg://a/{name}", manifest=manifest, copies=make_copies(manifest, known), revision="r1"
            ),
        )
    (tmp_path / "copy").mkdir()
    manifest = make_manifest()
    record_checkpoint(
        store.database,
        CheckpointContents(uri="hg://a/partly", manifest=manifest, copies=make_copies(manifest, tmp_path / "copy")[:1]),
    )

    models = {m.name: m for m in store.models()}
    assert {name: m.status for name, m in models.items()} == {
        "cleaned": "remote",
        "dangling": "broken",
        "dangling_too": "broken",
        "fetched": "ready",
        "gated": "gated",
        "gated_too": "gated",
        "local": "ready",
        "lost": "broken",
        "partly": "remote",
        "remote": "remote",
        "unknown": "unknown-family",
    }
    assert (
        models["lost"].problem
        == f"The checkpoint of the card 'lost' is expected at {tmp_path}/gone, but nothing is there."
    )
    assert models["local"].local_path == f"{tmp_path}/here"
    assert models["fetched"] == ModelSummary(
        name="fetched",
        family="qwen",
        arch=None,
        base=None,
        status="ready",
        checkpoint="hg://a/fetched",
        revision="r1",
        format="safetensors",
        bytes=manifest.total_bytes,
        parameters=manifest.parameters,
        dtypes="BF16,F32",
        shards=2,
        license="mit",
        local_path=f"{tmp_path}/copy",
        verified_at=None,
        source="file:///cards/a.yaml",
        problem=None,
    )
    assert models["remote"].shards is None

    everything = {m.name: m for m in store.models(include_all=True)}
    assert everything.keys() - models.keys() == {"no_model"}
    assert everything["no_model"].status is None

    assert [m.name for m in store.models(status="broken")] == ["dangling", "dangling_too", "lost"]
    assert [m.name for m in store.models(status="remote", limit=2)] == ["cleaned", "partly"]
    assert [m.name for m in store.models(family="nobody")] == ["unknown"]
    assert store.models(family="half \udc80") == []


def test_where_a_single_file_is(stock: Stock, tmp_path: Path) -> None:
    store = stock("name: a\nmodel_family: qwen\ncheckpoint: hg://x/one\n")
    manifest = make_manifest(3, 1, index_name=None)
    (copy,) = make_copies(manifest, tmp_path, verified_at="2026-01-01T00:00:00Z")
    copy.path.touch()
    record_checkpoint(store.database, CheckpointContents(uri="hg://x/one", manifest=manifest, copies=[copy]))
    (model,) = store.models()
    assert (model.status, model.local_path, model.verified_at) == ("ready", str(copy.path), "2026-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["a_b", "a%c", "aXb", "qwen3_0.6b", "qwen3_8b"]),
        ("qwen*", ["qwen3_0.6b", "qwen3_8b"]),
        ("qwen?_8b", ["qwen3_8b"]),
        ("a_b", ["a_b"]),
        ("a%*", ["a%c"]),
        ("a[X_]b", ["a_b", "aXb"]),
        ("a[!X]?", ["a%c", "a_b"]),
        ("*b", ["a_b", "aXb", "qwen3_0.6b", "qwen3_8b"]),
        ("QWEN*", []),
        ("", []),
        ("half \udc80", []),
    ],
)
def test_patterns(shared_stock: Stock, pattern: str, names: list[str]) -> None:
    store = shared_stock(
        "---\n".join(f"name: {n}\nmodel_family: f\n" for n in ("qwen3_8b", "qwen3_0.6b", "a_b", "aXb", "a%c"))
    )
    assert sorted(m.name for m in store.models(pattern)) == sorted(names)
    assert len(store.models(pattern, limit=1)) == min(1, len(names))
    assert store.models(pattern, limit=0) == []


# --- export ----------------------------------------------------------------------------------------------------------


def test_entries_make_the_files_again(stock: Stock, tmp_path: Path) -> None:
    store = stock(CARDS + "---\n" + ARCHITECTURES)
    exported = card_file(dump(*store.entries()), "file:///cards/a.yaml")
    assert exported.problems == ()

    def plain(entries: object) -> list[object]:
        return [dataclasses.replace(e, source="") for e in entries]  # type: ignore[attr-defined]

    again = card_file(CARDS + "---\n" + ARCHITECTURES)
    assert plain(exported.cards) == plain(again.cards)
    assert plain(exported.architectures) == plain(again.architectures)
    report = import_files(store.database, [exported])
    assert (report.added, report.changed, report.removed) == ((), (), ())


def test_entries_by_pattern(shared_stock: Stock) -> None:
    cards, architectures = shared_stock(CARDS + "---\n" + ARCHITECTURES).entries("*i*")
    assert ([c.name for c in cards], [a.name for a in architectures]) == ([], ["tiny", "tinier", "tiny"])
    cards, _ = shared_stock().entries("leaf")
    assert [c.env for c in cards] == ["", "user", "cluster"]


# --- the default store -----------------------------------------------------------------------------------------------


def test_the_default_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_module._store.cache_clear()
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{home}/a.sqlite")
    store = get_asset_store()
    assert store.database.path == home / "a.sqlite"
    assert get_asset_store() is store

    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{home}/b.sqlite")
    assert get_asset_store().database.path == home / "b.sqlite"
    monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{home}/a.sqlite")
    assert get_asset_store() is store

    (home / "a.sqlite").unlink()
    assert get_asset_store() is not store
    assert (home / "a.sqlite").exists()

    monkeypatch.setenv("LADING_ENV", "nope")
    with pytest.raises(SettingsError, match="LADING_ENV"):
        get_asset_store().retrieve_card("anything")
