"""What was rewritten in lading's cache, as its tensors were no ranges of bytes: counted, and removed with its model."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import lading
from lading.formats import rewritten_files
from lading.system.settings import Settings
from tests.helpers.cached_repository import CONFIG, add_cards
from tests.helpers.make_checkpoint import tensors
from tests.servers.hub import FakeHub

Run = Callable[..., subprocess.CompletedProcess[str]]


def write_strided(path: Path) -> Path:
    """Matrices that do not lie row after row."""
    torch.save({name: t.t().contiguous().t() if t.ndim == 2 else t for name, t in tensors().items()}, path)
    return path


def made() -> list[Path]:
    return rewritten_files(Settings.from_environment().cache_dir)


@pytest.fixture
def path(tmp_path: Path, catalog: Path) -> Path:
    """Of a file that two cards name."""
    path = write_strided(tmp_path / "model.pt")
    add_cards(tmp_path, tiny=str(path), child=str(path))
    return path


def test_what_was_made_of_a_card_s_own_file(path: Path) -> None:
    lading.load_model("tiny", dtype="auto", progress=False)
    lading.load_model("child", dtype="auto", progress=False)
    (file,) = made()
    size = file.stat().st_size

    usage = lading.disk_usage()
    assert [(h.name, h.kind, h.bytes, h.verified, h.path) for h in usage.holdings] == [
        ("child", "cache", size, True, str(file)),
        ("tiny", "cache", size, True, str(file)),
    ]
    assert (usage.bytes, usage.orphans) == (size, ())
    assert lading.verify_model("child", progress=False).good

    removal = lading.remove_model("tiny", dry_run=True)
    assert (removal.freed, removal.removed, removal.kept, removal.also_of) == (size, (file,), (), ("child",))
    assert lading.remove_model("tiny") == removal
    assert made() == []
    assert path.exists()
    assert lading.remove_model("child").nothing
    assert lading.disk_usage().holdings == ()

    lading.load_model("tiny", dtype="auto", progress=False)
    assert len(made()) == 1


@pytest.mark.slow
def test_what_was_made_of_another_state_of_the_file(path: Path) -> None:
    lading.load_model("tiny", progress=False)
    (old,) = made()
    os.utime(path)
    lading.load_model("tiny", progress=False)
    (new,) = set(made()) - {old}

    (orphan,) = lading.disk_usage().orphans
    assert (orphan.name, orphan.bytes) == (str(old), old.stat().st_size)
    assert lading.remove_orphans().removed == (), "it may be being made at the moment"
    removal = lading.remove_orphans(older_than=0)
    assert (removal.removed, removal.freed) == ((old,), orphan.bytes)
    assert lading.remove_model("tiny").removed == (new,)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add("Some/Tiny", {"model.pt": write_strided(tmp_path / "model.pt").read_bytes()})
        yield hub


@pytest.mark.slow
def test_what_was_made_of_a_file_of_the_hub(process: Run, hub: FakeHub, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(*words: str | Path) -> str:
        done = process(*words, env=env | {"LADING_OFFLINE": ""})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (tmp_path / "cards.yaml").write_text(f"name: far\ncheckpoint: hg://some/tiny/model.pt\n{CONFIG}")
    run("import", tmp_path / "cards.yaml")
    run("pull", "far")
    (file,) = made()
    (original,) = (tmp_path / "hub").glob("models--*/snapshots/*/model.pt")
    size = file.stat().st_size + original.stat().st_size

    assert run("du", "far", "--csv").splitlines()[1].split(",")[:4] == ["far", str(size), '"cache', 'hub"']
    assert "2 files removed" in run("rm", "far", "--yes")
    assert made() == []
    assert list((tmp_path / "hub").glob("models--*")) == []
