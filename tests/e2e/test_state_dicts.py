"""A checkpoint of several state dicts: each is named by a dotted path, in a card, in a call and on the command line."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import Result
from safetensors.torch import load_file
from torch import Tensor

import lading
from lading import formats
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.families.qwen import get_qwen_model_hub
from tests.helpers.cached_repository import add_cards
from tests.helpers.make_checkpoint import CONFIG, qwen_config, tensors
from tests.servers.hostile import serve
from tests.servers.hub import FakeHub

Cli = Callable[..., Result]
State = dict[str, Tensor]

FIRST, SECOND = tensors(), {name: tensor + 1 for name, tensor in tensors().items()}


def nested() -> dict[str, Any]:
    return {
        "net": FIRST,
        "ema": {"module": SECOND, "decay": 0.9},
        "a.b": {"c": FIRST},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "step": 3,
    }


def save(path: Path) -> Path:
    torch.save(nested(), path)
    return path


def save_distributed(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a save without a process group
        dcp.save(nested(), checkpoint_id=path, no_dist=True)
    return path


def save_strided(path: Path) -> Path:
    """No matrix lies row after row, so that a file in the cache is made of each state dict."""

    def turn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: turn(each) for key, each in value.items()}
        return value.t().contiguous().t() if isinstance(value, Tensor) and value.ndim == 2 else value

    torch.save(turn(nested()), path)
    return path


SAVES = pytest.mark.parametrize("write", [save, save_distributed, save_strided])


def equal(found: State, expected: State) -> None:
    assert found.keys() >= expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def load(path: Path, state_dict: str | None) -> State:
    model = get_qwen_model_hub().load_custom_model(path, qwen_config(), state_dict=state_dict, dtype="keep")
    return model.state_dict()


@pytest.mark.few(1)
@SAVES
def test_by_call_and_by_path(home: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "saved.pt")
    equal(load(path, "net"), FIRST)
    equal(load(path, "ema.module"), SECOND)
    equal(load(path, "a.b.c"), FIRST)
    equal(load(path / "ema.module", None), SECOND)

    (tmp_path / "config.json" if path.is_file() else path / "config.json").write_text(json.dumps(CONFIG))
    equal(lading.load_model(path / "ema.module", dtype="keep").state_dict(), SECOND)
    for name in (path, str(path)):
        equal(lading.load_model(name, state_dict="ema.module", dtype="keep").state_dict(), SECOND)
    with pytest.raises(ValueError, match="only for a checkpoint at a path"):
        lading.load_model("qwen3_0.6b", state_dict="ema.module")


@pytest.mark.few(1)
@SAVES
def test_by_cards_of_one_file(catalog: Path, cli: Cli, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "saved.pt")
    add_cards(tmp_path, one=f"{path}\nstate_dict: net", two=f"{path}\nstate_dict: ema.module")
    for _ in range(2):
        equal(lading.load_model("one", dtype="keep").state_dict(), FIRST)
        equal(lading.load_model("two", dtype="keep", verify="always").state_dict(), SECOND)
    cli("verify", "one", "two")
    assert json.loads(cli("check", "two", "--json").stdout)["matched"] == len(FIRST)

    cli("convert", "two", tmp_path / "out")
    equal(load_file(tmp_path / "out" / "model.safetensors"), SECOND)
    cli("convert", path / "net", tmp_path / "two", "--arch", "qwen/qwen3_0.6b", code=4)  # of another size


@pytest.mark.few(1)
@SAVES
def test_a_state_dict_gets_a_card(catalog: Path, cli: Cli, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "saved.pt")
    (tmp_path / "config.json" if path.is_file() else path / "config.json").write_text(json.dumps(CONFIG))
    for status in ("added", "unchanged"):
        (row,) = json.loads(cli("add", path / "ema.module", "--json").stdout)
        assert (row["name"], row["status"]) == ("ema.module", status)
    equal(lading.load_model("ema.module", dtype="keep").state_dict(), SECOND)
    assert "'a.b.c'" in cli("add", path / "nothing", code=2).stderr
    lading.register_model("mine", path / "net")
    equal(lading.load_model("mine", dtype="keep").state_dict(), FIRST)


@SAVES
def test_which_there_are(home: Path, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    path = write(tmp_path / "saved.pt")
    with pytest.raises(CorruptModelCheckpointError, match=r"'net', 'ema\.module', 'a\.b\.c'"):
        formats.index(path)
    for name in ("nothing", "ema", "optimizer", "step", "net.model", ".net", "net."):
        with pytest.raises(CheckpointNotFoundError, match=r"'net', 'ema\.module', 'a\.b\.c'"):
            formats.index(formats.nested(path, name))


def test_on_the_command_line(home: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "saved.pt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("saved.pt/net", "./saved.pt/net"):  # the first is no repository of the hub
        assert json.loads(cli("check", name, "--json").stdout)["matched"] == len(FIRST)
    shown = cli("index", path / "ema.module", "--json").stdout
    assert json.loads(shown)["tensors"] == len(SECOND)
    refused = cli("index", path, code=4).stderr
    assert refused.count("\n") == 1
    assert "'ema.module'" in refused
    assert "'optimizer." not in refused
    cli("diff", path / "net", path / "a.b.c", "--values")
    cli("verify", path / "net", path / "ema.module")


def load_card(folder: Path, checkpoint: str) -> None:
    add_cards(folder, mine=checkpoint)
    lading.load_model("mine")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"])
def test_names_that_could_be_paths(catalog: Path, cli: Cli, tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "saved.pt")
    with pytest.raises(ValueError, match="dotted path"):
        load(path, name)
    with pytest.raises(lading.AssetCardError, match=r"dotted path|without NUL"):
        load_card(tmp_path, f"{path}\nstate_dict: {json.dumps(name)}")


def test_a_name_that_is_no_text(catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(lading.AssetCardError, match="expected a string, found 3"):
        add_cards(tmp_path, mine=f"{save(tmp_path / 'saved.pt')}\nstate_dict: 3")


def test_files_without_state_dicts(home: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(FIRST, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="holds one checkpoint or none"):
        load(tmp_path / "model.safetensors", "model")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "gone.pt", "model")
    with pytest.raises(FileNotFoundError):
        load(tmp_path, "model")


def test_a_folder_beside_metadata_is_not_taken_for_a_state_dict(home: Path, tmp_path: Path) -> None:
    path = save_distributed(tmp_path / "saved")
    (path / "net").mkdir()
    equal(load(path, "net"), FIRST)


def test_keys_that_lie(home: Path, tmp_path: Path) -> None:
    """What an error lists is short, however many there are, and however they contain one another."""
    own: dict[str, Any] = {"w": 1}
    own |= {".".join(["self"] * count): own for count in range(1, 200)}
    many = {f"d{i}\x1b[31m": {"w": torch.zeros(1)} for i in range(2000)}
    long = {"x" * 100_000: {"w": torch.zeros(1)}}
    torch.save({"own": own, **many, **long}, tmp_path / "saved.pt")
    with pytest.raises(CorruptModelCheckpointError) as caught:
        formats.index(tmp_path / "saved.pt")
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)
    assert "1992 more" in str(caught.value)
    with pytest.raises(CheckpointNotFoundError):
        formats.index(tmp_path / "saved.pt", member=".".join(["own", *["self"] * 300]))


def test_on_a_server(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LADING_OFFLINE", raising=False)
    path = save(tmp_path / "saved.pt")
    with serve({"/saved.pt": path.read_bytes()}) as server:
        url = server.url("/saved.pt")
        add_cards(tmp_path, one=f"{url}\nstate_dict: net", two=f"{url}\nstate_dict: ema.module")
        for _ in range(2):
            equal(lading.load_model("one", dtype="keep").state_dict(), FIRST)
            equal(lading.load_model("two", dtype="keep").state_dict(), SECOND)


def test_on_the_hub(process: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    save(tmp_path / "repository" / "step.pt")
    with FakeHub() as hub:
        hub.add("somebody/tiny", tmp_path / "repository")
        env = {"LADING_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        add_cards(tmp_path, one="hg://somebody/tiny\ncheckpoint_path: step.pt\nstate_dict: ema.module")
        for words in (("pull", "one"), ("load", "one", "--dtype", "auto"), ("verify", "one"), ("rm", "one", "--yes")):
            done = process(*words, env=env)
            assert done.returncode == 0, (words, done.stderr)
        done = process("index", "hg://somebody/tiny/step.pt/nothing", env=env)
        assert done.returncode == 2
        assert "'ema.module'" in done.stderr


def test_a_state_dict_as_a_field_of_an_added_card(catalog: Path, cli: Cli, tmp_path: Path) -> None:
    path = save(tmp_path / "saved.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert cli("add", path, "--set", "state_dict=ema.module", "-q").stdout == "saved\n"
    assert json.loads(cli("list", "saved", "--json").stdout)[0]["parameters"] == 21_824
    equal(lading.load_model("saved", dtype="keep", progress=False).state_dict(), SECOND)
    assert cli("list", "saved", "--status", "ready", "-q").stdout == "saved\n"

    (again,) = json.loads(cli("add", path, "--set", "state_dict=net", "--json").stdout)
    assert (again["name"], again["status"]) == ("saved", "changed")
    equal(lading.load_model("saved", dtype="keep", progress=False).state_dict(), FIRST)
    (again,) = json.loads(cli("add", tmp_path, "--json").stdout)
    assert (again["name"], again["status"]) == ("saved", "unchanged")
    assert "ema.module" in cli("add", path, "--set", "state_dict=nothing", code=2).stderr

    cli("add", path / "a.b.c", "--name-from", "inner")
    assert cli("list", "inner", "--status", "ready", "-q").stdout == "inner\n"
    lading.register_model("ema", path, state_dict="ema.module")
    assert json.loads(cli("list", "ema", "--json").stdout)[0]["parameters"] == 21_824
