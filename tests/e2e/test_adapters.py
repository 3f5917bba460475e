"""LoRA adapters that cards add to a base: loaded, checked, planned, fetched, verified and exported."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

import lading
from lading.errors import (
    AssetCardError,
    CheckpointNotFoundError,
    DigestMismatchError,
    LadingError,
    ModelCheckpointMismatchError,
    NotSupportedError,
)
from lading.models.hub import load_with_report
from tests.helpers.make_adapter import (
    ADAPTER,
    Q_PROJ,
    SIZES,
    factors,
    train,
    train_model,
    within_one_ulp,
    write_adapter,
)
from tests.helpers.make_checkpoint import CARD_CONFIG, make, tensors
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]
Run = Callable[..., subprocess.CompletedProcess[str]]

HG = "model_config: {model_type: causal_lm}\n"
LLAMA = """\
model_config: {model_dim: 32, max_seq_len: 64, vocab_size: 64, num_layers: 2, num_attn_heads: 4,
  num_key_value_heads: 2, ffn_inner_dim: 48, ffn_inner_dim_scale: 1.0, ffn_inner_dim_multiple_of: 1}
"""


def add(cli: Cli, folder: Path, fields: str, *, family: str = "qwen", config: str = CARD_CONFIG) -> None:
    """Import the card ``base`` of a folder's ``base``, and the card ``tuned`` with ``fields`` on top."""
    cards = f"name: base\nmodel_family: {family}\ncheckpoint: base\n{config}---\nname: tuned\nbase: base\n{fields}\n"
    (folder / "cards.yaml").write_text(cards)
    cli("import", folder / "cards.yaml")


def load(name: str = "tuned", **options: Any) -> dict[str, Tensor]:
    options = {"dtype": torch.float32, "progress": False} | options

    return dict(lading.load_model(name, **options).state_dict())


def one_weight(folder: Path, **config: object) -> Tensor:
    """Write a base and an adapter of one of its weights; return what is to be added to it."""
    make(folder / "base")
    two = factors(Q_PROJ, 32, 32)
    write_adapter(folder / "lora", two, **config)
    a, b = two.values()

    return b @ a * 2.0


# --- as PEFT merges them ----------------------------------------------------------------------------------------------

