"""`lading verify` of many models, some of which cannot be verified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from make_checkpoint import make

Cli = Callable[..., Result]


@pytest.fixture
def three(cards: Path, cli: Cli) -> Path:
    """Cards of which one cannot be verified, between two others; its checkpoint's folder."""
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
    result = cli("verify", "--all", "--nl", "--no-progress", code=3)
    verified = [json.loads(line)["model"] for line in result.stdout.splitlines()]
    assert verified == ["aa", "tiny", "tiny_child", "zz"]
    assert "lading: error: odd could not be verified: No model of the qwen family" in result.stderr


def test_the_exit_code_is_that_of_the_worst(cli: Cli, cards: Path, three: Path) -> None:
    cli("verify", "tiny", "--no-progress")
    file = cards.parent / "tiny" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    result = cli("verify", "odd", "zz", "-q", "--no-progress", code=4)
    assert "odd could not be verified" in result.stderr
    hint = "If it was changed on purpose, `lading index zz` takes it for the right one."
    assert f"zz is not what it should be. {hint}" in result.stderr

    shutil.rmtree(three)
    assert "odd could not be verified: No checkpoint is at" in cli("verify", "odd", "odd", code=2).stderr
    alone = cli("verify", "odd", code=2)
    assert alone.stderr.startswith("lading: error: No checkpoint is at")
    assert cli("verify", "zz", "nobody", code=2).stdout == ""
