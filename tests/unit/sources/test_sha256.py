from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError
from lading.sources.sha256 import sha256_file
from lading.system.filesystem import FileStat


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 3_000_001])
def test_a_file_has_its_digest_and_its_state(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "f"
    path.write_bytes(data)
    steps: list[int] = []

    digest, stat = sha256_file(path, progress=steps.append)

    assert digest == hashlib.sha256(data).hexdigest()
    assert stat == FileStat.from_stat(path.stat())
    assert sum(steps) == size


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("f")

    assert sha256_file(tmp_path / "link") == sha256_file(tmp_path / "f")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="found nothing there"):
        sha256_file(tmp_path / "f")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(CorruptModelCheckpointError, match="expected a regular file"):
            sha256_file(path)


@pytest.mark.parametrize("change", ["grow", "cut", "same size", "mode"])
def test_a_file_that_changes_has_no_digest(tmp_path: Path, change: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(3 << 20))
    os.utime(path, ns=(0, 0))

    def step(count: int) -> None:
        if change == "grow":
            with open(path, "ab") as file:
                file.write(bytes(1 << 20) if file.tell() < 4 << 20 else b"")
        elif change == "cut":
            os.truncate(path, 1 << 20)
        elif change == "same size":
            with open(path, "r+b") as file:
                file.write(b"x")
        else:
            path.chmod(0o400)

    with pytest.raises(CorruptModelCheckpointError, match="changed while it was read"):
        sha256_file(path, progress=step)