ALL = {"target_modules": "all-linear"}
EMBEDDINGS = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("model", "family", "lora"),
    [
        ("Llama", "llama", ALL | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*k_proj": 3}}),
        ("Llama", "hg", {"target_modules": r".*\.[qv]_proj", "use_rslora": True}),
        ("Llama", "hg", {"target_modules": ["q_proj"], "layers_to_transform": [1], "bias": "all"}),
        ("Llama", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("Llama", "llama", EMBEDDINGS),
        ("Qwen2", "hg", {"target_modules": ["q_proj"], "bias": "all"}),
        ("Qwen2", "hg", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("GPT2", "hg", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    ],
)
def test_a_load_equals_a_merge_of_peft(cli: Cli, tmp_path: Path, model: str, family: str, lora: dict[str, Any]) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64} if model == "GPT2" else SIZES
    train(tmp_path, model, sizes=sizes, **lora)
    add(cli, tmp_path, "adapter: adapter", family=family, config=LLAMA if family == "llama" else HG)

    found, expected = load(), torch.load(tmp_path / "merged.pt")
    assert found.keys() >= expected.keys()
    assert [name for name in expected if not within_one_ulp(found[name], expected[name])] == []


def test_convolutions(cli: Cli, tmp_path: Path) -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
        conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=20,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForCTC(config)
    model.save_pretrained(tmp_path / "base")
    train_model(tmp_path, model, target_modules=["conv_layers.1.conv", "q_proj"], modules_to_save=["lm_head"])
    add(cli, tmp_path, "adapter: adapter", family="wav2vec2_asr", config="")

    found, expected = load(), torch.load(tmp_path / "merged.pt")
    assert [name for name in found if not within_one_ulp(found[name], expected[name])] == []


def test_a_classifier_on_a_base_without_a_head(cli: Cli, tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config)
    model.bert.save_pretrained(tmp_path / "base")
    train_model(tmp_path, model, task_type="SEQ_CLS", target_modules=["query"])
    custom = "{model_type: custom, custom_model_class: BertForSequenceClassification, hf_config: {num_labels: 3}}"
    add(cli, tmp_path, "adapter: adapter", family="hg", config=f"model_config: {custom}\n")

    found, expected = load(), torch.load(tmp_path / "merged.pt")
    assert [name for name in expected if not within_one_ulp(found[name], expected[name])] == []
    cli("check", "base", code=4)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_tied_embedding_stays_tied(cli: Cli, tmp_path: Path, module: str) -> None:
    train(tmp_path, "Qwen3", sizes=SIZES | {"tie_word_embeddings": True}, target_modules=["q_proj", module])
    add(cli, tmp_path, "adapter: adapter", family="hg", config=HG)

    found, expected = load(), torch.load(tmp_path / "merged.pt")
    assert [name for name in expected if not within_one_ulp(found[name], expected[name])] == []
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_the_sum_is_rounded_once(cli: Cli, tmp_path: Path) -> None:
    delta = one_weight(tmp_path)
    state = {name: tensor.float() + 1e-3 for name, tensor in tensors().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    add(cli, tmp_path, "adapter: lora")
    name = f"{Q_PROJ}.weight"

    assert torch.equal(load(dtype=torch.bfloat16)[name], (state[name] + delta).bfloat16())
    assert torch.equal(load(dtype=torch.float64)[name], (state[name].double() + load_delta(tmp_path)))


def load_delta(folder: Path) -> Tensor:
    a, b = (tensor.double() for _, tensor in sorted(load_file(folder / "lora" / ADAPTER).items()))

    return b @ a * 2.0


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "options", [{}, {"mmap": True}, {"verify": "always"}, {"cooperative": True}, {"dtype": "keep"}]
)
def test_only_the_weights_of_an_adapter_change(cli: Cli, tmp_path: Path, options: dict[str, Any]) -> None:
    delta, name = one_weight(tmp_path), f"{Q_PROJ}.weight"
    add(cli, tmp_path, "adapter: lora")
    options = {"dtype": torch.bfloat16} | options

    before, found = load("base", **options), load(**options)
    assert torch.equal(found[name], (before[name].float() + delta).bfloat16())
    assert all(torch.equal(found[other], before[other]) for other in before if other != name)
    assert torch.equal(load("base", **options)[name], before[name])  # a mapped file stays as it is

    _, report = load_with_report("tuned", progress=False, **options)
    assert report.adapters == (str(tmp_path / "lora" / ADAPTER),)
    if "mmap" in options:
        assert report.bytes_mapped == sum(t.nbytes for t in tensors().values()) - before[name].nbytes


def test_large_weights_are_merged_in_slabs(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, "Llama", **EMBEDDINGS, modules_to_save=["norm"])
    add(cli, tmp_path, "adapter: adapter", family="llama", config=LLAMA)
    monkeypatch.setattr("lading.models.merge._SLAB", 100)
    monkeypatch.setattr("lading.models.merge._BATCH", 1_000)

    found, expected = load(), torch.load(tmp_path / "merged.pt")
    assert [name for name in expected if not within_one_ulp(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_merge_is_as_precise_whatever_the_process_allows(process: Run, cli: Cli, tmp_path: Path) -> None:
    delta = one_weight(tmp_path)
    add(cli, tmp_path, "adapter: lora")
    torch.save(load("base")[f"{Q_PROJ}.weight"] + delta, tmp_path / "expected.pt")
    code = """if True:
        import sys, torch, lading
        expected, name = torch.load(sys.argv[1]), sys.argv[2]
        for allow in (
            lambda: torch.set_float32_matmul_precision("medium"),
            lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        ):
            allow()
            before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
            assert before[0] == "tf32"
            found = lading.load_model("tuned", dtype=torch.float32, progress=False).state_dict()[name]
            assert torch.equal(found, expected)
            assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    """
    done = process("-c", code, tmp_path / "expected.pt", f"{Q_PROJ}.weight")
    assert done.returncode == 0, done.stderr


def test_several_adapters_with_weights(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    more = factors(Q_PROJ, 32, 32, seed=5)
    write_adapter(tmp_path / "more", more | factors("model.layers.1.mlp.up_proj", 64, 32))
    listed = "adapters: [{checkpoint: lora, weight: 0.5}, {checkpoint: more/adapter_model.safetensors, weight: -2}]"
    add(cli, tmp_path, listed)
    name = f"{Q_PROJ}.weight"

    a, b = more.values()
    expected = load("base")[name].double() + 0.5 * load_delta(tmp_path) - 2 * 2.0 * (b.double() @ a.double())
    torch.testing.assert_close(load()[name].double(), expected, rtol=1e-5, atol=1e-5)

    shown = json.loads(cli("show", "tuned", "--json").stdout)
    assert [each["weight"] for each in shown["adapters"]] == [0.5, -2.0]
    assert "-2 × " in cli("show", "tuned").stdout


def test_names_without_the_prefix_of_the_head(cli: Cli, tmp_path: Path) -> None:
    """An adapter of transformers' model without its head."""
    make(tmp_path / "base")
    a, b = factors("x", 32, 32).values()
    short = Q_PROJ.removeprefix("model.")
    write_adapter(tmp_path / "lora", {f"{short}.lora_A.weight": a, f"{short}.lora_B.weight": b})
    add(cli, tmp_path, "adapter: lora")

    name = f"{Q_PROJ}.weight"
    assert torch.equal(load()[name], load("base")[name] + b @ a * 2.0)


def test_the_way_of_the_weight_through_joined_and_stacked_tensors(cli: Cli, tmp_path: Path) -> None:
    """One expert of four, which transformers stores one by one, and joins in memory."""
    import transformers

    sizes = SIZES | {"num_local_experts": 4}
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    base.save_pretrained(tmp_path / "base")
    module = "model.layers.1.block_sparse_moe.experts.2.w3"
    two = factors(module, 48, 32)
    write_adapter(tmp_path / "lora", two)
    add(cli, tmp_path, "adapter: lora", family="hg", config=HG)

    before, found = load("base"), load()
    a, b = two.values()
    (name,) = [name for name in before if not torch.equal(before[name], found[name])]
    assert name == "model.layers.1.mlp.experts.gate_up_proj"
    before[name][2, 48:] += b @ a * 2.0
    assert torch.equal(found[name], before[name])


def test_a_head_that_the_base_lacks(cli: Cli, tmp_path: Path) -> None:
    """A larger vocabulary, which was trained whole: nothing of the old one is used."""
    make(tmp_path / "base")
    table, head = torch.randn(104, 32), torch.randn(104, 32)
    names = {"model.embed_tokens.weight": table, "lm_head.weight": head}
    write_adapter(tmp_path / "lora", names, modules_to_save=["embed_tokens", "lm_head"])
    add(cli, tmp_path, "adapter: lora\nmodel_config: {vocab_size: 104, tied_embeddings: false}")

    found = load()
    assert torch.equal(found["model.embed_tokens.weight"], table)
    assert torch.equal(found["lm_head.weight"], head)
    assert json.loads(cli("check", "tuned", "--json").stdout)["fits"]

    cli("export", "tuned", tmp_path / "out", "--no-progress")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head.bfloat16())


# --- commands ---------------------------------------------------------------------------------------------------------


def test_commands(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    add(cli, tmp_path, "adapter: lora")
    file = str(tmp_path / "lora" / ADAPTER)

    assert cli("check", "tuned").stdout.startswith("ok")
    assert "512 B of adapters on each rank" in cli("plan", "tuned", "--tp", "2").stderr
    assert cli("path", "tuned").stdout.splitlines() == [str(tmp_path / "base"), file]
    pulled = json.loads(cli("pull", "tuned", "--json", "--no-progress").stdout)
    assert [each["name"] for each in pulled] == ["model.safetensors", f"adapter: {ADAPTER}"]
    cli("load", "tuned", "--no-progress")
    checks = json.loads(cli("verify", "tuned", "--json", "--no-progress").stdout)
    assert [Path(check["file"]).name for check in checks] == ["model.safetensors", ADAPTER]
    held = json.loads(cli("du", "tuned", "--json").stdout)
    assert {Path(each["path"]).name for each in held} == {"model.safetensors", ADAPTER}
    assert file.removesuffix(f"/{ADAPTER}") in cli("show", "tuned").stdout
    assert "file:" in cli("sql", f"SELECT uri FROM checkpoints WHERE uri LIKE '%{ADAPTER}'", "--csv").stdout

    cli("export", "tuned", tmp_path / "out", "--dtype", "float32", "--no-progress")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    found = load()
    assert all(torch.equal(tensor, found[name]) for name, tensor in exported.items())


def test_an_adapter_that_changed_is_noticed(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    add(cli, tmp_path, "adapter: lora")
    load()
    write_adapter(tmp_path / "lora", factors(Q_PROJ, 32, 32, seed=9))

    with pytest.raises(DigestMismatchError, match=r"lading index \S+adapter_model.safetensors"):
        load()
    cli("verify", "tuned", "--no-progress", code=4)
    load(verify="never")
    cli("index", tmp_path / "lora" / ADAPTER)
    load()


@contextmanager
def published(folder: Path) -> Iterator[dict[str, str]]:
    """Publish the base and the adapter in a folder on a hub; yield the environment that leads there."""
    with FakeHub() as hub:
        hub.add("some/base", folder / "base")
        hub.add("some/lora", folder / "lora")
        yield {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(folder / "hub"), "LADING_OFFLINE": ""}


def test_an_adapter_of_a_hub(process: Run, tmp_path: Path) -> None:
    one_weight(tmp_path, base_model_name_or_path="some/base")
    (tmp_path / "cards.yaml").write_text(
        f"name: far\nmodel_family: qwen\ncheckpoint: hg://some/base\nadapter: hg://some/lora\n{CARD_CONFIG}---\n"
        f"name: near\nbase: far\ncheckpoint: base\nadapter: lora\n"
    )
    with published(tmp_path) as env:
        process("import", tmp_path / "cards.yaml", env=env)
        process("check", "far", env=env)
        assert "adapter_config.json" in process("pull", "far", "--dry-run", "--no-progress", env=env).stdout
        process("pull", "far", "--no-progress", env=env)

    # Everything is here, its configuration too.
    env["LADING_OFFLINE"] = "1"
    for name in ("far", "near"):
        done = process("export", name, tmp_path / f"{name}-out", "--no-progress", env=env)
        assert "was trained on" not in done.stderr
    found, expected = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("far", "near"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(process("path", "far", env=env).stdout.splitlines()) == 2
    held = json.loads(process("du", "far", "--json", env=env).stdout)
    assert all(each["complete"] and each["verified"] for each in held)
    assert len(held) == 2


def test_an_adapter_of_a_hub_gets_a_card(process: Run, tmp_path: Path) -> None:
    one_weight(tmp_path, base_model_name_or_path="some/base")
    (tmp_path / "lora" / "README.md").write_text("---\nlicense: mit\n---\n")
    shutil.copytree(tmp_path / "lora", tmp_path / "incomplete")
    (tmp_path / "incomplete" / "adapter_config.json").unlink()
    with published(tmp_path) as env, FakeHub() as other:
        other.add("some/incomplete", tmp_path / "incomplete")
        assert "--set base=NAME" in process("add", "hg://some/lora", env=env).stderr
        (row, adapter) = json.loads(process("add", "hg://some/base", "hg://some/lora", "--json", env=env).stdout)
        assert (row["name"], row["status"]) == ("base", "added")
        assert (adapter["name"], adapter["status"], adapter["family"]) == ("lora", "added", "qwen")
        assert (adapter["license"], adapter["bytes"]) == ("mit", 512)
        again = process("add", "hg://some/lora", "hg://some/base", "-q", env=env)
        assert (again.stdout, "2 unchanged" in again.stderr) == ("lora\nbase\n", True)
        assert json.loads(process("show", "lora", "--json", env=env).stdout)["fields"]["adapter"]["value"] == (
            "hg://some/lora"
        )
        process("pull", "lora", "--no-progress", env=env)
        (tmp_path / "cards.yaml").write_text("name: near\nbase: base\nadapter: lora\n")
        process("import", tmp_path / "cards.yaml", env=env)
        for name in ("lora", "near"):
            process("export", name, tmp_path / f"{name}-out", "--no-progress", env=env)
        env["HF_ENDPOINT"] = other.url
        assert process("add", "hg://some/incomplete", env=env).returncode == 2
    found, expected = (load_file(tmp_path / f"{name}-out" / "model.safetensors") for name in ("lora", "near"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_file_of_an_adapter_is_its_card_s(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    add(cli, tmp_path, "adapters: [{checkpoint: lora}]")
    load()
    held = json.loads(cli("du", "--json").stdout)
    assert {each["name"] for each in held} == {"base", "tuned"}


@pytest.mark.slow
def test_removal_keeps_the_base_of_another_card(process: Run, tmp_path: Path) -> None:
    one_weight(tmp_path)
    (tmp_path / "cards.yaml").write_text(
        f"name: base\nmodel_family: qwen\ncheckpoint: hg://some/base\n{CARD_CONFIG}---\n"
        f"name: tuned\nbase: base\nadapter: hg://some/lora\n---\nname: same\nbase: base\nadapter: hg://some/lora\n"
    )
    with published(tmp_path) as env:
        assert process("import", tmp_path / "cards.yaml", env=env).returncode == 0
        assert process("pull", "tuned", "--no-progress", env=env).returncode == 0

        def here() -> set[str]:
            return {path.name for path in (tmp_path / "hub").glob("*/snapshots/*/*.safetensors")}

        assert here() == {"model.safetensors", ADAPTER}
        process("rm", "tuned", "--yes", env=env)
        assert here() == {"model.safetensors", ADAPTER}  # another card has both
        (tmp_path / "cards.yaml").write_text((tmp_path / "cards.yaml").read_text().rpartition("---")[0])
        process("import", tmp_path / "cards.yaml", env=env)
        assert process("rm", "tuned", env=env).returncode == 7
        assert here() == {"model.safetensors", ADAPTER}
        assert process("rm", "tuned", "--yes", env=env).returncode == 0
        assert here() == {"model.safetensors"}


def test_a_difference_is_of_checkpoints_alone(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    add(cli, tmp_path, "adapter: lora")
    assert "tuned without its adapters" in cli("diff", "base", "tuned").stderr


def test_pins(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_weight(tmp_path)
    digest = hashlib.sha256((tmp_path / "lora" / ADAPTER).read_bytes()).hexdigest()
    add(cli, tmp_path, f'adapters: [{{checkpoint: lora, sha256: "{digest}"}}]')
    expected = load()
    add(cli, tmp_path, f'adapters: [{{checkpoint: lora, sha256: "{"0" * 64}"}}]')
    with pytest.raises(DigestMismatchError):
        load()

    # An overlay that is not the user's own cannot put another adapter in its place, or one on a pinned base.
    write_adapter(tmp_path / "other", factors(Q_PROJ, 32, 32, seed=3))
    model = hashlib.sha256((tmp_path / "base" / "model.safetensors").read_bytes()).hexdigest()
    for pinned in (f'adapters: [{{checkpoint: lora, sha256: "{digest}"}}]', f'sha256: "{model}"'):
        for env, fails in (("shared", True), ("user", False)):
            add(cli, tmp_path, f"{pinned}\n---\nname: tuned@{env}\nadapter: other\nadapters: null")
            monkeypatch.setenv("LADING_ENV", env)
            if fails:
                with pytest.raises(AssetCardError, match="would have others"):
                    load()
            else:
                assert not torch.equal(load()[f"{Q_PROJ}.weight"], expected[f"{Q_PROJ}.weight"])


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (factors(Q_PROJ, 32, 31), "mis-shaped: model.layers.0.self_attn.q_proj.weight"),
        (factors("model.layers.7.self_attn.q_proj", 32, 32), "unexpected: model.layers.7.self_attn.q_proj.weight"),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(2, 32)}, "has lora_A, but no lora_B"),
        ({f"{Q_PROJ}.lora_B.weight": torch.ones(32, 2)}, "has lora_B, but no lora_A"),
        (
            {f"{Q_PROJ}.lora_A.weight": torch.ones(3, 32), f"{Q_PROJ}.lora_B.weight": torch.ones(32, 2)},
            "the factors of",
        ),
        (
            {f"{Q_PROJ}.lora_A.weight": torch.ones(0, 32), f"{Q_PROJ}.lora_B.weight": torch.ones(32, 0)},
            "the factors of",
        ),
        ({f"{Q_PROJ}.lora_A.weight": torch.ones(32), f"{Q_PROJ}.lora_B.weight": torch.ones(32)}, "the factors of"),
        ({f"{Q_PROJ}.lora_magnitude_vector": torch.ones(32)}, "unexpected: base_model.model.model.layers.0"),
        ({n: t.to(torch.int8) for n, t in factors(Q_PROJ, 32, 32).items()}, "of another dtype"),
        ({}, "empty: it changes no weight"),
        ({"lm_head.weight": torch.ones(100, 32)}, "tied: lm_head.weight was trained apart from"),
    ],
)
def test_an_adapter_that_does_not_fit(cli: Cli, tmp_path: Path, names: dict[str, Tensor], problem: str) -> None:
    make(tmp_path / "base")
    write_adapter(tmp_path / "lora", names, modules_to_save=["lm_head"])
    add(cli, tmp_path, "adapter: lora")

    with pytest.raises(ModelCheckpointMismatchError, match=problem) as error:
        load()
    assert str(tmp_path / "lora" / ADAPTER) in str(error.value)
    assert problem in cli("check", "tuned", code=4).stdout
    assert problem in cli("load", "tuned", "--no-progress", code=4).stderr
    cli("plan", "tuned", code=4)
    cli("export", "tuned", tmp_path / "out", "--no-progress", code=4)


def test_tied_copies_that_differ(cli: Cli, tmp_path: Path) -> None:
    make(tmp_path / "base")
    names = {"model.embed_tokens.weight": torch.ones(100, 32), "lm_head.weight": torch.zeros(100, 32)}
    write_adapter(tmp_path / "lora", names, modules_to_save=["lm_head", "embed_tokens"])
    add(cli, tmp_path, "adapter: lora")
    with pytest.raises(ModelCheckpointMismatchError, match="tied_embeddings: false"):
        load()

    write_adapter(tmp_path / "lora", names | {"lm_head.weight": torch.ones(100, 32)}, modules_to_save=["lm_head"])
    cli("index", tmp_path / "lora" / ADAPTER)
    assert torch.equal(load()["lm_head.weight"], torch.ones(100, 32))


def test_a_plan_has_the_memory_of_whole_modules(cli: Cli, tmp_path: Path) -> None:
    make(tmp_path / "base")
    names = {"model.norm.weight": torch.ones(32)}
    names |= {name: torch.ones(100, 32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_adapter(tmp_path / "lora", names, modules_to_save=["norm", "embed_tokens", "lm_head"])
    add(cli, tmp_path, "adapter: lora")

    for sizes in ({"tp": 2, "sdp": 2}, {"pp": 2}, {}):
        for rank in lading.plan_load("tuned", **sizes).ranks:  # type: ignore[arg-type]
            with lading.simulate_gangs(rank.rank, **sizes) as gangs:  # type: ignore[arg-type]
                model = lading.load_model("tuned", gangs=gangs, dtype="auto", progress=False)
            held = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
            assert sum(p.nbytes for p in held) == rank.memory_bytes


def test_whole_modules_of_two_adapters_or_with_a_weight(cli: Cli, tmp_path: Path) -> None:
    make(tmp_path / "base")
    for name in ("a", "b"):
        write_adapter(tmp_path / name, {"model.norm.weight": torch.ones(32)}, modules_to_save=["norm"])
    add(cli, tmp_path, "adapters: [{checkpoint: a}, {checkpoint: b}]")
    with pytest.raises(ModelCheckpointMismatchError, match="in conflict"):
        load()
    add(cli, tmp_path, "adapters: [{checkpoint: a, weight: 0.5}]")
    with pytest.raises(ModelCheckpointMismatchError, match="of another weight"):
        load()


def become(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), CheckpointNotFoundError, "No checkpoint is at"),
        (lambda folder: (folder / "adapter_config.json").unlink(), CheckpointNotFoundError, "adapter_config.json"),
        (lambda folder: (folder / ADAPTER).rename(folder / "adapter_model.bin"), NotSupportedError, "save_pretrained"),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), LadingError, "JSON object"),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b" " * (17 << 20)), LadingError, "at most"),
        (lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}'), NotSupportedError, "IA3"),
        (lambda folder: (folder / ADAPTER).write_bytes(b"\x80\x02."), LadingError, "adapter_model"),
        (lambda folder: become(folder / "adapter_config.json", os.mkfifo), LadingError, "regular file"),
        (lambda folder: become(folder / "adapter_config.json", Path.mkdir), LadingError, "regular file"),
        (lambda folder: become(folder / ADAPTER, os.mkfifo), LadingError, "regular file"),
        (lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000), LadingError, "JSON object"),
    ],
)
def test_files_that_are_wrong(
    cli: Cli, tmp_path: Path, change: Callable[[Path], object], error: type[LadingError], message: str
) -> None:
    one_weight(tmp_path)
    change(tmp_path / "lora")
    add(cli, tmp_path, "adapter: lora")
    with pytest.raises(error, match=message):
        load()
    load("base")


def test_a_folder_of_an_adapter_is_not_a_model(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    with pytest.raises(NotSupportedError, match=r"lading add \S+lora --set base=NAME"):
        lading.load_model(tmp_path / "lora")
    assert "--set base=NAME" in cli("convert", tmp_path / "lora", tmp_path / "out", code=2).stderr
    add(cli, tmp_path, "checkpoint: lora")
    with pytest.raises(CheckpointNotFoundError, match="State it in a card as `adapter`"):
        load()
    make(tmp_path / "base")
    cli("add", tmp_path / "base")
    cli("add", tmp_path / "lora", "--set", "base=base")
    assert not torch.equal(load("lora")[f"{Q_PROJ}.weight"], load("base")[f"{Q_PROJ}.weight"])


def test_an_invalid_address_is_a_mistake_of_the_card(cli: Cli, tmp_path: Path) -> None:
    one_weight(tmp_path)
    add(cli, tmp_path, "adapter: hg://a/b/../c")
    with pytest.raises(AssetCardError):
        load()


@pytest.mark.parametrize(("stated", "warns"), [("other/model", True), ("some/base", False), (None, False)])
def test_an_adapter_of_another_base_is_warned_of(
    cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture, stated: str | None, warns: bool
) -> None:
    one_weight(tmp_path, base_model_name_or_path=stated)
    add(cli, tmp_path, "adapter: lora")
    with caplog.at_level(logging.WARNING, logger="lading"):
        load()
    assert ("was trained on other/model" in caplog.text) == warns
