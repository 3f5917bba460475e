"""`lading index` and `lading load`."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lading import AssetCardError, load_tokenizer
from tests.helpers.make_checkpoint import make


class TestIndex:
    def test_of_a_card(self, cli, cards):
        result = cli("index", "tiny")
        assert result.stdout.splitlines() == [
            f"checkpoint  file://{cards.parent / 'tiny'}",
            "format      safetensors",
            "size        43.6 kB",
            "parameters  21.8K",
            "dtypes      BF16 21.8K",
            "tensors     24 in 1 shard",
        ]
        (row,) = json.loads(cli("list", "tiny", "--json").stdout)
        assert (row["bytes"], row["parameters"], row["dtypes"], row["shards"]) == (43_648, 21_824, "BF16", 1)
        assert "43.6 kB" in cli("list", "tiny").stdout

    def test_for_programs(self, cli, cards):
        indexed = json.loads(cli("index", "tiny", "--json").stdout)
        assert indexed["tensors"] == 24
        assert indexed["dtypes"] == {"BF16": 21_824}
        (shard,) = indexed["shards"]
        assert shard["name"] == "model.safetensors"
        assert json.loads(cli("show", "tiny", "--json").stdout)["checkpoint"]["indexed"] == indexed

    def test_of_a_path(self, cli, tmp_path):
        folder = make(tmp_path / "m", shards=3)
        assert "24 in 3 shards" in cli("index", folder).stdout

    def test_then_its_parts_are_known(self, cli, cards):
        cli("index", "tiny")
        tensors = json.loads(cli("show", "tiny", "--tensors", "--json").stdout)
        assert len(tensors) == 24
        assert tensors[0] == {
            "name": "model.embed_tokens.weight",
            "dtype": "BF16",
            "shape": [100, 32],
            "parameters": 3200,
            "bytes": 6400,
            "shard": "model.safetensors",
            "offset": tensors[0]["offset"],
        }
        assert cli("show", "tiny", "--tensors", "-q").stdout.splitlines() == [t["name"] for t in tensors]
        (shard,) = json.loads(cli("show", "tiny", "--shards", "--json").stdout)
        assert shard["local_path"] == str(cards.parent / "tiny" / "model.safetensors")
        assert "model.safetensors" in cli("show", "tiny", "--shards").stdout
        assert "tensors     24 in 1 shard" in cli("show", "tiny").stdout

    def test_what_cannot_be_indexed(self, cli, cards, tmp_path):
        cli("index", "tiny_gated", code=7)
        cli("index", "tiny_arch", code=5)
        cli("index", "tiny_gone", code=2)
        cli("index", "tiny_gon", code=2)
        cli("index", tmp_path / "nowhere", code=2)
        (tmp_path / "bad.safetensors").write_bytes(b"no header")
        cli("index", tmp_path / "bad.safetensors", code=4)


class TestLoad:
    def test_a_card(self, cli, cards):
        lines = dict(re.split(r" {2,}", line, maxsplit=1) for line in cli("load", "tiny").stdout.splitlines())
        assert lines["name"] == "tiny"
        assert lines["model"] == "Qwen (qwen)"
        assert lines["device"] == "cpu"
        assert lines["parameters"] == "21.8K"
        assert lines["dtypes"] == "float32 21.8K"
        assert lines["tensors"] == "24 in 1 shard"
        assert lines["read"] == "43.6 kB in 1 read"
        assert re.fullmatch(r"\d+\.\d{3} \(.*read \d+\.\d{3}.*\)", lines["seconds"])
        assert re.fullmatch(r"\d+\.\d\d GB/s", lines["speed"])

    @pytest.mark.few(3)
    @pytest.mark.parametrize("dtype", ["auto", "keep", "float64", "float32", "bfloat16", "float16"])
    def test_dtypes(self, cli, cards, dtype):
        report = json.loads(cli("load", "tiny", "--dtype", dtype, "--json").stdout)
        assert report["dtypes"] == {"bfloat16" if dtype in ("auto", "keep") else dtype: 21_824}

    @pytest.mark.few(1)
    @pytest.mark.parametrize("name", ["bf16", "BF16"])
    def test_dtypes_by_short_names(self, cli, cards, name):
        assert json.loads(cli("load", "tiny", "--dtype", name, "--json").stdout)["dtypes"] == {"bfloat16": 21_824}
        assert "bfloat16" in cli("plan", "tiny", "--dtype", name).stdout

    def test_mapped(self, cli, cards):
        report = json.loads(cli("load", "tiny", "--dtype", "auto", "--mmap", "--json").stdout)
        assert (report["bytes_mapped"], report["bytes_read"]) == (43_648, 0)
        assert sum(report["phases"].values()) == pytest.approx(report["seconds"])
        assert report["bytes_per_second"] > 0
        assert "mapped" in cli("load", "tiny", "--dtype", "auto", "--mmap").stdout

    def test_paths(self, cli, tmp_path, monkeypatch):
        make(tmp_path / "folder" / "m", shards=2)
        monkeypatch.chdir(tmp_path / "folder")
        for path in ("./m", "../folder/m", tmp_path / "folder" / "m"):
            assert json.loads(cli("load", path, "--json").stdout)["shards"] == 2
        monkeypatch.setenv("HOME", str(tmp_path / "folder"))
        assert json.loads(cli("load", "~/m", "--json").stdout)["shards"] == 2
        monkeypatch.chdir(tmp_path)
        assert json.loads(cli("load", "folder/m", "--json").stdout)["shards"] == 2

    def test_a_name_wins_over_a_path(self, cli, cards, tmp_path, monkeypatch):
        make(tmp_path / "here" / "tiny", shards=2)
        monkeypatch.chdir(tmp_path / "here")
        assert json.loads(cli("load", "tiny", "--json").stdout)["shards"] == 1
        assert json.loads(cli("load", "./tiny", "--json").stdout)["shards"] == 2

    def test_devices(self, cli, cards):
        assert json.loads(cli("load", "tiny", "--device", "cpu", "--json").stdout)["device"] == "cpu"
        assert "holds no data" in cli("load", "tiny", "--device", "meta", code=2).stderr
        for name in ("toaster", "cuda:99", "mps"):
            result = cli("load", "tiny", "--device", name, code=2)
            assert f"torch cannot use the device '{name}': " in result.stderr
            assert result.stderr.count("\n") == 1

    def test_memory_of_the_device_that_is_spent(self, cli, cards, monkeypatch):
        def load_with_report(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore")

        monkeypatch.setattr("lading.models.hub.load_with_report", load_with_report)
        assert cli("load", "tiny", code=8).stderr.startswith("lading: error: CUDA out of memory. Tried")

    def test_what_cannot_be_loaded(self, cli, cards, tmp_path):
        assert "'tiny'" in cli("load", "tinyy", code=2).stderr
        assert "https://example.com/ask" in cli("load", "tiny_gated", code=7).stderr
        cli("load", "tiny_arch", code=5)
        cli("load", "tiny_unknown", code=3)
        cli("load", "tiny_dangling", code=3)
        cli("load", "tiny_gone", code=2)
        cli("load", tmp_path / "nowhere", code=2)
        assert "'auto', 'keep', 'float64'" in cli("load", "tiny", "--dtype", "int8", code=2).stderr

    def test_overrides_that_do_not_fit_are_all_listed(self, cli, cards, tmp_path):
        bad = tmp_path / "bad.yaml"
        bad.write_text("name: bad\nbase: tiny\nmodel_config: {num_layer: 3, vocab_size: many}\n")
        cli("import", bad)
        result = cli("load", "bad", code=3)
        assert "bad.yaml[0].model_config.num_layer: " in result.stderr
        assert "bad.yaml[0].model_config.vocab_size: " in result.stderr

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            ("dropout_p: 2.0", "`dropout_p` must be in [0, 1), but is 2.0"),
            ("num_attn_heads: 3", "`num_attn_heads` must be a multiple of `num_key_value_heads`"),
            ("num_layers: -1", "`num_layers` must be from 1 to 10000, but is -1"),
            ("num_layers: 1000000000", "`num_layers` must be from 1 to 10000, but is 1000000000"),
        ],
    )
    def test_overrides_that_make_no_model(self, cli, cards, tmp_path, overrides, words):
        bad = tmp_path / "bad.yaml"
        bad.write_text(f"name: bad\nbase: tiny\nmodel_config: {{{overrides}}}\n")
        cli("import", bad)
        for command in (("load",), ("check",), ("plan",)):
            result = cli(*command, "bad", code=3)
            assert words in result.stderr
            assert result.stderr.count("\n") == 1

    def test_a_checkpoint_that_does_not_fit_lists_what_is_wrong(self, cli, cards, tmp_path):
        wide = tmp_path / "wide.yaml"
        wide.write_text("name: wide\nbase: tiny\nmodel_config: {num_layers: 3, vocab_size: 101}\n")
        cli("import", wide)
        result = cli("load", "wide", code=4)
        assert result.stderr.count("\n") > 10
        assert "model.layers.2." in result.stderr
        assert "model.embed_tokens.weight" in result.stderr


@pytest.mark.parametrize("target", ["~no-such-user/x", "x" * 300, "no/such\x01folder"])
def test_names_that_no_file_system_has(cli, home, target):
    result = cli("load", target, code=2)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("form", [(), ("--json",), ("--nl",), ("-q",)], ids=str)
def test_weights_that_do_not_fit_are_an_exit_code(cli, cards, form):
    """43.6 kB over two ranks: some of them replicated."""
    plan = ("plan", "tiny", "--tp", "2", *form)
    cli(*plan)
    assert "44 kB" in cli("plan", "tiny", "--tp", "2", "--dtype", "float32").stdout
    cli(*plan, "--device-memory", "40kB")
    result = cli(*plan, "--device-memory", "10kB", code=4)
    assert result.stdout
    cli(*plan, "--dtype", "float32", "--device-memory", "40kB", code=4)


def test_a_picture_is_no_file_of_another_kind(cli, cards, tmp_path):
    weights = tmp_path / "cards" / "tiny" / "model.safetensors"
    before = weights.read_bytes()
    result = cli("plan", "tiny", "--picture", weights, code=2)
    assert "expected a name that ends in .svg, found 'model.safetensors'" in result.stderr
    assert weights.read_bytes() == before


WRONG = (
    "hg://org//x",
    "hg:org/name",
    "hg://a@re..v",
    "https://host/",
    "https:///x.safetensors",
    "https://[::1/x.safetensors",
    "https://host:port/x.safetensors",
    "https://ho st/x.safetensors",
)


def test_an_address_that_is_none(cli, home, tmp_path):
    cards = tmp_path / "cards.yaml"
    cards.write_text(
        "---\n".join(f"name: wrong{i}\nmodel_family: qwen\ncheckpoint: '{uri}'\n" for i, uri in enumerate(WRONG))
        + "---\nname: read\nmodel_family: qwen\ncheckpoint: hg://org/name\ntokenizer: hg://org//x\n"
    )
    cli("import", cards)
    for i, uri in enumerate(WRONG):
        for command in ("index", "pull", "verify", "path"):
            result = cli(command, f"wrong{i}", code=3)
            assert f"'checkpoint' of the card 'wrong{i}' is not a valid address" in result.stderr
        if "://" in uri:
            typed = cli("index", uri, code=2)
            assert ": expected " in typed.stderr
            assert len(typed.stderr.splitlines()) == 1
    assert "secret" not in cli("index", "https://me:secret@host/", code=2).stderr
    with pytest.raises(AssetCardError, match="'tokenizer' of the card 'read' is not a valid address"):
        load_tokenizer("read")


def test_the_page_of_a_gated_model_is_no_address_that_is_wrong(cli, home, tmp_path):
    # fairseq2's cards say it so; whoever was given the weights says so by an overlay.
    cards = tmp_path / "cards.yaml"
    gated = "https://example.com/ask/;gated=true"
    cards.write_text(f"name: asked\nmodel_family: qwen\ncheckpoint: {gated}\ntokenizer: {gated}\n")
    cli("import", cards)
    for command in ("index", "pull", "verify", "path", "check", "load"):
        result = cli(command, "asked", code=7)
        assert "'asked' is a gated model" in result.stderr
        assert "https://example.com/ask/" in result.stderr


def test_the_card_of_a_data_set_is_of_no_gated_model(cli, home, tmp_path):
    cards = tmp_path / "cards.yaml"
    cards.write_text("name: speech\ndataset_family: generic_asr\n")
    cli("import", cards)
    for command in ("index", "pull", "verify", "path", "check", "load", "plan"):
        result = cli(command, "speech", code=3)
        lacks = "The card 'speech' and its bases have no field 'model_family' (cards.yaml[0])."
        assert result.stderr == f"lading: error: {lacks} State it in the card.\n"


def test_an_environment_of_no_card(cli, cards):
    for name, known in (("tiny@usr", "Known: user. Did you mean 'user'?"), ("tinny@usr", "Did you mean 'tiny'")):
        for command in ("load", "show", "pull", "export"):
            words = (command, name) if command != "export" else (command, name, "out")
            assert known in cli(*words, code=2).stderr
