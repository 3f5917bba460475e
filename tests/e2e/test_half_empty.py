"""Snapshots that are only in part in the cache, without a network: what is missing is said, and how to get it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from tests.helpers.cached_repository import add_cards, add_snapshot
from tests.helpers.make_checkpoint import make, tensors
from tests.helpers.torch_files import save_shards

Cli = Callable[..., Result]

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("here", "missing"),
    [
        (["config.json"], ["model.safetensors"]),
        (["tokenizer.json"], ["model.safetensors"]),
        (["config.json", INDEX], [ONE, TWO]),
        (["config.json", INDEX, ONE], [TWO]),
        (["config.json", ONE, TWO], [INDEX]),
        ([TWO], [ONE, INDEX]),
    ],
)
def test_a_part_of_a_snapshot(cli: Cli, cache: Path, tmp_path: Path, here: list[str], missing: list[str]) -> None:
    folder = make(tmp_path / "made", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    snapshot = add_snapshot(cache, "Acme/Half", {name: (folder / name).read_bytes() for name in here})
    assert "`lading pull hg://acme/half`" in cli("index", "hg://acme/half", code=5).stderr
    add_cards(tmp_path, half="hg://acme/half")

    for words in (["load", "half", "--no-progress"], ["check", "half"], ["index", "half"], ["pull", "half"]):
        said = cli(*words, code=5).stderr
        assert [name for name in (ONE, TWO, INDEX, "model.safetensors") if f"'{name}'" in said] == missing
        assert snapshot.name in said
        assert "`lading pull half`" in said


def test_a_part_of_what_torch_saved(cli: Cli, cache: Path, tmp_path: Path) -> None:
    folder = make(tmp_path / "made")
    (folder / "model.safetensors").unlink()
    save_shards(folder, tensors(), 2)
    gone = sorted(folder.glob("*-of-*"))[1]
    gone.unlink()
    add_snapshot(cache, "Acme/Half", folder)
    add_cards(tmp_path, half="hg://acme/half")

    assert f"Missing: '{gone.name}'" in cli("load", "half", "--no-progress", code=5).stderr
