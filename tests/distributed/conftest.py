from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from workers import Pool


@pytest.fixture(scope="session")
def pool2() -> Iterator[Pool]:
    """Two ranks, for all cases that leave them alive."""
    with Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator[Pool]:
    """Four ranks, for all cases that leave them alive."""
    with Pool(4) as pool:
        yield pool
