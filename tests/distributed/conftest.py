from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Pool


@pytest.fixture(scope="module")
def _pools() -> Iterator[dict[int, Pool]]:
    """Not for the whole session: the many threads of gloo keep a core busy, even of idle ranks."""
    pools: dict[int, Pool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


def _living(pools: dict[int, Pool], size: int) -> Pool:
    # One that hung in another test is closed.
    if size not in pools or pools[size].closed:
        pools[size] = Pool(size)
    return pools[size]


@pytest.fixture
def pool2(_pools: dict[int, Pool]) -> Pool:
    """Two ranks, for all cases that leave them alive."""
    return _living(_pools, 2)


@pytest.fixture
def pool4(_pools: dict[int, Pool]) -> Pool:
    """Four ranks, for all cases that leave them alive."""
    return _living(_pools, 4)
