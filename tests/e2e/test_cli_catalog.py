"""The commands that ask and fill the catalog."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shutil
import sqlite3
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lading
from lading.catalog.database.target import SCHEMA_VERSION
from lading.catalog.listing import WITHOUT_CARD
from lading.cli.list import STATUSES
from lading.models.family import get_family
from tests.helpers.make_checkpoint import make


def rows(result) -> list[dict]:
    return json.loads(result.stdout)


class TestList:
    def test_a_table_for_people(self, cli, cards):
        result = cli("list", "tiny*")
        lines = [line.split() for line in result.stdout.splitlines()]
        assert lines[0] == ["name", "family", "arch", "status", "parameters", "size", "license"]
        assert ["tiny", "qwen", "-", "ready", "-", "-", "apache-2.0"] in lines
        assert result.stderr == ""

    def test_the_status_of_each(self, cli, cards):
        assert {r["name"]: r["status"] for r in rows(cli("list", "tiny*", "--json"))} == {
            "tiny": "ready",
            "tiny_child": "ready",
            "tiny_arch": "remote",
            "tiny_gated": "gated",
            "tiny_unknown": "unknown-family",
            "tiny_gone": "broken",
            "tiny_dangling": "broken",
        }

    @pytest.mark.parametrize("status", [status for status in STATUSES if status not in WITHOUT_CARD])
    def test_by_status(self, cli, cards, status):
        found = rows(cli("list", "--status", status, "--json"))
        assert found
        assert {r["status"] for r in found} == {status}

    def test_all_columns_reach_programs(self, cli, cards):
        (row,) = rows(cli("list", "tiny", "--json"))
        assert list(row) == [
            "name", "family", "arch", "base", "status", "checkpoint", "revision", "format", "bytes", "parameters",
            "dtypes", "shards", "license", "local_path", "verified_at", "source", "problem", "kind",
        ]  # fmt: skip
        assert row["local_path"] == str(cards.parent / "tiny")
        assert cli("list", "tiny", "--csv").stdout.splitlines()[0].split(",") == list(row)
        assert json.loads(cli("list", "tiny", "--nl").stdout) == row

    def test_chosen_columns(self, cli, cards):
        cli("index", "tiny")
        for words, lines in (
            (["name,size,dtypes"], ["name     size  dtypes", "tiny  43.6 kB  BF16"]),
            (["parameters, shards ,name"], ["parameters  shards  name", "     21.8K       1  tiny"]),
            (["name,verified_at"], ["name  verified at", "tiny  -"]),
            (["bytes,size,name,name", "--csv"], ["bytes,name", "43648,tiny"]),
            (["status,bytes", "--nl"], ['{"status": "ready", "bytes": 43648}']),
            (["dtypes,name", "-q"], ["BF16"]),
        ):
            assert cli("list", "tiny", "--columns", *words).stdout.splitlines() == lines
        # An order is that of the values, shown or not.
        found = cli("list", "tiny*", "--columns", "name", "--sort", "size", "--json").stdout
        assert json.loads(found)[0] == {"name": "tiny"}
        assert cli("list", "none*", "--columns", "status,name", "--csv").stdout == "status,name\n"

    @pytest.mark.parametrize(
        "columns", ["", "name,", "nmae", "name;size", "NAME", "größe", "\x1b[2J", "name," * 999 + "x"]
    )
    def test_unknown_columns(self, cli, catalog, columns):
        result = cli("list", "--columns", columns, code=2)
        assert " is not a column." in result.stderr
        assert "The columns are name, family, arch, base, status," in result.stderr
        assert result.stderr.count("\n") == 1
        assert "\x1b" not in result.stderr
        assert ("Did you mean 'name'?" in result.stderr) == (columns == "nmae")

    def test_names_only(self, cli, cards):
        assert cli("list", "tiny_g*", "-q").stdout == "tiny_gated\ntiny_gone\n"

    @pytest.mark.parametrize("word", ["ls", "ps"])
    def test_ls_is_list(self, cli, word):
        assert cli(word, "-q").stdout == cli("list", "-q").stdout != ""

    def test_by_family(self, cli):
        assert {r["family"] for r in rows(cli("list", "--family", "mistral", "--json"))} == {"mistral"}

    def test_a_limit(self, cli):
        assert len(rows(cli("list", "--limit", "3", "--json"))) == 3
        assert rows(cli("list", "--limit", "0", "--json")) == []
        assert len(rows(cli("list", "--limit", str(10**30), "--json"))) > 10

    @pytest.fixture
    def three(self, cli, cards, tmp_path):
        """Beside ``tiny`` in bfloat16 one that is larger, in float32, and one that is newer, mostly in int8."""
        states = {
            "large": {"a": torch.zeros(100_000), "b": torch.zeros(10, dtype=torch.bfloat16)},
            "newer": {"a": torch.zeros(1_000, dtype=torch.int8), "b": torch.zeros(10)},
        }
        documents = []
        for name, state in states.items():
            (tmp_path / name).mkdir()
            save_file(state, tmp_path / name / "model.safetensors")
            documents.append(f"name: tiny_{name}\nmodel_family: qwen\ncheckpoint: {tmp_path / name}\n")
        (tmp_path / "three.yaml").write_text("---\n".join(documents))
        cli("import", tmp_path / "three.yaml")
        for name in ("tiny", "tiny_large", "tiny_newer"):
            cli("index", name)
        os.utime(cards.parent / "tiny" / "model.safetensors", (10**9, 10**9))
        os.utime(cards.parent / "tiny" / "config.json", (10**9, 10**9))
        os.utime(tmp_path / "large" / "model.safetensors", (10**9 - 5, 10**9 - 5))

    def test_local(self, cli, three):
        assert {r["status"] for r in rows(cli("list", "--local", "--json"))} == {"ready"}
        assert cli("list", "--local", "-q").stdout.split() == ["tiny", "tiny_child", "tiny_large", "tiny_newer"]
        assert cli("list", "--local", "--status", "remote", "-q").stdout == ""

    def test_local_of_an_unknown_family(self, cli, tmp_path):
        make(tmp_path / "here")
        (tmp_path / "odd.yaml").write_text("name: odd\nmodel_family: nobody\ncheckpoint: here\n")
        cli("import", tmp_path / "odd.yaml")
        assert cli("list", "--local", "-q").stdout == "odd\n"
        shutil.rmtree(tmp_path / "here")
        assert cli("list", "--local", "-q").stdout == ""

    @pytest.mark.few(5)
    @pytest.mark.parametrize(
        ("words", "names"),
        [
            (("--dtype", "bf16"), ["tiny", "tiny_child"]),
            (("--dtype", "BFloat16"), ["tiny", "tiny_child"]),
            (("--dtype", "float32"), ["tiny_large"]),
            (("--dtype", "i8"), ["tiny_newer"]),
            (("--dtype", "fp16"), []),
            (("--min-size", "43648"), ["tiny", "tiny_child", "tiny_large"]),
            (("--max-size", "43648B"), ["tiny", "tiny_child", "tiny_newer"]),
            (("--min-size", "9" * 30 + "TB"), []),
            (("--max-size", "9" * 400), ["tiny", "tiny_child", "tiny_large", "tiny_newer"]),
            (("--min-size", "2kB", "--max-size", "50kB"), ["tiny", "tiny_child"]),
            (("--sort", "size"), ["tiny_large", "tiny", "tiny_child", "tiny_newer"]),
            (("--sort", "modified"), ["tiny_newer", "tiny", "tiny_child", "tiny_large"]),
            (("--sort", "name"), ["tiny", "tiny_child", "tiny_large", "tiny_newer"]),
            (("--sort", "modified", "--limit", "1"), ["tiny_newer"]),
        ],
        ids=" ".join,
    )
    def test_by_what_a_checkpoint_holds(self, cli, three, words, names):
        assert cli("list", *words, "--local", "-q").stdout.split() == names

    @pytest.mark.parametrize("sort", ["size", "modified"])
    def test_what_is_not_known_comes_last(self, cli, three, sort):
        names = cli("list", "tiny*", "--sort", sort, "-q").stdout.split()
        assert names[4:] == sorted(names[4:])
        assert names[:4] == cli("list", "--sort", sort, "--local", "-q").stdout.split()

    def test_conditions_that_are_wrong(self, cli):
        assert "'fp32'" in cli("list", "--dtype", "int7", code=2).stderr
        assert "512MiB" in cli("list", "--max-size", "big", code=2).stderr
        assert "indexed" in cli("list", "--dtype", "f4").stderr

    def test_base_cards_are_models_only_with_all(self, cli, cards):
        bases = {"tiny_tokenizer", "llama4"}  # one without an address, and one that names where to ask for access
        assert not bases & set(cli("list", "-q").stdout.split())
        assert bases <= set(cli("list", "--all", "-q").stdout.split())
        result = cli("list", "tiny_tokenizer", "-q")
        assert result.stdout == ""
        assert "`--all`" in result.stderr

    def test_a_pattern_without_a_match_is_no_error(self, cli):
        result = cli("list", "nothing*", "--json")
        assert result.stdout == "[]\n"
        assert "no model matches" in result.stderr

    def test_a_name_without_a_match_is(self, cli):
        result = cli("list", "qwen3_06b", code=2)
        assert result.stdout == ""
        assert "'qwen3_0.6b'" in result.stderr

    def test_an_unknown_family(self, cli):
        result = cli("list", "--family", "qwn", code=2)
        assert "'qwen'" in result.stderr

    def test_an_unknown_status(self, cli):
        cli("list", "--status", "fine", code=2)

    def test_statuses_are_those_of_the_catalog(self, cli, catalog):
        with sqlite3.connect(catalog) as connection:
            views = str(connection.execute("SELECT sql FROM sqlite_master WHERE type = 'view'").fetchall())
        assert all(f"'{status}'" in views for status in STATUSES)


class TestShow:
    def test_for_people(self, cli, cards):
        text = cli("show", "tiny_child").stdout
        lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
        assert lines["name"] == ["tiny_child"]
        assert lines["status"] == ["ready"]
        assert lines["license"] == ["mit", "tiny_child", "cards.yaml[1]"]
        assert lines["model_family"] == ["qwen", "tiny", "cards.yaml[0]"]
        assert lines["dropout_p"] == ["0.5", "card", "tiny_child"]
        assert lines["model_dim"] == ["32", "card", "tiny"]
        assert lines["norm_eps"] == ["1e-06", "file", "config.json"]
        assert f"local path  {cards.parent / 'tiny'}\n" in text

    def test_the_number_of_parameters(self, cli, cards):
        """Of the checkpoint; before it is indexed, that which the card states, or which its configuration makes."""

        def shown(name):
            line = next((line for line in cli("show", name).stdout.splitlines() if line.startswith("parameters ")), "")
            return json.loads(cli("show", name, "--json").stdout)["parameters"], line.split()[1:2]

        assert shown("qwen3_0.6b") == (596_049_920, ["596M"])
        assert shown("tiny") == (21_824, ["21.8K"])
        assert shown("tiny_gated")[0] == 7_615_616_512, "the default architecture"
        assert shown("tiny_unknown") == (None, [])
        cli("index", "tiny")
        assert shown("tiny") == (21_824, ["21.8K"])

    def test_for_programs(self, cli, cards):
        shown = json.loads(cli("show", "tiny_child", "--json").stdout)
        assert shown["cards"] == [
            {"name": "tiny_child", "source": "cards.yaml[1]"},
            {"name": "tiny", "source": "cards.yaml[0]"},
        ]
        assert shown["fields"]["license"] == {"value": "mit", "card": "tiny_child", "source": "cards.yaml[1]"}
        assert shown["fields"]["checkpoint"]["card"] == "tiny"
        assert shown["config"]["dropout_p"] == 0.5
        assert shown["config"]["model_dim"] == 32
        assert shown["config"]["ffn_inner_dim"] == 18_944, "the default, as `_del_` takes back that of the base"
        assert shown["config_from"]["ffn_inner_dim"] == {"kind": "family", "name": "qwen"}
        assert shown["config_from"]["dropout_p"] == {"kind": "card", "name": "tiny_child"}
        assert shown["config_from"]["model_dim"] == {"kind": "card", "name": "tiny"}
        assert shown["checkpoint"] == {
            "uri": f"file://{cards.parent / 'tiny'}",
            "path": None,
            "gated": False,
            "local_path": str(cards.parent / "tiny"),
            "verified_at": None,
            "indexed": None,
        }
        assert json.loads(cli("show", "tiny_child", "--nl").stdout) == shown

    def test_the_configuration_is_the_one_that_loading_uses(self, cli, cards):
        from lading.cli.output import plain
        from lading.formats.config_json import read_hf_config
        from lading.models.resolve import model_config

        store = lading.get_asset_store()
        families = set()
        for shown in json.loads(cli("show", "*", "--json", code=3).stdout):
            if not shown["config_complete"]:
                assert shown["status"] in ("remote", "unknown-family")
                continue
            family, path = get_family(shown["family"]), shown["checkpoint"]["local_path"]
            hf_config = None if path is None else read_hf_config(Path(path))
            config = model_config(store.retrieve_card(shown["name"]), family, store, hf_config)
            assert shown["config"] == plain(asdict(config)), shown["name"]
            families.add(shown["family"])
        assert families >= {"llama", "qwen", "mistral", "olmo", "gemma3", "bert", "wav2vec2", "wav2vec2_asr"}

    def test_a_card_inherits_from_the_config_json_beside_its_checkpoint(self, cli, tmp_path):
        make(tmp_path / "m")
        text = "name: near\nmodel_family: qwen\ncheckpoint: m\nmodel_config: {dropout_p: 0.2, _del_: [num_layers]}\n"
        (tmp_path / "more.yaml").write_text(
            f"{text}---\nname: far\nmodel_family: qwen\ncheckpoint: hg://a/b\nmodel_config: {{dropout_p: 0.3}}\n"
        )
        cli("import", tmp_path / "more.yaml")
        shown = json.loads(cli("show", "near", "--json").stdout)
        assert shown["config"]["model_dim"] == 32
        kinds = {path: origin["kind"] for path, origin in shown["config_from"].items()}
        assert [path for path, kind in kinds.items() if kind == "card"] == ["dropout_p"]
        assert kinds["model_dim"] == kinds["vocab_size"] == "file"
        # The card takes one back, and transformers' file has no word for the other.
        assert kinds["num_layers"] == kinds["init_std"] == "family"
        assert "model_dim" in cli("show", "near").stdout

        # It is on another machine: nothing of it is known.
        shown = json.loads(cli("show", "far", "--json").stdout)
        assert (shown["config"], shown["config_complete"]) == ({"dropout_p": 0.3}, False)
        assert "configuration  only what cards state" in cli("show", "far").stdout

        # It is damaged, or asks for something that the family does not support.
        for content, problem in (
            ("[", "config.json"),
            ('{"model_type": "qwen3", "hidden_act": "odd"}', "'odd'"),
        ):
            (tmp_path / "m" / "config.json").write_text(content)
            (tmp_path / "more.yaml").write_text("name: near\nmodel_family: qwen\ncheckpoint: m\n")
            cli("import", tmp_path / "more.yaml")
            shown = json.loads(cli("show", "near", "--json").stdout)
            assert problem in shown["problem"]
            assert (shown["config"], shown["config_complete"]) == ({}, False)

    def test_each_value_says_where_it_comes_from(self, cli, cards, tmp_path):
        more = tmp_path / "more.yaml"
        more.write_text(
            "name: scaled\nmodel_family: llama\nmodel_arch: llama3_1_8b\nmodel_config: {rope_scale: {factor: 4}}\n---\n"
            "name: unscaled\nbase: scaled\nmodel_config: {_set_: {rope_scale: {factor: 2}}, num_layers: 1}\n---\n"
            "name: secret\nbase: scaled\nmodel_config: {dropout_p: '${env:RATE:0.1}', größe: 1}\n---\n"
            "name: bare\nbase: scaled\nmodel_config: null\n---\n"
            "name: theirs\nmodel_family: nobody\nmodel_config: {a: {b: 1, c: {}}}\n"
        )
        cli("import", more)

        def origins(name):
            shown = json.loads(cli("show", name, "--json").stdout)
            return shown["config"], {path: (v["kind"], v["name"]) for path, v in shown["config_from"].items()}

        config, found = origins("scaled")
        assert found["model_dim"] == ("family", "llama")
        assert found["rope_scale.factor"] == ("card", "scaled")
        assert found["vocab_size"] == ("architecture", "llama3_1_8b")

        config, found = origins("unscaled")
        assert config["rope_scale"]["factor"] == 2
        assert found["rope_scale.factor"] == found["num_layers"] == ("card", "unscaled")
        rest = {path: origin for path, origin in found.items() if path.startswith("rope_scale.")}
        assert len(rest) > 1, "the defaults of the nested class are there"
        assert {origin for path, origin in rest.items() if path != "rope_scale.factor"} == {("family", "llama")}

        config, found = origins("secret")
        assert config["dropout_p"] == "${env:RATE:0.1}"
        assert found["größe"] == ("card", "secret"), "a mistake is shown, too"
        assert origins("bare")[1]["vocab_size"] == ("architecture", "llama3_1_8b")
        assert {kind for kind, _ in origins("bare")[1].values()} == {"architecture", "family"}

        assert origins("theirs") == (
            {"a": {"b": 1, "c": {}}}, {"a.b": ("card", "theirs"), "a.c": ("card", "theirs")}
        )  # fmt: skip
        assert origins("tiny_tokenizer") == ({}, {})

    def test_of_a_family_that_is_not_installed_it_does_not_ask_for_its_architectures(self, cli, home, tmp_path):
        card = tmp_path / "card.yaml"
        card.write_text("name: far\nmodel_family: nobody\nmodel_arch: base\n")
        cli("import", card)
        shown = json.loads(cli("show", "far", "--json").stdout)
        assert shown["status"] == "unknown-family"
        assert shown["problem"].startswith("No installed package registers a model family named 'nobody'")

    def test_an_overlay_shows_where_it_reaches(self, cli, cards, tmp_path):
        overlay = tmp_path / "mine.yaml"
        overlay.write_text("name: tiny_gated@user\ncheckpoint: ./cards/tiny\n")
        cli("import", overlay)
        shown = json.loads(cli("show", "tiny_gated", "--json").stdout)
        assert shown["status"] == "ready"
        assert shown["fields"]["checkpoint"]["source"] == "mine.yaml[0]"
        assert shown["fields"]["url"]["source"] == "cards.yaml[3]"
        assert json.loads(cli("show", "tiny_gated@", "--json").stdout)["status"] == "gated"

        overlay.write_text("name: tiny_gated@user\ncheckpoint: ./nowhere\n")
        cli("import", overlay)
        shown = json.loads(cli("show", "tiny_gated", "--json").stdout)
        assert shown["status"] == "broken"
        assert "nowhere" in shown["problem"]

        overlay.write_text("name: tiny_gated@user\ncheckpoint: hg://some/where\n")
        cli("import", overlay)
        assert json.loads(cli("show", "tiny_gated", "--json").stdout)["status"] == "remote"

    def test_what_is_wrong_is_said(self, cli, cards, tmp_path):
        assert "but nothing is there" in cli("show", "tiny_gone").stdout
        bad = tmp_path / "bad.yaml"
        bad.write_text("name: bad_arch\nmodel_family: qwen\nmodel_arch: qwen9\ncheckpoint: hg://a/b\n")
        cli("import", bad)
        assert "'qwen9' is not an architecture" in cli("show", "bad_arch").stdout

    def test_a_gated_model_says_where_to_ask(self, cli, cards):
        assert re.search(r"^ask at +https://example.com/ask$", cli("show", "tiny_gated").stdout, re.MULTILINE)

    def test_fields_as_rows(self, cli, cards):
        assert cli("show", "tiny_child", "-q").stdout.split() == [
            "license", "model_config", "model_family", "checkpoint",
        ]  # fmt: skip
        header, *fields = csv.reader(cli("show", "tiny_child", "--csv").stdout.splitlines())
        assert header == ["field", "value", "card", "source"]
        assert ["license", "mit", "tiny_child", "cards.yaml[1]"] in fields

    def test_a_card_that_is_no_model(self, cli, cards):
        shown = json.loads(cli("show", "tiny_tokenizer", "--json").stdout)
        assert shown["family"] is None
        assert shown["status"] is None

    def test_a_name_with_wildcards_is_that_name(self, cli, tmp_path):
        card = tmp_path / "odd.yaml"
        card.write_text("name: 'odd[1]*'\nmodel_family: qwen\ncheckpoint: hg://a/b\n")
        cli("import", card)
        assert json.loads(cli("show", "odd[1]*", "--json").stdout)["status"] == "remote"

    def test_bad_names(self, cli, cards):
        assert "'qwen3_0.6b'" in cli("show", "qwen3-0.6b", code=2).stderr
        assert "tiny_missing" in cli("show", "tiny_dangling", code=3).stderr

    def test_parts_of_a_checkpoint_that_is_not_indexed(self, cli, cards):
        for part in ("--tensors", "--shards"):
            assert "`lading index tiny`" in cli("show", "tiny", part, code=2).stderr


class TestFamilies:
    def test_families(self, cli, cards):
        found = {r["name"]: r for r in rows(cli("families", "--json"))}
        assert found["qwen"]["registered"] is True
        assert found["qwen"]["architectures"] > 10
        assert found["nobody"] == {"name": "nobody", "registered": False, "architectures": 0, "cards": 1}
        assert re.search(r"^nobody +no", cli("families").stdout, re.MULTILINE)

    def test_archs(self, cli):
        found = rows(cli("archs", "mistral", "--json"))
        assert {r["family"] for r in found} == {"mistral"}
        assert all(isinstance(r["overrides"], dict) for r in found)
        assert len(rows(cli("archs", "--json"))) > len(found)
        assert cli("archs", "qwen", "-q").stdout.startswith("qwen25_0.5b\n")

    def test_a_family_without_architectures(self, cli, cards):
        result = cli("archs", "nobody", "-q")
        assert result.stdout == ""
        assert "no architectures" in result.stderr

    def test_an_unknown_family(self, cli):
        assert "'mistral'" in cli("archs", "mistrl", code=2).stderr


class TestPath:
    def test_it_is_printed_alone(self, cli, cards):
        result = cli("path", "tiny")
        assert result.stdout == f"{cards.parent / 'tiny'}\n"
        assert result.stderr == ""

    def test_models_that_are_not_here(self, cli, cards):
        assert "`lading pull tiny_arch@`" in cli("path", "tiny_arch@", code=2).stderr
        assert "`name: tiny_gated@user`" in cli("path", "tiny_gated", code=7).stderr
        assert str(cards.parent / "gone") in cli("path", "tiny_gone", code=2).stderr
        assert "'tiny_child'" in cli("path", "tiny_chld", code=2).stderr

    def test_an_inner_path(self, cli, cards):
        inner = cards.parent / "inner.yaml"
        inner.write_text("name: inner\nbase: tiny\ncheckpoint_path: model.safetensors\n")
        cli("import", inner)
        assert cli("path", "inner").stdout == f"{cards.parent / 'tiny' / 'model.safetensors'}\n"

    def test_a_path_that_is_not_text_comes_out_as_it_is(self, cli, tmp_path, monkeypatch):
        from lading.cards.card import AssetCard
        from lading.catalog.store import AssetStore

        folder = tmp_path / "weights\udc80"
        folder.mkdir()
        card = AssetCard("odd", {"checkpoint": str(folder)})
        monkeypatch.setattr(AssetStore, "maybe_retrieve_card", lambda self, name: card)
        assert cli("path", "odd").stdout_bytes == bytes(tmp_path) + b"/weights\x80\n"


class TestSql:
    def test_the_forms(self, cli):
        query = "select name, length(name) as n from models where name like 'qwen3\\_%' escape '\\' order by 1 limit 2"
        first, second = rows(cli("sql", query, "--json"))
        assert list(first) == ["name", "n"]
        assert cli("sql", query, "-q").stdout == f"{first['name']}\n{second['name']}\n"
        assert cli("sql", query, "--csv").stdout.splitlines()[0] == "name,n"
        assert cli("sql", query).stdout.splitlines()[0].split() == ["name", "n"]

    @pytest.mark.parametrize(
        ("value", "kind"),
        [("5", "integer"), ("-5", "integer"), ("0.5", "real"), ("007", "text"), ("1e9", "text"), ("abc", "text"),
         ("", "text"), ("9" * 30, "text"), ("-", "text")],
    )  # fmt: skip
    def test_parameters(self, cli, value, kind):
        (row,) = rows(cli("sql", "select typeof(:x) as kind, cast(:x as text) as text", "-p", "x", value, "--json"))
        assert row == {"kind": kind, "text": value}

    def test_names_of_parameters_may_have_their_colon(self, cli):
        assert cli("sql", "select :a + :b", "-p", ":a", "1", "-p", "b", "2", "-q").stdout == "3\n"

    @pytest.mark.parametrize("words", [(), ("-",)])
    def test_from_stdin(self, cli, words):
        assert cli("sql", *words, "-q", stdin="select 'ä'").stdout == "ä\n"

    def test_stdin_that_is_not_text(self, cli):
        assert "UTF-8" in cli("sql", "-", stdin=b"select '\xff'", code=2).stderr

    def test_a_limit(self, cli):
        result = cli("sql", "select name from models order by name", "--limit", "2", "-q")
        assert len(result.stdout.splitlines()) == 2
        assert "more rows than these 2" in result.stderr
        assert cli("sql", "select 1", "--limit", "2").stderr == ""
        assert cli("sql", "select 1", "--limit", str(10**30)).stderr == ""

    @pytest.mark.parametrize(
        "query", ["drop table cards", "attach '/tmp/x' as x", "vacuum into '/tmp/x'", "pragma journal_mode = delete"]
    )
    def test_only_reading(self, cli, query):
        cli("sql", query, code=7)

    def test_bad_sql(self, cli):
        assert cli("sql", "selec", code=2).stderr.startswith("lading: error: ")
        cli("sql", "select :missing", code=2)

    def test_the_columns_of_the_views(self, cli):
        rows = json.loads(cli("sql", "--schema", "--json").stdout)
        assert {"view": "models", "column": "status"} in rows
        assert {row["view"] for row in rows} == {"models", "model_tensors", "model_shards", "assets", "unregistered"}
        cli("sql", "select 1", "--schema", code=2)

    def test_a_deadline(self, cli):
        endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n"
        assert "--deadline" in cli("sql", endless, "--deadline", "0.1", code=6).stderr

    @pytest.mark.parametrize("deadline", ["0", "-1", "inf", "nan", "soon"])
    def test_bad_deadlines(self, cli, deadline):
        cli("sql", "select 1", "--deadline", deadline, code=2)


class TestImport:
    CARD = "name: one\nmodel_family: qwen\ncheckpoint: hg://a/b\n"

    def test_a_summary(self, cli, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text(self.CARD + "---\nname: two\nbase: one\n")
        result = cli("import", file)
        assert result.stdout == ""
        assert result.stderr == "lading: 2 added, 0 changed, 0 unchanged, 0 removed\n"

        file.write_text(self.CARD.replace("hg://a/b", "hg://a/c"))
        result = cli("import", "-v", file)
        assert result.stderr.splitlines() == [
            "lading: changed one",
            "lading: removed two",
            "lading: 0 added, 1 changed, 0 unchanged, 1 removed",
        ]
        assert "1 unchanged" in cli("import", file).stderr

    def test_a_dry_run_changes_nothing(self, cli, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text(self.CARD)
        assert "1 added" in cli("import", file, "--dry-run").stderr
        cli("show", "one", code=2)

    def test_folders_lines_and_stdin(self, cli, tmp_path):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "c.yaml").write_text(self.CARD)
        (tmp_path / "d.jsonl").write_text('{"name": "two", "base": "one"}\n{"name": "three", "base": "one"}\n')
        assert "4 added" in cli("import", tmp_path, "-", stdin="name: four\nbase: one\n").stderr
        assert set(cli("list", "-q").stdout.split()) >= {"one", "two", "three", "four"}

    def test_bad_cards_change_nothing_and_are_all_listed(self, cli, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text(self.CARD + "---\nname: 5\n---\nmodel_family: qwen\n")
        result = cli("import", file, code=3)
        assert result.stderr.startswith("lading: error: 2 problems:\n  c.yaml[1].name: ")
        assert "\n  c.yaml[2]: " in result.stderr
        assert result.stderr.endswith("Nothing was imported.\n")
        cli("show", "one", code=2)

    def test_keep_going_takes_the_good_ones(self, cli, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text(self.CARD + "---\nname: 5\n")
        result = cli("import", file, "--keep-going", code=3)
        assert "1 added" in result.stderr
        assert "lading: error: c.yaml[1].name: " in result.stderr
        assert "Nothing was imported" not in result.stderr
        cli("show", "one")

    def test_names_of_another_source(self, cli, tmp_path):
        for name, checkpoint in (("c.yaml", "hg://a/b"), ("d.yaml", "hg://c/d")):
            (tmp_path / name).write_text(self.CARD.replace("hg://a/b", checkpoint))
        cli("import", tmp_path / "c.yaml")
        assert "c.yaml" in cli("import", tmp_path / "d.yaml", code=3).stderr
        cli("import", tmp_path / "d.yaml", "--replace")
        assert json.loads(cli("show", "one", "--json").stdout)["checkpoint"]["uri"] == "hg://c/d"

    def test_warnings_go_to_stderr(self, cli, tmp_path):
        file = tmp_path / "c.yaml"
        file.write_text("name: one\nbase: nowhere\n")
        assert "lading: warning: c.yaml[0]: " in cli("import", file).stderr

    def test_a_file_that_is_not_there(self, cli, tmp_path):
        result = cli("import", tmp_path / "nope.yaml", code=2)
        assert result.stderr == f"lading: error: No such file or directory: {tmp_path / 'nope.yaml'}\n"
        cli("import", code=2)


class TestExport:
    def test_what_comes_out_goes_in(self, cli, cards, tmp_path, monkeypatch):
        out = tmp_path / "elsewhere" / "all.yaml"
        out.parent.mkdir()
        assert "architectures" in cli("export-cards", "-o", out).stderr
        before = rows(cli("list", "--all", "--json"))
        archs = rows(cli("archs", "--json"))

        monkeypatch.setenv("LADING_DATABASE_URL", f"sqlite:///{tmp_path / 'other.sqlite'}")
        cli("import", "--replace", out)

        def essence(found: list[dict]) -> list[dict]:
            return [{k: v for k, v in row.items() if k not in ("source", "problem")} for row in found]

        assert essence(rows(cli("list", "--all", "--json"))) == essence(before)
        assert essence(rows(cli("archs", "--json"))) == essence(archs)

    def test_relative_paths_become_absolute(self, cli, cards):
        text = cli("export-cards", "tiny*").stdout
        assert f"checkpoint: {cards.parent / 'tiny'}\n" in text
        assert f"tokenizer: {cards.parent / 'tokenizer.json'}\n" in text
        assert "hg://somebody/tiny" in text

    def test_overlays_are_part_of_it(self, cli, cards, tmp_path):
        (tmp_path / "mine.yaml").write_text("name: tiny@user\ncheckpoint: ./x\n")
        cli("import", tmp_path / "mine.yaml")
        text = cli("export-cards", "tiny").stdout
        assert "name: tiny@user\n" in text
        assert f"checkpoint: {tmp_path / 'x'}\n" in text

    def test_a_file_is_replaced_whole_and_keeps_its_mode(self, cli, cards, tmp_path):
        out = tmp_path / "out.yaml"
        out.write_text("old " * 10_000)
        out.chmod(0o640)
        cli("export-cards", "tiny", "-o", out)
        assert out.read_text() == cli("export-cards", "tiny", "-o", "-").stdout
        assert out.stat().st_mode & 0o777 == 0o640
        assert sorted(p.name for p in tmp_path.iterdir()) == ["cards", "home", "out.yaml"]

    def test_a_folder_that_is_not_there(self, cli, tmp_path):
        result = cli("export-cards", "qwen*", "-o", tmp_path / "no" / "out.yaml", code=2)
        assert result.stderr == f"lading: error: No such file or directory: {tmp_path / 'no'}\n"

    def test_a_pipe_is_written_to(self, cli, cards, program):
        done = program("export-cards", "tiny", "-o", "/dev/stdout")
        assert done.stdout == cli("export-cards", "tiny").stdout

    def test_nothing_matches(self, cli):
        result = cli("export-cards", "nothing*")
        assert result.stdout == ""
        assert result.stderr == "lading: 0 cards, 0 architectures\n"
        assert "Did you mean 'qwen3_0.6b'" in cli("export-cards", "qwen3-0.6b", code=2).stderr

    def test_a_folder_takes_no_cards(self, cli, tmp_path):
        assert "is a directory" in cli("export-cards", "-o", tmp_path, code=2).stderr


class TestEnv:
    def test_versions_places_and_variables(self, cli, catalog, home, monkeypatch):
        monkeypatch.setenv("LADING_ENV", "user")
        report = json.loads(cli("env", "--json").stdout)
        assert report["lading"] == cli("--version").stdout.split()[1]
        assert report["python"].endswith(platform.python_version())
        assert report["torch"] == version("torch")
        assert report["sqlite"] == sqlite3.sqlite_version
        assert "test" in report["extras"]
        assert report["catalog"] == str(catalog)
        assert Path(report["cache"]).is_relative_to(home)
        assert report["environment"]["LADING_ENV"] == "user"
        lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in cli("env").stdout.splitlines())
        assert lines["catalog"] == str(catalog)
        assert lines["torch"] == version("torch")
        assert lines["LADING_ENV"] == "user"

    def test_no_secrets(self, cli, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hunter2")
        monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@example.com/hub?key=hunter2")
        monkeypatch.setenv("https_proxy", "http://me:hunter2@proxy")
        monkeypatch.setenv("LADING_DATABASE_URL", "postgresql+psycopg://me:hunter2@host/db?sslpassword=hunter2")
        monkeypatch.setenv("LADING_OFLINE", "hunter2")
        report = cli("env", "--json").stdout
        assert "hunter2" not in report + cli("env").stdout
        assert json.loads(report)["catalog"] == "postgresql+psycopg://me:***@host/db"
        assert json.loads(report)["environment"] == {
            **json.loads(report)["environment"],
            "HF_TOKEN": "set, not shown",
            "HF_ENDPOINT": "https://example.com/hub",
            "LADING_OFLINE": "set, not shown",
            "https_proxy": "set, not shown",
        }

    @pytest.mark.parametrize(
        ("variable", "value"), [("LADING_OFFLINE", "perhaps"), ("LADING_DATABASE_URL", "sqlite://host/db")]
    )
    def test_settings_that_are_wrong(self, cli, monkeypatch, variable, value):
        monkeypatch.setenv(variable, value)
        assert variable in json.loads(cli("env", "--json").stdout)["problem"]


class TestDb:
    def test_path(self, cli, catalog, monkeypatch):
        assert cli("db", "path").stdout == f"{catalog}\n"
        monkeypatch.setenv("LADING_DATABASE_URL", "postgresql+psycopg://me:secret@host/db?password=secret")
        assert cli("db", "path").stdout == "postgresql+psycopg://me:***@host/db\n"
        monkeypatch.setenv("LADING_DATABASE_URL", "sqlite://")
        assert cli("db", "path").stdout == "sqlite://\n"

    def test_check(self, cli, catalog):
        assert cli("db", "check").stdout == "ok\n"
        with sqlite3.connect(catalog) as connection:
            connection.execute("DROP VIEW model_shards")
            connection.execute("CREATE TABLE visitor (x)")
        result = cli("db", "check", code=6)
        assert "model_shards" in result.stdout
        assert "visitor" in result.stdout

    def test_upgrade_of_what_is_new_enough(self, cli, catalog):
        assert "already" in cli("db", "upgrade").stderr
        assert [p.name for p in catalog.parent.iterdir() if p.suffix == ".sqlite"] == [catalog.name]

    def test_down_and_up_again(self, cli, catalog):
        result = cli("db", "downgrade", "--to", "0")
        assert "the old catalog is in " in result.stderr
        assert len(list(catalog.parent.glob(f"catalog.v{SCHEMA_VERSION}.*.sqlite"))) == 1
        assert f"from version 0 to {SCHEMA_VERSION}" in cli("db", "upgrade").stderr
        assert cli("db", "check").stdout == "ok\n"
        assert "qwen3_0.6b" in cli("list", "-q").stdout.split()

    def test_a_schema_of_another_version_is_left_alone(self, cli, catalog):
        with sqlite3.connect(catalog) as connection:
            connection.execute("PRAGMA user_version = 99")
        assert "pip install --upgrade" in cli("list", code=6).stderr
        cli("db", "upgrade", code=6)
        assert cli("db", "check", code=6).stdout.count("\n") == 1

    def test_downgrade_to_nowhere(self, cli):
        cli("db", "downgrade", "--to", "77", code=6)
        cli("db", "downgrade", "--to", "-1", code=6)
        assert cli("db", "check").stdout == "ok\n"
        cli("db", "downgrade", code=2)

    def test_backup(self, cli, catalog, tmp_path):
        copy = tmp_path / "copy.sqlite"
        assert cli("db", "backup", copy).stdout == f"{copy}\n"
        with sqlite3.connect(copy) as connection:
            assert connection.execute("SELECT count(*) FROM models").fetchone()[0] > 10
        assert "exists already" in cli("db", "backup", copy, code=6).stderr
        cli("db", "backup", tmp_path / "no" / "copy.sqlite", code=2)

    def test_a_file_that_is_no_catalog(self, cli, catalog):
        catalog.write_bytes(b"not a database at all" * 10)
        for words in (("list",), ("db", "check"), ("db", "upgrade"), ("db", "backup")):
            cli(*words, code=6)


@pytest.mark.parametrize(
    "words",
    [
        ("lst",),
        ("list", "--jsn"),
        ("db", "chek"),
        ("show",),
        ("show", "qwen3_0.6b", "--tensors", "--shards"),
        ("list", "a", "b"),
        ("--nope",),
    ],
)
def test_usage(cli, words):
    result = cli(*words, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("lading: error: ")
    assert result.stderr.count("\n") == 1
    assert re.search(r"[.?)] Run `lading.* --help` for help\.$", result.stderr)


def test_commands_are_suggested(cli):
    assert "Did you mean 'list'" in cli("lst", code=2).stderr
    assert "Did you mean 'check'" in cli("db", "chek", code=2).stderr


@pytest.mark.parametrize(("words", "heading"), [((), "Database:"), (("db",), "Commands:")])
def test_without_a_command_help_is_shown(cli, words, heading):
    result = cli(*words, code=2)
    assert result.stdout == ""
    assert f"\n{heading}\n" in result.stderr


def test_help_lists_commands_in_sections(cli):
    sections = dict(re.findall(r"^([A-Z][\w ]*):\n((?:  .*\n)+)", cli("--help").stdout, re.MULTILINE))
    assert list(sections) == ["Options", "Ask", "Load", "On this machine", "Write", "Cards", "Database"]
    assert "  pull          Fetch" in sections["Load"]
    listed = [line.split()[0] for name, text in sections.items() if name != "Options" for line in text.splitlines()]
    assert sorted(listed) == sorted({words[0] for words in commands() if words})


def test_download_is_pull(cli, cards):
    assert cli("download", "tiny", "--dry-run").stdout == cli("pull", "tiny", "--dry-run").stdout != ""


def commands() -> list[tuple[str, ...]]:
    from lading.cli.app import app
    from lading.cli.command import Group

    def walk(group: Group, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        found = [words]
        import click

        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            found += walk(command, (*words, name)) if isinstance(command, Group) else [(*words, name)]
        return found

    return walk(app, ())


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_and_an_example(cli, words):
    text = cli(*words, "--help").stdout
    assert text.startswith(f"Usage: {' '.join(('lading', *words))}")
    assert "For example: " in text
    assert "..." not in text.partition("Options:")[2]  # no summary is cut
    assert cli(*words, "-h").stdout == text


class TestFailures:
    @pytest.fixture
    def fail(self, monkeypatch):
        from lading.catalog.store import AssetStore

        def arrange(error: BaseException) -> None:
            def families(self):
                raise error

            monkeypatch.setattr(AssetStore, "families", families)

        return arrange

    @pytest.mark.parametrize(
        ("error", "code"),
        [(ZeroDivisionError("x"), 1), (MemoryError(), 8), (PermissionError(13, "no", "/x"), 8),
         (KeyboardInterrupt(), 130), (EOFError("x"), 1), (BrokenPipeError(), 141)],
    )  # fmt: skip
    def test_codes(self, cli, fail, error, code):
        fail(error)
        result = cli("families", code=code)
        assert result.stdout == ""
        assert result.stderr.count("\n") == (0 if code == 141 else 1)

    @pytest.mark.parametrize("words", [("--debug", "families"), ("families", "--debug")])
    def test_debug_shows_the_traceback(self, fail, catalog, words):
        from click.testing import CliRunner

        from lading.cli.app import app

        fail(ZeroDivisionError("x"))
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 1
        assert result.stderr.startswith("Traceback")
        assert "raise error" in result.stderr

    def test_the_logger_is_as_before(self, cli):
        import logging

        log = logging.getLogger("lading")
        before = log.level, list(log.handlers)
        cli("-vv", "list")
        assert (log.level, log.handlers) == before


def test_the_env_of_cards_reaches_the_command_line(cli, cards, tmp_path, monkeypatch):
    (tmp_path / "o.yaml").write_text("name: tiny_arch@cluster\ncheckpoint: ./cards/tiny\n")
    cli("import", tmp_path / "o.yaml")
    assert cli("path", "tiny_arch@cluster").stdout == f"{cards.parent / 'tiny'}\n"
    cli("path", "tiny_arch", code=2)
    monkeypatch.setenv("LADING_ENV", "cluster")
    assert cli("path", "tiny_arch").stdout == f"{cards.parent / 'tiny'}\n"
    monkeypatch.setenv("LADING_ENV", "moon")
    assert "LADING_ENV" in cli("path", "tiny_arch", code=2).stderr


def test_variables_that_say_nothing(cli, cards, tmp_path, monkeypatch):
    more = tmp_path / "more.yaml"
    more.write_text("name: more\nbase: tiny\n")
    gone = tmp_path / "mroe.yaml"
    monkeypatch.setenv("LADING_CARDS", f"{gone}:{more}")
    result = cli("list", "more", "-q")
    assert result.stdout == "more\n"
    says = f"LADING_CARDS names {gone}, which does not exist or cannot be read; "
    says += "its cards stay in the catalog."
    assert result.stderr == f"lading: warning: {says}\n"

    monkeypatch.setenv("LADING_OFFLINE", "maybe")
    result = cli("list", code=2)
    assert result.stderr.startswith("lading: error: LADING_OFFLINE is expected to be one of 1, true, yes, on, y, or of")
    assert len(result.stderr.splitlines()) == 1


def test_a_field_with_nearly_a_known_name_is_a_warning(cli, process, cards, home, tmp_path):
    odd = tmp_path / "odd.yaml"
    odd.write_text(
        "name: a\nmodel_famly: qwen\nnotes: free\n---\nname: b\nmodel_famly: qwen\n---\n"
        "name: c\nlicense: mit\nlicence: mit\n---\nname: c@user\nCheckpoint: x\n"
    )
    shown = cli("import", odd).stderr.splitlines()
    assert shown == [
        "lading: warning: odd.yaml[0] (and 1 more): 'model_famly' is not a known field. Did you mean 'model_family'?",
        "lading: warning: odd.yaml[3]: 'Checkpoint' is not a known field. Did you mean 'checkpoint'?",
        "lading: 4 added, 0 changed, 0 unchanged, 0 removed",
    ]
    assert "model_famly: qwen" in cli("export-cards", "a").stdout

    own = home / "config" / "lading" / "cards"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("name: mine\nbse: tiny\n")
    code = "lading: warning: mine.yaml[0]: 'bse' is not a known field. Did you mean 'base'?\n"
    assert process("list", "mine", "--all", "-q").stderr == code


def test_a_card_whose_file_is_out_of_sight(cli, cards):
    assert "not accessible" not in cli("show", "tiny").stdout
    cards.rename(cards.with_name("elsewhere"))
    assert f"file://{cards} (not accessible; the card is kept as it was)" in cli("show", "tiny").stdout
    assert json.loads(cli("show", "tiny", "--json").stdout)["source"] == f"file://{cards}"
