"""What the tests of faults share: one model on a hub and a web server, catalogs with cards of it, and command lines."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from lading.catalog.check import check_catalog
from lading.system.uris import path_uri
from tests.helpers.cache_tools import require_consistent, require_consistent_hub
from tests.helpers.catalog_tools import settings_in
from tests.helpers.make_checkpoint import make, qwen_card, tensors
from tests.helpers.nursery import Ended, Nursery, clean_environment
from tests.servers import hostile
from tests.servers.hostile import Server, serve
from tests.servers.hub import FakeHub

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class World:
    """What all tests share: servers that publish one model, and a catalog with cards of it."""

    nursery: Nursery
    home: Path
    hub: FakeHub
    web: Server
    shards: dict[str, str]
    """SHA-256 of the files that hold tensors, by name."""
    template: Path
    """The catalog with the cards ``far`` (on the hub), ``web`` and ``near``."""
    uris: dict[str, str]
    """The addresses of the checkpoints in the catalog, by the names of their cards."""

    def behave(self) -> None:
        """Both servers are honest, and have forgotten what they were asked."""
        self.web.behavior, self.web.state = hostile.honest, {}
        self.hub.behave()


@contextmanager
def open_world(home: Path, nursery: Nursery) -> Iterator[World]:
    """The servers, and what else is shared, in a new folder."""
    folder = make(home / "checkpoint", shards=2)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    digests = {n: hashlib.sha256(data).hexdigest() for n, data in files.items() if n.endswith(".safetensors")}

    with FakeHub() as hub, serve({f"/m/{name}": data for name, data in files.items()}) as web:
        hub.add("Some/Tiny", files)
        uris = {"far": "hg://some/tiny", "web": web.url(f"/m/{INDEX}"), "near": path_uri(folder)}
        (home / "cards.yaml").write_text("---\n".join(qwen_card(name, uri) for name, uri in uris.items()))
        world = World(nursery, home, hub, web, digests, home / "catalog.sqlite", uris)
        Place(home, world).run("import", home / "cards.yaml")
        yield world


@dataclass(frozen=True)
class Place:
    """A catalog and caches in a folder, and command lines that use them."""

    folder: Path
    world: World
    caches: Path | None = None
    """Instead of ``folder``."""

    @property
    def cache(self) -> Path:
        return (self.caches or self.folder) / "cache"

    @property
    def hub(self) -> Path:
        return (self.caches or self.folder) / "hub"

    @property
    def catalog(self) -> Path:
        return self.folder / "catalog.sqlite"

    @property
    def env(self) -> dict[str, str]:
        return {
            **clean_environment(),
            "HOME": str(self.world.home),
            "HF_ENDPOINT": self.world.hub.url,
            "HF_HOME": str(self.world.home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "LADING_DATABASE_URL": f"sqlite:///{self.catalog}",
            "LADING_CACHE_DIR": str(self.cache),
            "HF_HUB_CACHE": str(self.hub),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
        }

    def run(self, *words: str | Path, code: int = 0, **ways: object) -> Ended:
        done = self.world.nursery.run(words, self.env, **ways)
        assert done.code == code, f"{words}, {ways}: {done}"
        assert "Traceback" not in done.err
        return done

    def sql(self, sql: str) -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(self.catalog, isolation_level=None)) as connection:
            return connection.execute(sql).fetchall()

    def rows(self) -> dict[str, list[tuple[object, ...]]]:
        """All that is known of checkpoints."""
        tables = ("checkpoints", "shards", "tensors", "digests", "copies", "verifications", "card_checkpoints")
        return {table: self.sql(f"SELECT * FROM {table}") for table in tables}

    def require_consistent(self, shards: dict[str, str]) -> None:
        """Nothing is damaged, and what the catalog says of files is true."""
        assert check_catalog(settings_in(self.folder)) == []
        require_consistent(self.cache)
        require_consistent_hub(self.hub)
        copies = self.sql(f"SELECT file, path FROM copies WHERE file NOT IN ('{INDEX}', path)")
        for file, path in copies:
            assert hashlib.sha256(Path(str(path)).read_bytes()).hexdigest() == shards[str(file)]
        # What is recorded together is there as a whole or not at all.
        assert len(copies) % len(shards) == 0
        assert len(self.sql("SELECT * FROM digests")) % len(tensors()) == 0
        assert {result for (result,) in self.sql("SELECT result FROM verifications")} <= {"match", "recorded"}
