"""What the tests of the catalog share."""

from __future__ import annotations

import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lading.cards.card_file import CardFile, parse
from lading.catalog.importing import refresh
from lading.catalog.open import open_catalog
from lading.catalog.records import LocalCopy
from lading.formats.manifest import Manifest, Shard
from lading.system.filesystem import FileStat
from lading.system.settings import Settings


def database_url(folder: Path) -> str:
    """Return the URL of the catalog of a folder: a file in it, unless a fixture put another database here."""
    return f"sqlite:///{folder / 'catalog.sqlite'}"


def settings_in(folder: Path, **changes: Any) -> Settings:
    """Settings of a catalog in ``folder``, without cards of a user."""
    values: dict[str, Any] = {
        "database_url": changes["database_url"] if "database_url" in changes else database_url(folder),
        "cache_dir": folder / "cache",
        "card_paths": (),
        "env": None,
        "offline": True,
    }
    return Settings(**(values | changes))


@contextmanager
def without_seeds() -> Iterator[Path]:
    """Have no cards come with the package, but those of the empty folder that this gives."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(refresh, "files", lambda package: Path(name))
        yield Path(name)


def make_without_rows(url: str) -> None:
    """Make a catalog that has a schema and nothing in it: copies of it cost less than migrations."""
    with without_seeds() as folder:
        database = open_catalog(settings_in(folder, database_url=url))
    with database.write() as connection:
        connection.exec_driver_sql("DELETE FROM families")


class CopiedFiles:
    """Catalogs in SQLite that are copies of one without rows; each is made when its URL is first asked for."""

    def __init__(self, template: Path) -> None:
        self._template = template
        self._made: set[Path] = set()

    def url(self, folder: Path) -> str:
        """Return the URL of the catalog of a folder."""
        path = folder / "catalog.sqlite"
        if path not in self._made:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._template, path)
            self._made.add(path)

        return f"sqlite:///{path}"


def card_file(text: str, source: str = "file:///cards/a.yaml") -> CardFile:
    """A card file with this content; its folder is that of ``source``."""
    folder = Path(source.removeprefix("file://")).parent if source.startswith("file://") else None
    return parse(text.encode(), source=source, folder=folder, json_lines=source.endswith(".jsonl"))


def make_manifest(
    tensors: int = 6, shards: int = 2, *, index_name: str | None = "model.safetensors.index.json"
) -> Manifest:
    """A manifest of ``tensors`` matrices spread over ``shards``."""
    per_shard = -(-tensors // shards)
    return Manifest(
        format="safetensors",
        shards=tuple(
            Shard(name=f"model-{i:05}.safetensors", size=1_000_000 + i, sha256=f"{i:064x}" if i else None)
            for i in range(shards)
        ),
        names=[f"model.layers.{i}.self_attn.q_proj.weight" for i in range(tensors)],
        dtypes=["BF16" if i % 3 else "F32" for i in range(tensors)],
        shapes=[(8, 16 + i % 4) for i in range(tensors)],
        shard_ids=array("I", [i // per_shard for i in range(tensors)]),
        offsets=array("q", [128 + (i % per_shard) * 1024 for i in range(tensors)]),
        index_name=index_name,
        metadata={"format": "pt"},
    )


def make_copies(manifest: Manifest, folder: Path, *, verified_at: str | None = None) -> list[LocalCopy]:
    """Copies of all files of a manifest in ``folder``, where nothing need be."""
    names = [shard.name for shard in manifest.shards] + ([manifest.index_name] if manifest.index_name else [])
    return [
        LocalCopy(file=name, path=folder / name, stat=FileStat(10 + i, 20 + i, 30 + i, 40 + i), verified_at=verified_at)
        for i, name in enumerate(names)
    ]


@contextmanager
def nobody() -> Iterator[None]:
    """The rights of a user who owns nothing; for root, whom permissions do not bind."""
    if os.geteuid() != 0:
        yield
        return

    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@contextmanager
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach, unlike those that pytest makes."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)
