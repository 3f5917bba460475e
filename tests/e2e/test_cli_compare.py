"""`lading check` and `lading diff`."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import lading
from lading.catalog.checkpoints.record import record_checkpoint
from lading.catalog.records import CheckpointContents
from lading.errors import AssetCardError, AssetNotFoundError, FetchError, ModelGatedError
from tests.helpers.make_checkpoint import make, tensors
from tests.servers.hub import FakeHub

WIDE = "name: wide\nbase: tiny\nmodel_config: {vocab_size: 101, num_layers: 3}\n"
REMOTE = "name: remote\nbase: tiny\ncheckpoint: hg://somebody/tiny\n---\n"
REMOTE += "name: inner\nbase: remote\ncheckpoint_path: in/here\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("LADING_OFFLINE", "1")


@pytest.fixture
def remote(cli, cards, tmp_path):
    """A card whose checkpoint is not here; the catalog knows what it holds."""
    (tmp_path / "remote.yaml").write_text(REMOTE)
    cli("import", tmp_path / "remote.yaml")
    manifest = lading.index_checkpoint("tiny").manifest
    database = lading.get_asset_store().database
    record_checkpoint(database, CheckpointContents(uri="hg://somebody/tiny", manifest=manifest, revision="abc"))


def set_digests(uri: str, **others: str) -> None:
    """Say that a checkpoint was verified, and give each tensor a digest made from its name."""
    with lading.get_asset_store().database.write() as connection:
        key = "checkpoint_id = (SELECT id FROM checkpoints WHERE uri = ?)"
        connection.exec_driver_sql(f"UPDATE tensors SET digest = 'of ' || name WHERE {key}", (uri,))
        connection.exec_driver_sql(f"UPDATE copies SET verified_at = '2026-01-02T03:04:05Z' WHERE {key}", (uri,))
        for name, digest in others.items():
            statement = f"UPDATE tensors SET digest = ? WHERE {key} AND name LIKE ?"
            connection.exec_driver_sql(statement, (digest, uri, f"%{name}.weight"))


class TestCheck:
    def test_a_card(self, cli, cards):
        assert cli("check", "tiny").stdout.splitlines() == [
            "ok",
            "family      qwen",
            "parameters  21.8K",
            "size        43.6 kB",
            "tensors     24 of 24 are needed",
        ]

    def test_a_folder(self, cli, tmp_path):
        folder = make(tmp_path / "m", shards=3)
        state = {**tensors(), "lm_head.weight": tensors()["model.embed_tokens.weight"]}
        state |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(5)}
        (folder / "model.safetensors.index.json").unlink()
        save_file(state, folder / "model.safetensors")

        lines = cli("check", folder).stdout.splitlines()
        assert lines[-3] == "tensors     24 of 30 are needed"
        assert lines[-2] == "tied        lm_head.weight"
        assert lines[-1].startswith("dropped     model.layers.0.self_attn.rotary_emb.inv_freq, ")
        assert lines[-1].endswith(" and 2 more")

    def test_one_that_does_not_fit(self, cli, cards, tmp_path):
        (tmp_path / "wide.yaml").write_text(WIDE)
        cli("import", tmp_path / "wide.yaml")
        result = cli("check", "wide", code=4)
        lines = result.stdout.splitlines()
        assert len(lines) == 12
        assert lines[0] == "missing: model.layers.2.self_attn.q_proj.weight [32, 32]"
        assert lines[-1] == "mis-shaped: model.embed_tokens.weight is expected to be [101, 32], but is [100, 32]"
        assert not result.stderr

        report = json.loads(cli("check", "wide", "--json", code=4).stdout)
        assert (report["name"], report["fits"], report["problems"]) == ("wide", False, lines)
        # A load says the same.
        assert all(line in cli("load", "wide", code=4).stderr for line in lines)

    def test_for_programs(self, cli, cards):
        report = json.loads(cli("check", "tiny", "--json").stdout)
        assert report == {
            "name": "tiny", "fits": True, "family": "qwen", "problems": [], "quantized": {}, "tensors": 24,
            "matched": 24, "tied": {}, "dropped": [], "drawn": [], "parameters": 21_824, "bytes": 43_648,
            "advice": "", "contradictions": [],
        }  # fmt: skip

    def test_what_transformers_draws(self, cli, tmp_path):
        """Positions that are computed, which its checkpoints lack, and a bias that is zero, which they may lack."""
        from transformers import MarianConfig, MarianMTModel

        sizes = {"d_model": 32, "vocab_size": 64, "decoder_vocab_size": 64, "max_position_embeddings": 16}
        sizes |= {f"{part}_{key}": n for part in ("encoder", "decoder")
                  for key, n in {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
        MarianMTModel(MarianConfig(**sizes, pad_token_id=0, eos_token_id=2)).save_pretrained(tmp_path / "m")
        state = load_file(tmp_path / "m" / "model.safetensors")
        del state["final_logits_bias"]
        save_file(state, tmp_path / "m" / "model.safetensors")

        positions = [f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")]
        drawn = ["final_logits_bias", *positions]
        report = json.loads(cli("check", tmp_path / "m", "--json").stdout)
        assert (report["fits"], report["problems"], sorted(report["drawn"])) == (True, [], sorted(drawn))
        last = cli("check", tmp_path / "m").stdout.splitlines()[-1]
        assert last.startswith("initialized  ")
        assert sorted(last.removeprefix("initialized  ").split(", ")) == sorted(drawn)

        # What a user has to decide on is a problem: a head, or the weights of a layer.
        state.pop(next(name for name in state if "fc1.weight" in name))
        save_file(state, tmp_path / "m" / "model.safetensors")
        report = json.loads(cli("check", tmp_path / "m", "--json", code=4).stdout)
        assert len(report["problems"]) == 1
        assert sorted(report["drawn"]) == sorted(drawn)

    def test_one_that_is_not_here(self, cli, remote):
        assert cli("check", "remote").stdout.startswith("ok\n")
        # What is at a path inside the source is not what the catalog knows of all of it.
        cli("check", "inner", code=5)

    def test_headers_are_read_where_they_are(self, cards, process, tmp_path):
        with FakeHub() as hub:
            hub.add("somebody/tiny", make(tmp_path / "hub", shards=3))
            env = {"LADING_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
            (tmp_path / "remote.yaml").write_text(REMOTE)
            process("import", tmp_path / "remote.yaml")

            first = process("check", "remote", env=env)
            assert (first.returncode, first.stdout.splitlines()[0]) == (0, "ok"), first.stderr
            asked = len(hub.requests)
            assert asked > 0
            assert not list((tmp_path / "hf").rglob("*.safetensors"))

            # The catalog knows it from now on.
            assert process("check", "remote", env=env).returncode == 0
            assert process("diff", "remote", "tiny", env=env).stderr.startswith("lading: no difference in names")
            assert len(hub.requests) == asked

    def test_what_cannot_be_checked(self, cli, cards, tmp_path):
        cli("check", "tiny_arch", code=5)
        cli("check", "tiny_gated", code=7)
        cli("check", "tiny_unknown", code=3)
        cli("check", "tiny_gone", code=2)
        cli("check", "tiny_gon", code=2)
        cli("check", tmp_path / "nowhere", code=2)
        quantized = make(tmp_path / "q", quantization_config={"quant_method": "fp8"})
        assert "'fp8'" in cli("check", quantized, code=2).stderr

    def test_from_python(self, cards, tmp_path):
        assert lading.check_model("tiny").fits
        assert lading.check_model(lading.get_asset_store().retrieve_card("tiny")).fits
        assert lading.check_model(cards.parent / "tiny").fits
        for name, error in (
            ("nope", AssetNotFoundError),
            ("tiny_unknown", AssetCardError),
            ("tiny_gated", ModelGatedError),
            ("tiny_arch", FetchError),
        ):
            with pytest.raises(error):
                lading.check_model(name)


class TestDiff:
    def test_two_that_are_the_same(self, cli, cards, tmp_path):
        result = cli("diff", "tiny", make(tmp_path / "m", shards=2))
        assert not result.stdout
        assert result.stderr.startswith(
            "lading: no difference in names, shapes and dtypes; 24 tensors of the same shape and dtype (values not "
            "compared); `lading verify"
        )

    @pytest.mark.parametrize("option", ["--json", "--nl", "--csv"])
    def test_programs_see_that_no_value_was_compared(self, cli, cards, tmp_path, option):
        """An empty list would say that all is equal."""
        state = tensors()
        make(tmp_path / "m")
        save_file(
            {**state, "model.norm.weight": torch.zeros(32, dtype=torch.bfloat16)}, tmp_path / "m" / "model.safetensors"
        )
        folder = cards.parent / "tiny"

        result = cli("diff", folder, tmp_path / "m", option)
        assert "values not compared" in result.stderr
        assert result.stdout.count("not compared") == len(state)
        if option == "--json":
            rows = json.loads(result.stdout)
            assert rows[0] == {"name": min(state), "change": "not compared", "a": None, "b": None}
        assert not cli("diff", folder, tmp_path / "m", "-q").stdout

        # Once the values of both are known, the one that differs is all.
        for path in (folder, tmp_path / "m"):
            lading.index_checkpoint(path)
            set_digests(f"file://{path}", **({"norm": "other"} if path != folder else {}))
        result = cli("diff", folder, tmp_path / "m", option)
        assert "not compared" not in result.stdout
        assert "model.norm.weight" in result.stdout
        assert "0 not compared" in cli("diff", folder, tmp_path / "m").stderr

    def test_two_that_differ(self, cli, cards, tmp_path):
        state = tensors()
        state["model.norm.weight"] = torch.zeros(33)
        state["extra"] = state.pop("model.layers.1.mlp.up_proj.weight")
        make(tmp_path / "m")
        save_file(state, tmp_path / "m" / "model.safetensors")

        result = cli("diff", "tiny", tmp_path / "m")
        assert result.stdout.splitlines() == [
            "name                               change     a              b",
            "model.layers.1.mlp.up_proj.weight  only in A  BF16 [64, 32]  -",
            "model.norm.weight                  shape      [32]           [33]",
            "model.norm.weight                  dtype      BF16           F32",
            "extra                              only in B  -              BF16 [64, 32]",
        ]
        assert result.stderr.startswith("lading: 4 differences; 22 tensors ")
        assert json.loads(cli("diff", "tiny", tmp_path / "m", "--json").stdout)[0] == {
            "name": "model.layers.1.mlp.up_proj.weight",
            "change": "only in A",
            "a": {"dtype": "BF16", "shape": [64, 32]},
            "b": None,
        }
        assert cli("diff", "tiny", tmp_path / "m", "-q").stdout.splitlines()[-1] == "extra"
        assert (
            cli("diff", "tiny", tmp_path / "m", "--csv").stdout.splitlines()[2] == "model.norm.weight,shape,[32],[33]"
        )

    def test_values(self, cli, cards, remote):
        folder = cards.parent / "tiny"
        assert "(values not compared)" in cli("diff", "tiny", "remote").stderr
        set_digests(f"file://{folder}")
        set_digests("hg://somebody/tiny", q_proj="other")

        result = cli("diff", "tiny", "remote")
        assert [line.split() for line in result.stdout.splitlines()[1:]] == [
            [name, "values", "of", name, "other"] for name in tensors() if "q_proj" in name
        ]
        assert "(values: 22 equal, 2 different, 0 not compared)" in result.stderr
        assert "(values: 22 equal, 2 different, 0 not compared)" in cli("diff", folder, "remote").stderr

        # What was known of a file is not known of one that looks changed, also once that was noticed.
        os.utime(folder / "model.safetensors")
        for target in (folder, "tiny", folder, "tiny"):
            assert "(values not compared)" in cli("diff", target, "remote").stderr

    def test_architectures(self, cli, cards):
        rows = [
            json.loads(line) for line in cli("diff", "qwen/qwen3_0.6b", "qwen/qwen3_1.7b", "--nl").stdout.splitlines()
        ]
        assert rows[:2] == [
            {"name": "model_dim", "change": "config", "a": 1024, "b": 2048},
            {"name": "ffn_inner_dim", "change": "config", "a": 3072, "b": 6144},
        ]
        assert {row["change"] for row in rows[2:]} == {"shape"}
        result = cli("diff", "qwen/qwen3_0.6b", "qwen/qwen3_0.6b")
        assert not result.stdout
        assert "no difference" in result.stderr

    def test_what_cannot_be_compared(self, cli, cards, tmp_path):
        assert "lading check" in cli("diff", "tiny", "qwen/qwen3_0.6b", code=2).stderr
        assert "'qwen3_0.6b'" in cli("diff", "qwen/qwen3_0.6", "qwen/qwen3_0.6b", code=2).stderr
        cli("diff", "tiny", "tiny_arch", code=5)
        cli("diff", "tiny_gated", "tiny", code=7)
        cli("diff", "tiny", "nobody", code=2)
        cli("diff", "tiny", "nobody/nothing", code=2)
        cli("diff", "tiny", tmp_path / "nowhere", code=2)
        cli("diff", "tiny", code=2)

    def test_a_folder_may_have_the_name_of_a_family(self, cli, cards, tmp_path, monkeypatch):
        make(tmp_path / "here" / "qwen" / "mine")
        monkeypatch.chdir(tmp_path / "here")
        assert "no difference" in cli("diff", "tiny", "qwen/mine").stderr

    def test_from_python(self, cards):
        assert lading.diff_models("tiny", cards.parent / "tiny").changes == ()
        assert lading.diff_models("qwen/qwen3_0.6b", "qwen/qwen3_0.6b").same > 300
