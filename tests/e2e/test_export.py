"""`lading convert` and `lading export`: what is written, what is refused, and what a kill leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from lading import (
    DigestMismatchError,
    ModelCheckpointMismatchError,
    PolicyError,
    convert_checkpoint,
    export_model,
    load_model,
)
from lading.families.qwen import QwenConfig
from tests.helpers.make_checkpoint import CONFIG, make, tensors
from tests.helpers.nursery import Child, Nursery

Cli = Callable[..., Result]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def check_state(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = state_of(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


def test_a_card_with_all_that_is_beside(cards: Path, cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "cards" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt", "modeling_tiny.py"):
        (source / name).write_text("{}")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"eos_token_id": 3, "auto_map": {"AutoModel": "m.T"}}))

    shown = json.loads(cli("export", "tiny", tmp_path / "out", "--shard-size", "20KB", "--json").output)

    assert shown["dtypes"] == {"bfloat16": 21824}
    assert {file["name"] for file in shown["files"]} == {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert all(file["bytes"] <= 20_000 for file in shown["files"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"eos_token_id": 3, "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    check_state(tmp_path / "out", tensors())


def test_a_config_json_of_another_model_is_not_taken(cards: Path, cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "cards" / "tiny" / "config.json"
    for values in ({"model_type": "t5"}, CONFIG | {"num_hidden_layers": 3}, CONFIG | {"hidden_size": "?"}):
        source.write_text(json.dumps(values))
        cli("export", "tiny", tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == ("qwen3", 2, 32)
        for file in (tmp_path / "out").iterdir():
            file.unlink()


def test_what_is_refused(cards: Path, cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "cards" / "tiny"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "found something there" in cli("export", "tiny", tmp_path / "full", code=2).output
    (tmp_path / "bare").mkdir()
    assert "use `lading convert` for paths" in cli("export", tmp_path / "bare", tmp_path / "out", code=2).output
    assert "No model named 'tinny'" in cli("export", "tinny", tmp_path / "out", code=2).output
    assert "names its own" in cli("convert", "tiny", tmp_path / "out", "--arch", "qwen/qwen3_0.6b", code=2).output
    assert "FAMILY/ARCH" in cli("convert", str(source), tmp_path / "out", "--arch", "qwen", code=2).output
    assert "5GB" in cli("export", "tiny", tmp_path / "out", "--shard-size", "many", code=2).output
    assert "does not fit" in cli("convert", source, tmp_path / "out", "--arch", "qwen/qwen3_0.6b", code=4).output
    assert "gated" in cli("export", "tiny_gated", tmp_path / "out", code=7).output
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine"]


def flip(path: Path) -> None:
    """Change the last byte of a file, which is one of a tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_file_that_was_changed_is_not_converted(cards: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cards" / "tiny" / "model.safetensors"
    cli("convert", "tiny", tmp_path / "first", "--no-progress")  # which records what all of it is
    first = "select result from verifications where method <> 'header' order by id"
    assert cli("sql", first, "-q").output.split() == ["recorded"]
    cli("export", "tiny", tmp_path / "again", "--no-progress")  # nothing is hashed twice
    assert cli("sql", first, "-q").output.split() == ["recorded"]
    cli("export", "tiny", tmp_path / "checked", "--verify", "always", "--no-progress")
    assert cli("sql", first, "-q").output.split() == ["recorded", "match"]

    flip(file)
    before = sorted(tmp_path.iterdir())
    for command in ("convert", "export"):
        for mode in ("auto", "always"):
            result = cli(command, "tiny", tmp_path / "out", "--verify", mode, "--no-progress", code=4)
            assert "1 of 24 tensors are not those that were verified before" in result.output
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(DigestMismatchError):
        convert_checkpoint("tiny", tmp_path / "out", dtype=torch.float16, shard_size=20_000, progress=False)
    with pytest.raises(ValueError, match="`verify`"):
        convert_checkpoint("tiny", tmp_path / "out", verify="often")  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == before

    cli("export", "tiny", tmp_path / "out", "--verify", "never", "--no-progress")
    check_state(tmp_path / "out", load_file(file))
    # The card has the folder, so its records hold for the path, too; a copy has none.
    result = cli("convert", file.parent, tmp_path / "o", "--verify", "always", "--no-progress", code=4)
    assert "1 of 24 tensors are not those that were verified before" in result.output
    shutil.copytree(file.parent, tmp_path / "copy")
    assert "Nothing is known" in cli("convert", tmp_path / "copy", tmp_path / "o", "--verify", "always", code=2).output


def test_a_tied_copy_that_is_not_written_is_checked_too(cards: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cards" / "tiny" / "model.safetensors"
    state = tensors()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, file)
    convert_checkpoint("tiny", tmp_path / "out", progress=False)
    assert cli("sql", "select count(digest) from model_tensors where model = 'tiny'", "-q").output == "25\n"
    assert cli("sql", "select result from verifications order by id", "-q").output.split() == ["recorded"] * 2
    check_state(tmp_path / "out", tensors())


def test_what_is_not_written_is_said(cli: Cli, tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for n in range(5)}
    save_file(tensors() | extra, folder / "model.safetensors")

    shown = json.loads(cli("convert", folder, tmp_path / "out", "--json").stdout)
    assert sorted(shown["dropped"]) == sorted(extra)
    assert state_of(tmp_path / "out").keys() == tensors().keys()
    (line,) = [line for line in cli("convert", folder, tmp_path / "two").stdout.splitlines() if "dropped" in line]
    assert line.endswith(".inv_freq and 2 more")
    assert "dropped" not in cli("convert", tmp_path / "out", tmp_path / "three").stdout


def test_trained_tensors_are_lost_only_on_request(cards: Path, cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "cards" / "tiny" / "model.safetensors"
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    trained = {f"mtp.layers.{n}.weight": torch.zeros(4) for n in range(9)}
    save_file(tensors() | computed | trained, file)

    for command in (("export", "tiny"), ("convert", file.parent)):
        refused = cli(*command, tmp_path / "out", code=7)
        assert "9 trained tensors" in refused.stderr
        assert "'mtp.layers.0.weight'" in refused.stderr
        assert "inv_freq" not in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()
    with pytest.raises(PolicyError, match="9 trained tensors"):
        convert_checkpoint("tiny", tmp_path / "out", progress=False)

    report = convert_checkpoint("tiny", tmp_path / "out", drop=True, progress=False)
    assert set(report.dropped) == {*computed, *trained}
    assert json.loads(cli("export", "tiny", tmp_path / "two", "--drop", "--json").stdout)["dropped"]
    check_state(tmp_path / "two", tensors())


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("512MiB", 512 << 20), ("1.5k", 1500), ("7", 7)])
def test_sizes(size: str, expected: int) -> None:
    from lading.cli.options import Size

    assert Size().convert(size, None, None) == expected


