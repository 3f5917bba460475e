"""What the tests of caches share."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lading.sources.cache import Cache
from tests.servers.hub import git_blob


def files_in(folder: Path, kind: str) -> list[Path]:
    return sorted(path for path in (folder / kind).rglob("*") if path.is_file())


def size_of(cache: Cache) -> int:
    """Return the bytes of all files in a cache of lading's, partially fetched ones included."""
    return sum(path.stat().st_size for kind in ("blobs", "tmp") for path in files_in(cache.folder, kind))


def require_consistent(folder: Path) -> None:
    """What is in a cache of lading's is what its name says, and nothing else is there."""
    for blob in files_in(folder, "blobs"):
        assert re.fullmatch(r"[0-9a-f]{64}\.[a-z]+", blob.name)
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.stem
        assert blob.stat().st_mode & 0o777 == 0o444
        assert blob.stat().st_nlink == 1
    cache = Cache(folder)
    entries = list(cache.entries())
    assert len(entries) == len(files_in(folder, "entries"))
    for entry in entries:
        for file in entry.files.values():
            assert cache.find(file.sha256) is not None
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def require_consistent_hub(folder: Path) -> None:
    """What is in a cache of huggingface_hub is what its name says."""
    for blob in folder.glob("models--*/blobs/*"):
        data = blob.read_bytes()
        if blob.name.startswith("tmp_"):  # by which the client finds the umask; one that is killed leaves it
            assert data == b""
        elif not blob.name.endswith(".incomplete"):
            assert blob.name in (hashlib.sha256(data).hexdigest(), git_blob(data))
    for link in folder.glob("models--*/snapshots/*/**/*"):
        assert link.is_dir() or link.is_symlink()
