"""Whatever fails, the catalog is as before or as after: processes that are killed, and processes that race."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lading.catalog.check import check_catalog
from lading.catalog.database import migrate as lifecycle
from lading.catalog.database.target import Found, peek
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.store import AssetStore
from tests.helpers.catalog_tools import card_file, settings_in

CARDS = 1_000

NURSERY = """\
import json, os, sys, time, traceback
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import alembic.command
from tests.helpers.catalog_tools import card_file, make_manifest, settings_in
from lading.catalog.checkpoints.record import CheckpointContents, record_checkpoint
from lading.catalog.database import migrate as lifecycle
from lading.catalog.import_cards import import_files
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.store import AssetStore


def many(version, cards):
    lines = [f'{{"name": "base", "model_family": "v{version}"}}']
    lines += [f'{{"name": "c{i}", "base": "base", "v": {version}}}' for i in range(cards)]
    return card_file("\\n".join(lines), "file:///cards/many.jsonl")


def create(settings, cards):
    open_catalog(settings)


def imports(settings, cards):
    database, files = open_catalog(settings), [many(1, cards), many(2, cards)]
    for i in range(1000):
        import_files(database, [files[i % 2]])


def records(settings, cards):
    database, manifests = open_catalog(settings), [make_manifest(2000, 3), make_manifest(1500, 2)]
    for i in range(1000):
        record_checkpoint(database, CheckpointContents(uri="hg://a/b", manifest=manifests[i % 2]))


def upgrade(settings, cards):
    lifecycle.upgrade(settings)


def mixed(settings, cards):
    store = AssetStore(open_catalog(settings))
    for i in range(5):
        name = f"p{os.getpid()}"
        import_files(store.database, [card_file(f"name: {name}\\nv: {i}\\n", f"file:///c/{name}.yaml")])
        assert store.retrieve_card(name).metadata == {"v": i}
        assert len(store.models()) == cards


for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            folder = Path(command["folder"])
            refresh.files = lambda package: folder / "seeds"
            time.sleep(max(0, command["at"] - time.monotonic()))
            globals()[command["task"]](settings_in(folder / "data"), command["cards"])
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(pid, flush=True)
"""


class Nursery:
    """A process that has imported everything, and whose children begin at once."""

    def __init__(self, folder: Path) -> None:
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def start(self, folder: Path, task: str, *, at: float = 0.0) -> int:
        """A new process that does ``task`` from ``at`` on, by the clock of all processes."""
        return self._ask(folder=str(folder), task=task, at=at, cards=CARDS)

    def wait(self, pid: int) -> int:
        """Its exit code."""
        return self._ask(wait=pid)

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        assert self.wait(pid) == -signal.SIGKILL, self.errors()

    def race(self, folder: Path, task: str, count: int = 4) -> None:
        """Several processes that begin at the same time, and all succeed."""
        at = time.monotonic() + 0.1
        children = [self.start(folder, task, at=at) for _ in range(count)]
        assert [self.wait(pid) for pid in children] == [0] * count, self.errors()

    def errors(self) -> str:
        self._errors.seek(0)
        return self._errors.read()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _ask(self, **command: object) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    lines = [json.dumps({"name": f"s{i}", "model_family": "qwen", "checkpoint": f"hg://a/{i}"}) for i in range(CARDS)]
    (seeds / "many.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(refresh, "files", lambda package: seeds)
    return tmp_path


def rounds(quick: int, slow: int) -> list[object]:
    """The first rounds in the quick tier, all others in the slow one."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n >= quick else []) for n in range(slow)]


def raw(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / "data" / "catalog.sqlite", isolation_level=None)) as connection:
        return connection.execute(sql).fetchall()


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize("number", rounds(6, 60))
def test_a_first_use_that_is_killed(folder: Path, nursery: Nursery, number: int) -> None:
    child = nursery.start(folder, "create")
    time.sleep(random.Random(number).uniform(0, 0.2))
    killed(nursery, child)

    path = folder / "data" / "catalog.sqlite"
    if path.exists():
        assert raw(folder, "PRAGMA integrity_check") == [("ok",)]
        tables = raw(folder, "SELECT count(*) FROM sqlite_master WHERE name = 'cards'")
        assert tables == [(0,)] or raw(folder, "SELECT count(*) FROM cards") == [(CARDS,)]
        assert peek(path) is (Found.CATALOG if tables == [(1,)] else Found.NOTHING)

    settings = settings_in(folder / "data")
    assert len(AssetStore(open_catalog(settings)).asset_names) == CARDS
    assert check_catalog(settings) == []


@pytest.mark.few(2)
@pytest.mark.parametrize("number", rounds(6, 60))
def test_an_import_that_is_killed(folder: Path, nursery: Nursery, number: int) -> None:
    settings = settings_in(folder / "data")
    open_catalog(settings)
    child = nursery.start(folder, "imports")
    time.sleep(random.Random(number).uniform(0, 0.5))
    nursery.kill(child)

    assert raw(folder, "PRAGMA integrity_check") == [("ok",)]
    ((count, contents, first, last),) = raw(
        folder, "SELECT count(*), count(DISTINCT metadata), min(family), max(family) FROM cards WHERE base = 'base'"
    )
    assert (count, contents, first == last) in [(0, 0, True), (CARDS, 1, True)]
    assert check_catalog(settings) == []
    import_files(open_catalog(settings), [card_file("name: c1\nv: 3\n")], replace=True)


@pytest.mark.few(1)
@pytest.mark.parametrize("number", rounds(3, 60))
def test_a_record_that_is_killed(folder: Path, nursery: Nursery, number: int) -> None:
    settings = settings_in(folder / "data")
    store = AssetStore(open_catalog(settings))
    child = nursery.start(folder, "records")
    time.sleep(random.Random(number).uniform(0, 0.4))
    nursery.kill(child)

    stored = store.checkpoint("hg://a/b")
    assert stored is None or (len(stored.manifest), len(stored.manifest.shards)) in [(2000, 3), (1500, 2)]
    assert check_catalog(settings) == []


def killed(nursery: Nursery, child: int) -> None:
    """Kill a process that may have ended by itself."""
    os.kill(child, signal.SIGKILL)
    assert nursery.wait(child) in (0, -signal.SIGKILL), nursery.errors()


# --- racing ----------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("number", rounds(3, 60))
def test_four_first_uses_at_once(folder: Path, nursery: Nursery, number: int) -> None:
    if number % 3 == 1:
        (folder / "data").mkdir()
        (folder / "data" / "catalog.sqlite").touch()
    nursery.race(folder, "create")
    assert raw(folder, "SELECT count(*) FROM cards") == [(CARDS,)]
    assert raw(folder, "PRAGMA journal_mode") == [("wal",)]
    assert check_catalog(settings_in(folder / "data")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", rounds(1, 20))
def test_four_upgrades_at_once(folder: Path, nursery: Nursery, number: int) -> None:
    settings = settings_in(folder / "data")
    open_catalog(settings)
    lifecycle.downgrade(settings, "0")
    nursery.race(folder, "upgrade")
    assert len(AssetStore(open_catalog(settings)).asset_names) == CARDS
    assert check_catalog(settings) == []


@pytest.mark.parametrize("number", rounds(1, 20))
def test_readers_and_writers_at_once(folder: Path, nursery: Nursery, number: int) -> None:
    nursery.race(folder, "mixed")
    assert raw(folder, "SELECT count(*) FROM cards WHERE name LIKE 'p%'") == [(4,)]
