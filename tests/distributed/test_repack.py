"""Ranks that take their columns from a sidecar hold what those without one do, and know it of all bytes."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny_models import whole
from workers import Pool

import lading
from fault_world import CARD
from lading.errors import DigestMismatchError, GangError
from lading.gangs import create_gangs
from lading.models.hub import load_with_report
from make_checkpoint import make, tensors


@pytest.fixture
def catalog(home: Path, tmp_path: Path) -> dict[str, str]:
    """The environment of a catalog with a model and its sidecar for two ranks."""
    folder = make(tmp_path / "near", shards=2)
    (tmp_path / "near.yaml").write_text(CARD.format(name="near", uri=folder))
    env = {
        "LADING_CACHE_DIR": str(tmp_path / "cache"),
        "LADING_DATABASE_URL": f"sqlite:///{tmp_path}/c.sqlite",
        "XDG_CONFIG_HOME": str(tmp_path),
        "LADING_OFFLINE": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        lading.import_cards(tmp_path / "near.yaml")
        report = lading.repack_model("near", tp=2, progress=False)
        assert report.written
    return env


def load(
    env: dict[str, str], sizes: dict[str, int], verify: str, cooperative: bool = False
) -> tuple[dict[str, torch.Tensor], int]:
    os.environ |= env
    with create_gangs("cpu", **sizes) as gangs:
        model, report = load_with_report(
            "near", gangs=gangs, dtype="auto", progress=False, verify=verify, cooperative=cooperative
        )
        full = {name: whole(parameter.detach()).clone() for name, parameter in model.named_parameters()}
        return full, report.bytes_read


def one_by_one(env: dict[str, str], folder: str) -> dict[str, torch.Tensor]:
    from lading.families.qwen import get_qwen_model_hub

    os.environ |= env
    hub = get_qwen_model_hub()
    with create_gangs("cpu", tp=2) as gangs:
        pairs = hub.iter_checkpoint(folder, hub.get_model_config("near"), gangs=gangs)
        return {name: tensor.clone() for name, tensor in pairs}


def rows(env: dict[str, str], sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(env["LADING_DATABASE_URL"].removeprefix("sqlite:///"))) as connection:
        return connection.execute(sql).fetchall()


CHECKS = "SELECT uri LIKE 'repack+tp=2:%', method, result FROM verifications WHERE id > {} ORDER BY id"


@pytest.mark.parametrize("verify", ["auto", "always"])
def test_two_ranks(pool2: Pool, catalog: dict[str, str], verify: str) -> None:
    (before,) = rows(catalog, "SELECT max(id) FROM verifications")[0]
    found = pool2.values(load, catalog, {"tp": 2}, verify)

    expected = tensors()
    for full, bytes_read in found:
        assert {name: torch.equal(tensor, expected[name]) for name, tensor in full.items()} == dict.fromkeys(full, True)
        assert full.keys() == expected.keys()
        norms = sum(t.nbytes for name, t in expected.items() if "norm" in name)
        assert bytes_read == (sum(t.nbytes for t in expected.values()) - norms) // 2 + norms
    # Of the sidecar all was seen; of both files of the checkpoint, nobody has read what it stands for.
    assert rows(catalog, CHECKS.format(before)) == ([(1, "blake3", "match")] if verify == "always" else [])


def test_tensors_one_by_one(pool2: Pool, catalog: dict[str, str], tmp_path: Path) -> None:
    """The first rank asks the catalog for both. What the sidecar stands for is not read, so nobody sees its damage."""
    name = "model.layers.0.mlp.down_proj.weight"
    index = json.loads((tmp_path / "near" / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / "near" / index[name]
    flip(shard, lading.formats.index(shard).offsets[list(lading.formats.index(shard).names).index(name)], catalog)

    first, second = pool2.values(one_by_one, catalog, str(tmp_path / "near"))

    assert torch.equal(torch.cat([first[name], second[name]], 1), tensors()[name])
    assert first.keys() == second.keys() == tensors().keys()


def test_rows_are_cut_as_well(pool4: Pool, catalog: dict[str, str]) -> None:
    expected = tensors()
    for full, bytes_read in pool4.values(load, catalog, {"tp": 2, "sdp": 2}, "always"):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in full.items())
        assert bytes_read < sum(t.nbytes for t in expected.values()) * 0.27


def test_ranks_that_read_together_read_the_checkpoint(pool2: Pool, catalog: dict[str, str]) -> None:
    expected = tensors()
    found = pool2.values(load, catalog, {"tp": 2}, "always", True)
    for full, _ in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in full.items())
    (path,) = Path(catalog["LADING_CACHE_DIR"], "repacked").iterdir()
    path.unlink()
    assert [read for _, read in pool2.values(load, catalog, {"tp": 2}, "always", True)] == [read for _, read in found]


def test_a_host_that_sees_another_file_keeps_all_from_using_it(pool2: Pool, catalog: dict[str, str]) -> None:
    (path,) = Path(catalog["LADING_CACHE_DIR"], "repacked").iterdir()
    found = pool2.values(load_without, catalog, str(path), each=[False, True])

    expected = tensors()
    for full, _ in found:
        assert all(torch.equal(tensor, expected[name]) for name, tensor in full.items())
    with_it = pool2.values(load, catalog, {"tp": 2}, "auto")
    assert all(more > less for (_, more), (_, less) in zip(found, with_it, strict=True))


def load_without(blind: bool, env: dict[str, str], path: str) -> tuple[dict[str, torch.Tensor], int]:
    """Load as a rank of a host where nothing is at ``path``."""
    from lading.checkpoints import sidecar_lookup as beside

    seen = beside._stat
    beside._stat = lambda other: None if blind and str(other) == path else seen(other)
    try:
        return load(env, {"tp": 2}, "auto")
    finally:
        beside._stat = seen


def test_a_bit_that_one_rank_reads(pool2: Pool, catalog: dict[str, str]) -> None:
    (path,) = Path(catalog["LADING_CACHE_DIR"], "repacked").iterdir()
    flip(path, -1, catalog)

    first, second = pool2.run(load, catalog, {"tp": 2}, "always")

    # The last byte is of the last rank.
    assert isinstance(second.error, DigestMismatchError)
    assert "`lading repack near --tp 2`" in str(second.error)
    assert isinstance(first.error, GangError)
    with closing(sqlite3.connect(catalog["LADING_DATABASE_URL"].removeprefix("sqlite:///"))) as connection:
        (last,) = connection.execute("SELECT path, result FROM verifications ORDER BY id DESC LIMIT 1")
    assert last == (str(path), "mismatch")


def flip(path: Path, at: int, env: dict[str, str]) -> None:
    """Flip a bit as a bad disk does, which tells nobody: the catalog knows the file in the state that it has then."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    path.chmod(0o444)
    stat = path.stat()
    with closing(sqlite3.connect(env["LADING_DATABASE_URL"].removeprefix("sqlite:///"))) as connection, connection:
        state = (stat.st_mtime_ns, stat.st_ctime_ns, str(path))
        connection.execute("UPDATE copies SET mtime_ns = ?, ctime_ns = ? WHERE path = ?", state)
