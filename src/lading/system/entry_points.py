"""Entry points of the installed packages, found by one scan for all groups.

A scan reads a file of every installed distribution, and a load needs several groups.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Protocol


def registered(group: str) -> EntryPoints:
    """Return the entry points of ``group``, as of the first call in this process."""
    return _scan(tuple(sys.path)).select(group=group)


class _AllEntryPoints(Protocol):
    # `entry_points()` without a group returns another type in Python 3.11 than in later versions.
    def select(self, *, group: str) -> EntryPoints: ...


@lru_cache(maxsize=4)
def _scan(path: tuple[str, ...]) -> _AllEntryPoints:
    """Return all entry points.

    :param path: the search path of distributions, which keys the cache.
    """
    return entry_points()
