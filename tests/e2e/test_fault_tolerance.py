"""Whatever ends a command, or keeps it from working: catalog and caches are as before or as after, and a retry works.

Command lines run as processes of a :class:`~nursery.Nursery`, against a hub and a web server on loopback.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.cache_tools import files_in
from tests.helpers.fault_world import Place, World
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.helpers.nursery import may_mount

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


@pytest.mark.few(3)
@pytest.mark.parametrize("count", points(1, 30))
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


def require_nothing_half(place: Place) -> None:
    assert files_in(place.cache, "tmp") == []
    assert list(place.hub.rglob("*.incomplete")) == []


# --- at once ---------------------------------------------------------------------------------------------------------

LOAD = """
import hashlib
from lading.models.hub import load_model

state = load_model({name!r}, dtype="auto", progress=False, verify={verify!r}).state_dict()
digest = hashlib.sha256()
for name, tensor in sorted(state.items()):
    digest.update(name.encode() + bytes(tensor.untyped_storage()))
print(digest.hexdigest())
"""


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "ways"),
    [
        pytest.param("far", {}, id="far-locks"),
        pytest.param("web", {}, id="web-locks"),
        pytest.param("far", {"no_locks": True}, id="far-no locks"),
        pytest.param("web", {"no_locks": True}, id="web-no locks", marks=pytest.mark.slow),
    ],
)
def test_eight_processes_load_one_model(world: World, place: Place, name: str, ways: dict[str, object]) -> None:
    expected = place.run("-c", LOAD.format(name="near", verify="never")).out
    at = time.monotonic() + 0.2
    words = ["-c", LOAD.format(name=name, verify="always")]
    children = [world.nursery.start(words, place.env, at=at, **ways) for _ in range(8)]
    ends = [child.wait() for child in children]

    assert [end for end in ends if end.code or end.out != expected] == []
    place.require_consistent(world.shards)
    require_result(place, ["load", name], world)
    require_nothing_half(place)


# --- full ------------------------------------------------------------------------------------------------------------

PAGE = 4096
FULL = "No space left|File too large|disk I/O error"


class Disk:
    """A small file system; where none may be mounted, processes whose files may not grow."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self._filler = folder / "filler"
        self._mounted = may_mount()
        if self._mounted:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "lading", folder], check=True)

    def leave(self, free: int) -> dict[str, object]:
        """So many bytes are left from now on, to a process that is hampered in the ways that are returned."""
        if not self._mounted:
            return {"small_files": free}
        self._filler.write_bytes(bytes(max(0, shutil.disk_usage(self.folder).free - free)))
        return {}

    def tidy(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


@pytest.mark.few(1)
@pytest.mark.parametrize("step", [pytest.param(PAGE, marks=pytest.mark.slow), 6 * PAGE], ids=["each page", "some"])
@pytest.mark.parametrize(
    ("name", "full"), [("far", "catalog"), pytest.param("far", "cache", marks=pytest.mark.slow), ("web", "cache")]
)
def test_a_full_disk(world: World, tmp_path: Path, disk: Disk, name: str, full: str, step: int) -> None:
    """With a little more space each time, until it is enough."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    catalogs, caches = (disk.folder, elsewhere) if full == "catalog" else (elsewhere, disk.folder)
    place = Place(catalogs, world, caches)

    failed = 0
    for free in range(0, 100 * step, step):
        shutil.copy(world.template, place.catalog)
        before = place.rows()
        done = world.nursery.run(["pull", name], place.env, **disk.leave(free))
        disk.tidy()
        if done.code == 0:
            break
        failed += 1

        assert done.code == 8, done
        (line,) = done.errors
        assert re.fullmatch(rf"lading: error: .*({FULL}).*", line), done
        place.require_consistent(world.shards)
        after = place.rows()
        # The catalog is elsewhere than the cache: it knows what was to be fetched, and the weights once all are there.
        copies = {file for _, file, _, path, *_ in after["copies"] if file != path}
        assert after == before or (full == "cache" and copies in (set(), set(world.shards)))
        require_nothing_half(place)

        place.run("pull", name)
        place.require_consistent(world.shards)
        require_result(place, ["pull", name], world)
        for path in [place.cache, place.hub, *catalogs.glob("catalog.*")]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    else:
        raise AssertionError("no space is enough")
    assert failed > 1


def test_a_catalog_on_a_full_disk_does_not_keep_a_model_from_being_loaded(world: World, disk: Disk) -> None:
    place = Place(disk.folder, world)
    shutil.copy(world.template, place.catalog)
    done = place.run("load", "near", **disk.leave(9 * PAGE))  # what it takes to read

    assert "the checks of near are not in the catalog" in done.err
    assert done.errors == []
    disk.tidy()
    place.run("load", "near")
    require_result(place, ["load", "near"], world)


# --- read-only -------------------------------------------------------------------------------------------------------

Freeze = Callable[..., dict[str, object]]


@pytest.fixture(params=["mounts", "permissions"])
def freeze(request: pytest.FixtureRequest) -> Iterator[Freeze]:
    """Makes folders unchangeable to a process that is hampered in the ways that are returned."""
    frozen: list[tuple[Path, int]] = []

    def freeze(*folders: Path) -> dict[str, object]:
        for folder in folders:
            folder.mkdir(exist_ok=True)
        if request.param == "mounts" and may_mount():
            return {"mounted_read_only": [str(folder) for folder in folders]}
        for folder in folders:
            # Files of the caches are left as they are: by their state they are known.
            for path in [folder, *folder.glob("catalog.*"), *(p for p in folder.rglob("*") if p.is_dir())]:
                if not path.is_symlink():
                    frozen.append((path, path.stat().st_mode & 0o777))
        for path, mode in frozen:
            path.chmod(mode & 0o555)
        return {"bound_by_permissions": True}

    yield freeze
    for path, mode in frozen:
        path.chmod(mode)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["far", "web", "near"])
def test_what_is_here_is_loaded_where_nothing_can_be_written(
    world: World, place: Place, freeze: Freeze, name: str
) -> None:
    for folder in (place.cache, place.hub):
        folder.mkdir()
    words = ["-c", LOAD.format(name=name, verify="auto")]
    expected = place.run("-c", LOAD.format(name="near", verify="never")).out
    shutil.copy(world.template, place.catalog)
    if name != "near":
        place.run("pull", name)
    before = place.rows()
    ways = freeze(place.folder)

    done = place.run(*words, **ways)
    assert done.out == expected
    assert ("not in the catalog" in done.err) == (name == "near")
    done = place.run("load", name, "--verify", "always", **ways)
    assert done.errors == []
    assert ("not in the catalog" in done.err) == (name == "near")
    if name != "near":
        place.run("pull", name, **ways)  # there is nothing to fetch
        place.run("verify", name, **ways)
    assert place.rows() == before


@pytest.mark.few(1)
def test_what_is_here_is_verified_where_nothing_can_be_recorded(world: World, place: Place, freeze: Freeze) -> None:
    place.run("pull", "web")
    make(place.folder / "unknown")
    before = place.rows()
    ways = freeze(place.folder)

    for words, results in (
        (["web"], {"match"}),
        (["near"], {"not recorded"}),
        ([str(place.folder / "unknown")], {"not recorded"}),
        (["web", "near"], {"match", "not recorded"}),
    ):
        done = place.run("verify", *words, "--json", **ways)
        assert {row["result"] for row in json.loads(done.out)} == results
        summary = "lading: 2 models done\n" if len(words) > 1 else ""
        assert re.fullmatch(
            f"lading: none of this was recorded, as the catalog .* cannot be written\n{summary}", done.err
        )
    assert place.rows() == before


@pytest.mark.few(1)
def test_what_is_not_right_is_said_where_nothing_can_be_recorded(world: World, place: Place, freeze: Freeze) -> None:
    place.run("pull", "web")
    blob = next(path for path in files_in(place.cache, "blobs") if path.suffix == ".safetensors")
    blob.chmod(0o644)
    blob.write_bytes(bytes(blob.stat().st_size))
    done = place.run("verify", "web", code=4, **freeze(place.folder))

    assert re.search(
        "lading: web does not match its digests. .*\nlading: none of this was recorded, as .*\n$", done.err
    )


def test_what_a_card_publishes_holds_where_nothing_can_be_recorded(
    place: Place, tmp_path: Path, freeze: Freeze
) -> None:
    document, card = tmp_path / "digests.json", tmp_path / "card.yaml"
    folder = make(tmp_path / "m")
    place.run("digests", make(tmp_path / "origin"), "--write", document, "--no-progress")
    card.write_text(f"{qwen_card('team', folder)}digests: digests.json\n")
    place.run("import", card)
    ways = freeze(place.folder)
    place.run("load", "team", "--no-progress", **ways)
    place.run("verify", "team", "--no-progress", **ways)

    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    for command in ("load", "verify"):
        assert f"that {document} publishes" in place.run(command, "team", "--no-progress", code=4, **ways).err


@pytest.mark.few(2)
@pytest.mark.parametrize(("name", "variable"), [("far", "HF_HUB_CACHE"), ("web", "LADING_CACHE_DIR")])
def test_a_pull_into_a_cache_that_cannot_be_written(
    world: World, place: Place, freeze: Freeze, name: str, variable: str
) -> None:
    ways = freeze(place.cache, place.hub)
    for command in ("pull", "load"):
        done = place.run(command, name, code=8, **ways)
        assert re.fullmatch(rf"lading: error: .*; set {variable} to a folder that you can write: .*\n", done.err)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["far", "web"])
def test_a_pull_that_cannot_be_noted(world: World, place: Place, tmp_path: Path, freeze: Freeze, name: str) -> None:
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    shutil.copy(world.template, frozen / "catalog.sqlite")
    shared = Place(frozen, world, tmp_path)
    done = shared.run("pull", name, code=6, **freeze(frozen))

    assert re.fullmatch("lading: error: The catalog .* cannot be written.* LADING_DATABASE_URL.*\n", done.err)
    assert files_in(shared.cache, "blobs") == []
    assert list(shared.hub.rglob("*.safetensors")) == []