def test_a_file_of_torch_without_a_config(cards: Path, cli: Cli, tmp_path: Path) -> None:
    card = tmp_path / "arch.yaml"
    fields = {k: getattr(QWEN, k) for k in ("model_dim", "vocab_size", "num_layers", "num_attn_heads", "ffn_inner_dim")}
    fields |= {"tied_embeddings": True, "num_key_value_heads": 2, "head_dim": 8, "qkv_proj_bias": False}
    fields |= {"q_norm": True, "k_norm": True}
    card.write_text(f"architecture: tiny\nfamily: qwen\nconfig: {json.dumps(fields)}\n")
    cli("import", card)
    path = tmp_path / "model.pt"
    state = {name: value.t().contiguous().t() if value.ndim == 2 else value for name, value in tensors().items()}
    torch.save({"model": state, "args": torch.nn.ReLU()}, path)

    told = cli("convert", path, tmp_path / "out", code=2).output
    assert "no config.json" in told
    assert "--arch FAMILY/ARCH" in told
    assert "ReLU" in cli("convert", path, tmp_path / "out", "--arch", "qwen/tiny", code=7).output
    with pytest.raises(PolicyError):
        convert_checkpoint(path, tmp_path / "out", arch="qwen/tiny")
    cli("convert", path, tmp_path / "out", "--arch", "qwen/tiny", "--no-restrict", "--dtype", "float32")
    check_state(tmp_path / "out", {name: value.float() for name, value in tensors().items()})


