"""Pulls that are killed between two shards: what had come is used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lading.system.filesystem import FileStat
from tests.helpers.cache_tools import require_consistent
from tests.helpers.fault_world import INDEX, Place, World
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.helpers.nursery import Ended
from tests.helpers.torch_files import save_shards
from tests.servers import hostile
from tests.servers.hostile import Exchange, Server, serve


def killed_when(place: Place, name: str, reached: Callable[[], bool]) -> Ended:
    """A pull that is killed as soon as something is reached."""
    child = place.world.nursery.start(["pull", name, "--no-progress"], place.env)
    until = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < until
        time.sleep(0.01)
    ended = child.kill()
    assert ended.code == -9, ended
    return ended


# --- from a web server -----------------------------------------------------------------------------------------------

SHARDS = [f"/m/model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
PLAIN = {"etag": {"etags": True}, "date": {"etags": False, "old": True}, "nothing": {"etags": False}}
"""What the server says that tells a content from another: never its digest."""


def silent_at(path: str) -> hostile.Behaviour:
    """Nothing comes of this file but its header, until the state says `go on`."""

    def behave(exchange: Exchange) -> None:
        wanted = exchange.wanted()
        if exchange.command == "GET" and exchange.path == path and (wanted is None or wanted[1] > 20_000):
            exchange.hub.state["reached"] = True
            if "go on" not in exchange.hub.state:
                hostile.silent_body(exchange)
                return
        hostile.honest(exchange)

    return behave


@pytest.fixture(params=PLAIN)
def web(request: pytest.FixtureRequest, place: Place, tmp_path: Path) -> Iterator[Server]:
    """A server of a checkpoint of three shards, in whose second one a pull was killed."""
    folder = make(tmp_path / "three", shards=3)
    files = {f"/m/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serve(files, silent_at(SHARDS[1]), **PLAIN[request.param]) as server:
        (tmp_path / "three.yaml").write_text(qwen_card("three", server.url(f"/m/{INDEX}")))
        place.run("import", tmp_path / "three.yaml")
        killed_when(place, "three", lambda: "reached" in server.state)
        server.state["go on"] = True
        server.requests.clear()
        yield server


def fetched(server: Server) -> list[str]:
    """The shards from which more than the header was read."""
    asked = [(path, headers.get("range", "-999999")) for method, path, headers in server.requests if method == "GET"]
    return sorted({path for path, wanted in asked if path in SHARDS and int(wanted.rpartition("-")[2]) > 20_000})


@pytest.mark.few(1)
def test_shards_that_had_come_are_not_fetched_again(web: Server, place: Place) -> None:
    known = web.etags or web.modified is not None
    place.run("pull", "three", "--no-progress")

    assert fetched(web) == (SHARDS[1:] if known else SHARDS)
    require_consistent(place.cache)
    assert place.run("verify", "three").code == 0


@pytest.mark.few(1)
def test_a_shard_that_changed_meanwhile_is_fetched_again(web: Server, place: Place) -> None:
    data = bytearray(web.files[SHARDS[0]])
    data[-1] ^= 1
    web.files[SHARDS[0]] = bytes(data)
    if web.modified is not None:
        web.modified = "Sun, 13 Sep 2020 12:26:41 GMT"
    place.run("pull", "three", "--no-progress")

    assert fetched(web) == SHARDS
    (path,) = place.sql(f"SELECT path FROM copies WHERE file = '{SHARDS[0][3:]}'")
    assert Path(str(path[0])).read_bytes() == data


# --- from the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["safetensors", "bin"])
def far(request: pytest.FixtureRequest, world: World, place: Place, tmp_path: Path) -> list[Path]:
    """The folders for the shards of a checkpoint on the hub, whose second one is slow; the model is ``three``."""
    folder = make(tmp_path / "three", shards=3)
    if request.param == "bin":
        for path in folder.glob("model*"):
            path.unlink()
        save_shards(folder, tensors(), 3)
    repo = world.hub.add("Some/Three", folder)
    (tmp_path / "three.yaml").write_text(qwen_card("three", "hg://some/three"))
    place.run("import", tmp_path / "three.yaml")
    (commit,) = repo.commits
    shards = sorted(path.name for path in folder.glob("*-of-*"))
    world.hub.misbehave(shards[1], "slow")
    return [place.hub / "models--Some--Three" / "snapshots" / commit / name for name in shards]


def bring(place: Place, path: Path) -> None:
    """What another program does that needs a file of the repository."""
    place.run("-c", f"from huggingface_hub import hf_hub_download as bring; bring('Some/Three', {path.name!r})")


@pytest.mark.few(1)
def test_what_a_killed_pull_brought_is_used_and_removed_with_the_rest(
    world: World, place: Place, far: list[Path]
) -> None:
    one, _, three = far
    bring(place, three)
    killed_when(place, "three", one.exists)
    world.hub.behave()
    before = {path: FileStat.from_stat(path.stat()) for path in (one, three)}
    place.run("pull", "three", "--no-progress")

    assert {path: FileStat.from_stat(path.stat()) for path in (one, three)} == before, "neither came again"
    assert {str(kind) for (kind,) in place.sql("SELECT kind FROM copies")} == {"hub"}
    place.run("rm", "three", "--yes")
    assert not one.parent.exists()
