"""`lading verify` of many models, if some of them cannot be verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

import lading
from tests.helpers.make_checkpoint import make

Cli = Callable[..., Result]


@pytest.fixture
def three(cards: Path, cli: Cli) -> Path:
    """A card that cannot be verified, between two others; the folder of its checkpoint."""
    folder = make(cards.parent / "odd")
    more = cards.with_name("more.yaml")
    more.write_text(
        "name: aa\nbase: tiny\n---\n"
        "name: odd\nbase: tiny\ncheckpoint: odd\nmodel_config: {num_attn_heads: 5}\n---\n"
        "name: zz\nbase: tiny\n"
    )
    cli("import", more)
    for name in ("tiny", "odd"):
        cli("index", name)
    return folder


def test_one_bad_card_does_not_keep_the_others_from_it(cli: Cli, three: Path) -> None:
    result = cli("verify", "--every", "--nl", "--no-progress", code=3)
    verified = [json.loads(line)["model"] for line in result.stdout.splitlines()]
    assert verified == ["aa", "tiny", "tiny_child", "zz"]
    assert "lading: error: odd: No model of the qwen family" in result.stderr


def test_the_exit_code_is_that_of_the_worst(cli: Cli, cards: Path, three: Path) -> None:
    cli("verify", "tiny", "--no-progress")
    file = cards.parent / "tiny" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    result = cli("verify", "odd", "zz", "-q", "--no-progress", code=4)
    assert "lading: error: odd: " in result.stderr
    assert result.stderr.endswith("lading: 2 of 2 models failed: odd, zz\n")
    hint = "If it was changed on purpose, run `lading index zz` to accept it."
    assert f"zz does not match its digests. {hint}" in result.stderr

    shutil.rmtree(three)
    assert "error: No checkpoint is at" in cli("verify", "odd", "aa", code=4).stderr
    alone = cli("verify", "odd", code=2)
    assert alone.stderr.startswith("lading: error: No checkpoint is at")
    result = cli("verify", "zz", "nobody", "-q", code=4)
    assert result.stderr.startswith("lading: error: No model named 'nobody'"), "before any work"
    assert result.stdout == "model.safetensors\n"


def of_header(data: bytes) -> bytes:
    """The same tensors behind a header that says the same in other bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = json.dumps(dict(reversed(header.items())), separators=(",", ":")).encode()
    assert text.ljust(size) != data[8 : 8 + size]
    return data[:8] + text.ljust(size) + data[8 + size :]


def of_metadata(data: bytes) -> bytes:
    assert b'"pt"' in data
    return data.replace(b'"pt"', b'"tp"', 1)


@pytest.mark.few(3)
@pytest.mark.parametrize("change", [of_header, of_metadata])
@pytest.mark.parametrize("first", ["index", "load", "verify", "convert"])
def test_the_header_is_verified_too(
    cli: Cli, cards: Path, tmp_path: Path, first: str, change: Callable[[bytes], bytes]
) -> None:
    file = cards.parent / "tiny" / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    more = [tmp_path / "out"] if first == "convert" else []
    cli(first, "tiny", *more, *(["--no-progress"] if first != "index" else []))
    if first == "index":
        cli("load", "tiny", "--no-progress")  # by which the digests of tensors are recorded
    file.write_bytes(change(file.read_bytes()))

    result = cli("verify", "tiny", "--json", "--no-progress", code=4)
    (row,) = json.loads(result.stdout)
    assert (row["result"], row["method"]) == ("mismatch", "header")
    assert row["expected"] != row["found"]
    assert "`lading index tiny`" in result.stderr
    cli("index", "tiny")
    assert json.loads(cli("verify", "tiny", "--json", "--no-progress").stdout)[0]["result"] in ("match", "recorded")
    assert json.loads(cli("verify", "tiny", "--json", "--no-progress").stdout)[0]["result"] == "match"


def test_the_pickle_of_a_torch_file_is_verified_too(cli: Cli, cards: Path) -> None:
    folder = cards.parent / "tiny"
    torch.save(load_file(folder / "model.safetensors") | {"note": "one"}, folder / "model.pt")
    (folder / "model.safetensors").unlink()
    cards.write_text(cards.read_text().replace("checkpoint: tiny\n", "checkpoint: tiny/model.pt\n", 1))
    cli("import", cards, "--replace")
    cli("load", "tiny", "--no-progress")
    data = (folder / "model.pt").read_bytes()
    assert data.count(b"one") == 1
    (folder / "model.pt").write_bytes(data.replace(b"one", b"two"))

    (row,) = json.loads(cli("verify", "tiny", "--json", "--no-progress", code=4).stdout)
    assert row["result"] == "mismatch"


