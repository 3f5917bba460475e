from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder on the disk: a file in memory cannot be evicted from the page cache."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name).resolve()
