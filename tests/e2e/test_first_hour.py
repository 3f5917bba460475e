"""The first hour of an engineer with forty folders of checkpoints: one command, then the questions of a new user."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lading
from tests.helpers.cluster import build

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_devices.py"

QUERY = "model.layers.0.self_attn.q_proj.weight"

Run = Callable[..., str]


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    return build(tmp_path / "cluster")


@pytest.fixture
def run(process: Callable[..., subprocess.CompletedProcess[str]], cache: Path, cluster: Path) -> Run:
    """Runs a command line that ends well, after all folders were added by one command; returns its stdout."""

    def run(*words: str | Path, code: int = 0) -> str:
        done = process(*words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    added = process("add", cluster, "--set", "owner=me", "--json", "--no-progress")
    statuses = {Path(each["checkpoint"]).name: each["status"] for each in json.loads(added.stdout)}
    assert added.returncode == 4, added.stderr  # one folder is only half there
    assert {name: status for name, status in statuses.items() if status != "added"} == {
        "awq": "skipped", "model.gguf": "skipped", "half": "failed",
    }  # fmt: skip
    assert len(statuses) == 37  # a link, an empty folder and one without a model apart

    return run


def objects(text: str) -> list[dict[str, Any]]:
    return json.loads(text)  # type: ignore[no-any-return]


def test_which_models_are_here_and_which_cannot_be_loaded(run: Run, cluster: Path) -> None:
    local = objects(run("list", "--local", "--json"))
    assert len(local) == 34
    assert all(each["bytes"] and each["local_path"].startswith(str(cluster)) for each in local)
    assert {each["status"] for each in local} == {"ready"}

    small = run("list", "--local", "--dtype", "bf16", "--max-size", "10GB", "--sort", "size", "-q").split()
    assert len(small) == 30
    assert small[0] == "size-7"  # the largest first
    assert not [name for name in small if name.startswith("float")]

    assert {each["name"] for each in objects(run("list", "--all", "--search", "team base", "--json"))} == {
        f"tuned-{n:02}" for n in range(12)
    }  # the fine-tunes of a base, by the front matter of their README.md


def test_who_uses_a_file_and_what_differs_from_the_base(run: Run, cluster: Path) -> None:
    file = cluster / "base" / "model.safetensors"
    statement = f"SELECT model FROM model_shards WHERE local_path = '{file}' ORDER BY model"
    assert [row["model"] for row in objects(run("sql", statement, "--json"))] == ["base", "lora"]

    rows = objects(run("diff", "base", "tuned-03", "--values", "--json"))
    assert "down_proj" in json.dumps(rows)
    assert "layers.0" not in json.dumps([row for row in rows if row.get("change") == "values"])


def test_each_kind_is_loaded_by_its_name(run: Run, cluster: Path) -> None:
    def weight(name: str) -> torch.Tensor:
        return lading.load_model(name, dtype="auto", progress=False).get_parameter(QUERY)

    base = load_file(cluster / "base" / "model.safetensors")[QUERY]
    for name in ("base", "tuned-00", "sharded-0", "pickled-1", "distributed"):
        assert torch.equal(weight(name), base), name
    for name in ("size-3", "float-1", "sharded-2", "lora"):
        assert weight(name).isfinite().all(), name
    assert not torch.equal(weight("lora"), base)


@pytest.mark.slow
def test_a_fine_tune_in_two_ranks(run: Run, tmp_path: Path) -> None:
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLE), "tuned-02", "--tp", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, env=env, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pin_move_export_and_undo(run: Run, cluster: Path, tmp_path: Path) -> None:
    # Pin: what the card says is checked at each load.
    digest = hashlib.sha256((cluster / "tuned-01" / "model.safetensors").read_bytes()).hexdigest()
    run("add", cluster / "tuned-01", "--set", f"sha256={digest}")
    run("load", "tuned-01", "--no-progress")
    run("add", cluster / "tuned-02", "--set", f"sha256={'f' * 64}")
    run("load", "tuned-02", "--no-progress", code=4)

    # Move: a second run finds the card's checkpoint where it is now.
    (cluster / "tuned-04").rename(cluster / "best")
    (moved,) = objects(run("add", cluster / "best", "--json"))
    assert (moved["name"], moved["status"]) == ("tuned-04", "moved")
    run("rename", "tuned-04", "best")
    run("load", "best", "--no-progress")

    # Export: a repository for others, with the changes of the adapter merged.
    run("export", "lora", tmp_path / "out", "--no-progress")
    exported = load_file(tmp_path / "out" / "model.safetensors")[QUERY]
    assert not torch.equal(exported, load_file(cluster / "base" / "model.safetensors")[QUERY])

    # Undo: the names go, and the files stay.
    before = sorted(path for path in cluster.rglob("*") if path.is_file())
    run("remove-card", "best", "tuned-05", "--yes")
    run("list", "best", code=2)
    assert sorted(path for path in cluster.rglob("*") if path.is_file()) == before
    assert [each["status"] for each in objects(run("add", cluster / "tuned-05", "--json"))] == ["added"]