@pytest.mark.parametrize("seen", [False, True])
def test_a_record_that_does_not_have_its_crc_is_a_mismatch(cli: Cli, cards: Path, seen: bool) -> None:
    """Bytes that were wrong before anything was recorded of them: only the archive itself tells."""
    folder = cards.parent / "tiny"
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "model.pt")
    (folder / "model.safetensors").unlink()
    cards.write_text(cards.read_text().replace("checkpoint: tiny\n", "checkpoint: tiny/model.pt\n", 1))
    cli("import", cards, "--replace")
    good = (folder / "model.pt").read_bytes()
    at = good.index(tensors["model.embed_tokens.weight"].view(torch.uint8).numpy().tobytes()) + 10
    (folder / "model.pt").write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    if seen:
        cli("load", "tiny", "--no-progress")

    (row,) = json.loads(cli("verify", "tiny", "--json", "--no-progress", code=4).stdout)
    assert (row["result"], row["method"]) == ("mismatch", "crc32")
    assert "/data/" in row["expected"]

    (folder / "model.pt").write_bytes(good)
    cli("index", "tiny")
    assert json.loads(cli("verify", "tiny", "--json", "--no-progress").stdout)[0]["result"] in ("match", "recorded")


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["folder", "file", "pt", "home", "no model", "odd model"])
def test_a_path(cli: Cli, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """It is recorded the first time, and compared from then on; no card names it."""
    folder = make(tmp_path / "here" / "mine")
    monkeypatch.chdir(tmp_path / "here")
    file = folder / "model.safetensors"
    target = {"file": "mine/model.safetensors", "home": "~/mine"}.get(kind, "./mine")
    if kind == "home":
        monkeypatch.setenv("HOME", str(tmp_path / "here"))
    if kind == "pt":
        torch.save(load_file(file), folder / "model.pt")
        file.unlink()
        file, target = folder / "model.pt", "mine/model.pt"
    config = folder / "config.json"
    if kind == "no model":
        config.unlink()
    if kind == "odd model":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 5}))

    for result in ("recorded", "match"):
        (row,) = json.loads(cli("verify", target, "--json", "--no-progress").stdout)
        assert (row["file"], row["result"], row["method"]) == (file.name, result, "blake3")
        assert Path(row["path"]) == file

    data = bytearray(file.read_bytes())
    data[-1 if kind != "pt" else len(data) // 2] ^= 1
    file.write_bytes(data)
    result = cli("verify", target, "--no-progress", code=4)
    assert "mismatch" in result.stdout
    assert "`lading index " in result.stderr
    assert "mismatch" not in cli("list", "--all").stdout


def test_a_path_takes_the_digests_that_a_card_recorded(cli: Cli, cards: Path) -> None:
    cli("verify", "tiny", "--no-progress")
    assert cli("verify", cards.parent / "tiny", "--no-progress").stdout.count("match") == 1
    lading.verify_model(cards.parent / "tiny", progress=False)
    assert "24 equal" in cli("diff", "tiny", cards.parent / "tiny").stderr


def test_a_path_with_no_checkpoint(cli: Cli, home: Path, tmp_path: Path) -> None:
    assert "No checkpoint is at" in cli("verify", tmp_path / "nowhere", code=2).stderr
    (tmp_path / "empty").mkdir()
    cli("verify", tmp_path / "empty", code=2)
    (tmp_path / "bad.safetensors").write_bytes(b"none")
    cli("verify", tmp_path / "bad.safetensors", code=4)
    mine = make(tmp_path / "mine")
    assert "1 of 2 models failed" in cli("verify", tmp_path / "nowhere", mine, "--no-progress", code=2).stderr


def test_digests_of_paths_are_what_diff_compares_by(cli: Cli, home: Path, tmp_path: Path) -> None:
    paths = make(tmp_path / "a"), make(tmp_path / "b", shards=2)
    assert "values not compared" in cli("diff", *paths).stderr
    cli("verify", *paths, "--no-progress")
    assert "24 equal, 0 different" in cli("diff", *paths).stderr


def test_a_path_that_has_to_be_rewritten(cli: Cli, home: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.arange(12.0).view(3, 4).t()}, tmp_path / "w.pt")
    for result in ("recorded", "match"):
        assert json.loads(cli("verify", tmp_path / "w.pt", "--json", "--no-progress").stdout)[0]["result"] == result
