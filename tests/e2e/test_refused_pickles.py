"""Files of `torch.save` with more than a state dict: refused, and read without it where the user says so."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import lading
from lading.errors import ModelCheckpointError, PolicyError, RefusedPickleError
from tests.helpers.make_checkpoint import make, tensors
from tests.helpers.torch_files import save


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A trainer's checkpoint beside a `config.json`: its arguments are an object of their own."""
    folder = make(tmp_path / "run")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    path.write_bytes(save({"args": argparse.Namespace(lr=0.1), "model": tensors()}))
    return path


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "words",
    [("index",), ("diff", "."), ("adopt",), ("check",), ("plan",), ("load",), ("convert", "out")],
    ids=lambda words: words[0],
)
def test_each_command_that_refuses_one_takes_the_option_that_it_names(
    cli: Callable[..., Result], file: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    command = [words[0], str(file.parent), *words[1:]]

    refused = cli(*command, code=7)
    assert "argparse.Namespace" in refused.stderr
    assert "--no-restrict" in refused.stderr

    cli(*command, "--no-restrict")


def test_a_refusal_is_of_policy_and_of_the_checkpoint(catalog: Path, file: Path) -> None:
    for kind in (RefusedPickleError, PolicyError, ModelCheckpointError):
        with pytest.raises(kind, match="`restrict=False`") as raised:
            lading.index_checkpoint(file)
        assert raised.value.exit_code == 7
    assert str(file) == str(raised.value.path)


def test_python_reads_the_tensors_alone(catalog: Path, file: Path) -> None:
    stored = lading.index_checkpoint(file, restrict=False)
    assert sorted(stored.manifest.names) == sorted(tensors())
    assert lading.diff_models(file, file.parent, restrict=False).same == len(tensors())
    assert lading.check_model(file.parent, restrict=False).fits
    (plan,) = lading.plan_load(file.parent, restrict=False).ranks
    assert plan.memory_bytes == sum(t.nbytes for t in tensors().values())
    (adoption,) = lading.adopt_checkpoints(file.parent, restrict=False, progress=False)
    assert adoption.problem is None


def test_a_card_whose_files_were_indexed_so_loads(cli: Callable[..., Result], cards: Path, file: Path) -> None:
    more = cards.parent / "more.yaml"
    more.write_text(f"name: trainer\nbase: tiny\ncheckpoint: {file}\n")
    cli("import", more)
    cli("load", "trainer", code=7)
    cli("index", "trainer", "--no-restrict")
    model = lading.load_model("trainer", device="cpu", dtype="auto", progress=False)
    assert all(torch.equal(p.detach(), tensors()[name]) for name, p in model.named_parameters())


def test_one_that_is_rewritten_is_refused_by_the_same_error(catalog: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(save({"args": argparse.Namespace(), "model": {"w": torch.ones(3, 2).t()}}))

    with pytest.raises(RefusedPickleError):
        lading.index_checkpoint(path)
    assert list(lading.index_checkpoint(path, restrict=False).manifest.names) == ["w"]
