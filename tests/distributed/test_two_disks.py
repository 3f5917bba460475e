"""Two hosts that have the files of a checkpoint each on a disk of its own, under the same path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import lading
from lading.checkpoints.verification import Verify
from lading.errors import DigestMismatchError, GangError
from lading.formats import index
from lading.gangs import create_gangs, world
from lading.models.hub import load_model
from tests.distributed.workers import Pool
from tests.helpers.make_checkpoint import make, qwen_card


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:  # one of its own: its processes change hosts
        yield pool


@pytest.fixture
def disks(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the disks of the hosts ``a`` and ``b``, and the catalog of ``a``, which has seen its file."""
    for host in "ab":
        make(tmp_path / host)
    here = tmp_path / "model.safetensors"
    here.symlink_to("/proc/self/cwd/model.safetensors")  # another file to each process
    (tmp_path / "near.yaml").write_text(qwen_card("near", here))
    monkeypatch.chdir(tmp_path / "a")
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    lading.import_cards(tmp_path / "near.yaml")
    lading.load_model("near", dtype="auto", progress=False)
    return tmp_path


def environment(disks: Path) -> dict[str, str]:
    return {"LADING_DATABASE_URL": f"sqlite:///{disks}/c.sqlite", "XDG_CONFIG_HOME": str(disks), "LADING_OFFLINE": "1"}


def load_on(host: str, disks: str, verify: Verify = "auto") -> int:
    os.environ |= environment(Path(disks))
    os.chdir(Path(disks) / host)
    world._host_name = lambda: host
    with create_gangs("cpu", tp=2) as gangs:
        load_model("near", gangs=gangs, dtype="auto", progress=False, verify=verify)
        return gangs.root.local_size


def verified() -> list[bool]:
    return [row[0] is not None for row in lading.query("SELECT verified_at FROM copies").rows]


def damage(path: Path) -> None:
    """In the last row of a matrix, which the second rank reads."""
    manifest = index(path)
    tensor = manifest.names.index("model.layers.0.mlp.up_proj.weight")
    with open(path, "r+b") as file:
        file.seek(manifest.offsets[tensor] + manifest.nbytes(tensor) - 1)
        file.write(b"\x3f")


def test_what_another_host_has_seen_of_its_file_says_nothing_of_this_one(pool: Pool, disks: Path) -> None:
    os.utime(disks / "a" / "model.safetensors")
    assert pool.values(load_on, str(disks), each=["a", "b"]) == [1, 1]
    assert verified() == [True]

    damage(disks / "a" / "model.safetensors")
    here, there = pool.run(load_on, str(disks), each=["a", "b"])

    assert isinstance(here.error, DigestMismatchError), here.trace
    assert isinstance(there.error, GangError)
    assert verified() == [False]


def test_a_bad_file_of_another_host_says_nothing_of_this_one(pool: Pool, disks: Path) -> None:
    damage(disks / "b" / "model.safetensors")
    here, there = pool.run(load_always_on, str(disks), each=["a", "b"])

    assert isinstance(there.error, DigestMismatchError), there.trace
    assert isinstance(here.error, GangError)
    assert verified() == [True]


def load_always_on(host: str, disks: str) -> int:
    return load_on(host, disks, verify="always")


def test_a_slice_that_no_catalog_has_seen_is_compared_with_what_the_card_publishes(pool: Pool, disks: Path) -> None:
    make(disks / "origin")
    lading.write_digests(disks / "origin" / "model.safetensors", disks / "digests.json", progress=False)
    here = disks / "published.safetensors"
    here.symlink_to("/proc/self/cwd/model.safetensors")
    (disks / "near.yaml").write_text(qwen_card("near", here) + "digests: digests.json\n")
    lading.import_cards(disks / "near.yaml")
    damage(disks / "b" / "model.safetensors")
    first, second = pool.run(load_on, str(disks), each=["a", "b"])

    assert isinstance(second.error, DigestMismatchError), second.trace
    assert "model.layers.0.mlp.up_proj.weight" in str(second.error)
    assert f"that {disks / 'digests.json'} publishes" in str(second.error)
    assert isinstance(first.error, GangError)

    make(disks / "b")
    assert pool.values(load_on, str(disks), each=["a", "b"]) == [1, 1]