QWEN = QwenConfig(model_dim=32, vocab_size=100, num_layers=2, num_attn_heads=4, ffn_inner_dim=64)


def test_tied_parameters_must_be_equal(tmp_path: Path) -> None:
    make(tmp_path / "in")
    state = tensors()
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, tmp_path / "in/model.safetensors")
    convert_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    check_state(tmp_path / "out", state)

    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1}, tmp_path / "in/model.safetensors")
    with pytest.raises(ModelCheckpointMismatchError, match="ties"):
        convert_checkpoint(tmp_path / "in", tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    make(tmp_path / "in", shards=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            convert_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_disk_that_is_too_small_raises_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "in")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="bytes are needed, 1000 are left") as caught:
        convert_checkpoint(tmp_path / "in", tmp_path / "out", progress=False)
    assert caught.value.filename == str(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


# Stops with half of the files written, and says so.
HALT = """
import sys, time
from pathlib import Path
import lading.operations.export as export

class Halting(export.Writer):
    def __init__(self, file, entries):
        if "00002-of" in file.name:
            print("half", flush=True)
            time.sleep(60)
        super().__init__(file, entries)

export.Writer = Halting
export.convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), shard_size=20_000, progress=False)
"""


def halted(nursery: Nursery, code: str, folder: Path) -> Child:
    """A process that has written half of the files."""
    child = nursery.start(["-c", code, folder / "in", folder / "out"], os.environ)
    while not child.said():
        time.sleep(0.01)
    return child


def test_a_kill_leaves_it_as_before(nursery: Nursery, tmp_path: Path) -> None:
    make(tmp_path / "in")
    child = halted(nursery, HALT, tmp_path)
    assert not (tmp_path / "out").exists()
    child.kill()
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 2

    convert_checkpoint(tmp_path / "in", tmp_path / "out", shard_size=20_000, progress=False)
    assert {p.name for p in tmp_path.iterdir()} == {"in", "out"}
    check_state(tmp_path / "out", tensors())


@pytest.mark.slow
@pytest.mark.parametrize("wait", [i / 40 for i in range(40)])
def test_a_kill_at_any_time(nursery: Nursery, tmp_path: Path, wait: float) -> None:
    make(tmp_path / "in")
    code = HALT.replace("time.sleep(60)", "").replace("        if ", "        time.sleep(0.1)\n        if ")
    child = halted(nursery, code, tmp_path)
    time.sleep(wait / 4)
    child.kill()
    if (tmp_path / "out").exists():
        check_state(tmp_path / "out", tensors())
        load_model(tmp_path / "out")


def test_a_model_in_memory_with_the_tokenizer_of_another_folder(tmp_path: Path) -> None:
    from lading.models.hf_config import family_of_folder

    make(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    family, config = family_of_folder(tmp_path / "in")
    model = load_model(tmp_path / "in", dtype="auto")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    report = export_model(model, "qwen", config, tmp_path / "out", beside=tmp_path / "in", dtype=torch.float32)

    assert set(report.files) == {"config.json", "model.safetensors", "tokenizer.json"}
    expected = {name: value.float() for name, value in tensors().items()}
    expected["model.embed_tokens.weight"] = (tensors()["model.embed_tokens.weight"] + 1).float()
    check_state(tmp_path / "out", expected)
    with pytest.raises(TypeError, match="Qwen"):
        export_model(torch.nn.Linear(1, 1), family, config, tmp_path / "other")
    with pytest.raises(ValueError, match="`config`"):
        export_model(model, family, replace(config, num_layers=3), tmp_path / "other")
    with pytest.raises(ValueError, match="shard_size"):
        export_model(model, family, config, tmp_path / "other", shard_size=0)
