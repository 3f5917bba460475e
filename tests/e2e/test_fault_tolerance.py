"""Whatever ends a command, or keeps it from working: catalog and caches are as before or as after, and a retry works.

Command lines run as processes of a :class:`~nursery.Nursery`, against a hub and a web server on loopback.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cache_tools import files_in, require_consistent, require_consistent_hub
from catalog_tools import settings_in
from lading.card import path_uri
from lading.catalog import lifecycle
from make_checkpoint import make, tensors
from nursery import Ended, Nursery, may_mount
from servers.hostile import Server, serve
from servers.hub import FakeHub

INDEX = "model.safetensors.index.json"

CARD = """\
name: {name}
model_family: qwen
checkpoint: {uri}
model_config: {{model_dim: 32, max_seq_len: 128, vocab_size: 100, tied_embeddings: true, num_layers: 2,
  num_attn_heads: 4, num_key_value_heads: 2, head_dim: 8, qkv_proj_bias: false, q_norm: true, k_norm: true,
  ffn_inner_dim: 64}}
"""


@dataclass(frozen=True)
class World:
    """What all tests share: servers that publish one model, and a catalog with cards of it."""

    nursery: Nursery
    hub: FakeHub
    web: Server
    shards: dict[str, str]
    """SHA-256 of the files that hold tensors, by name."""
    template: Path
    """The catalog with the cards ``far`` (on the hub), ``web`` and ``near``."""
    uris: dict[str, str]
    """Of the cards, as the catalog has them."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = make(tmp_path_factory.mktemp("near") / "checkpoint", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    digests = {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n.endswith(".safetensors")}
    home = tmp_path_factory.mktemp("nursery")

    with FakeHub() as hub, serve({f"/m/{name}": data for name, data in files.items()}) as web:
        hub.add("Some/Tiny", files)
        nursery = Nursery(home, hub.url)
        uris = {"far": "hg://some/tiny", "web": web.url(f"/m/{INDEX}"), "near": path_uri(folder)}
        (home / "cards.yaml").write_text("---\n".join(CARD.format(name=name, uri=uri) for name, uri in uris.items()))
        template = home / "catalog.sqlite"
        done = nursery.run(["import", home / "cards.yaml"], Place(home, nursery).env)
        assert done.code == 0, done.err
        yield World(nursery, hub, web, digests, template, uris)
        nursery.close()


@dataclass(frozen=True)
class Place:
    """A catalog and caches in a folder, and command lines that use them."""

    folder: Path
    nursery: Nursery

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.sqlite"

    @property
    def env(self) -> dict[str, str]:
        return {
            "LADING_DATABASE_URL": f"sqlite:///{self.catalog}",
            "LADING_CACHE_DIR": str(self.folder / "cache"),
            "HF_HUB_CACHE": str(self.folder / "hub"),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
        }

    def run(self, *words: str | Path, code: int = 0, **ways: object) -> Ended:
        done = self.nursery.run(words, self.env, **ways)
        assert done.code == code, f"{words}, {ways}: {done}"
        assert "Traceback" not in done.err
        return done

    def sql(self, sql: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.catalog, isolation_level=None)) as connection:
            return connection.execute(sql).fetchall()

    def require_consistent(self, shards: dict[str, str]) -> None:
        """Nothing is damaged, and what the catalog says of files is true."""
        assert lifecycle.check(settings_in(self.folder)) == []
        require_consistent(self.folder / "cache")
        require_consistent_hub(self.folder / "hub")
        copies = self.sql(f"SELECT file, path FROM copies WHERE file <> '{INDEX}'")
        for file, path in copies:
            assert hashlib.sha256(Path(str(path)).read_bytes()).hexdigest() == shards[str(file)]
        # What is recorded together is there as a whole or not at all.
        assert len(copies) % len(shards) == 0
        assert len(self.sql("SELECT * FROM digests")) % len(tensors()) == 0
        assert {result for (result,) in self.sql("SELECT result FROM verifications")} <= {"match", "recorded"}


@pytest.fixture
def place(world: World, tmp_path: Path) -> Place:
    shutil.copy(world.template, tmp_path / "catalog.sqlite")
    return Place(tmp_path, world.nursery)


# --- killed ----------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[list[list[str]], list[str]]] = {
    "pull from the hub": ([], ["pull", "far"]),
    "pull from the web": ([], ["pull", "web"]),
    "index here": ([], ["index", "near"]),
    "index the hub": ([], ["index", "far"]),
    "index the web": ([], ["index", "web"]),
    "verify": ([["pull", "web"]], ["verify", "web"]),
    "verify what nothing is known of": ([["index", "near"]], ["verify", "near"]),
    "load and record digests": ([["index", "near"]], ["load", "near"]),
    "load from the hub": ([], ["load", "far", "--verify", "always"]),
}
"""What goes before, and what is killed."""


def points(quick: int, slow: int) -> list[object]:
    """How many points, in which tier."""
    return [quick, pytest.param(slow, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", points(2, 30))
@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_that_is_killed(world: World, place: Place, tmp_path: Path, what: str, count: int) -> None:
    """Half of them at a random time, half of them just before a random call that changes a file."""
    before, command = COMMANDS[what]
    rng = random.Random(f"{what} {count}")

    def renew() -> None:
        for name in ("cache", "hub"):
            if not before:
                shutil.rmtree(tmp_path / name, ignore_errors=True)
        for path in tmp_path.glob("catalog.sqlite-*"):
            path.unlink()
        shutil.copy(prepared, place.catalog)

    for words in before:
        place.run(*words)
    place.sql("PRAGMA wal_checkpoint(TRUNCATE)")
    prepared = shutil.copy(place.catalog, tmp_path / "prepared")

    began = time.monotonic()
    place.run(*command)
    whole = time.monotonic() - began
    renew()
    place.run(*command, counted=str(tmp_path / "count"))
    calls = (tmp_path / "count").stat().st_size
    assert calls > 0

    killed = 0
    for i in range(count):
        renew()
        if i % 2:
            child = world.nursery.start(command, place.env)
            time.sleep(rng.uniform(0, 1.1 * whole))
            ended = child.kill()
        else:
            ended = world.nursery.run(command, place.env, killed_at=rng.randint(1, calls))
        assert ended.code in (0, -9), ended
        killed += ended.code == -9

        place.require_consistent(world.shards)
        place.run(*command)
        place.require_consistent(world.shards)
        require_result(place, command, world)
    assert killed >= count // 2


def require_result(place: Place, command: Sequence[str], world: World) -> None:
    """What the command was for is in the catalog."""
    action, name, *_ = command
    where = f"checkpoint_id = (SELECT id FROM checkpoints WHERE uri = '{world.uris[name]}')"
    assert place.sql(f"SELECT count(*) FROM tensors WHERE {where}") == [(len(tensors()),)]
    if action != "index":
        copies = place.sql(f"SELECT file FROM copies WHERE {where} AND verified_at IS NOT NULL")
        assert {file for (file,) in copies} >= set(world.shards)
    if action == "load" or (action == "verify" and name == "near"):
        assert place.sql(f"SELECT count(*) FROM digests WHERE {where}") == [(len(tensors()),)]
