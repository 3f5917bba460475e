"""What installed packages register: entry points, of which all that concern lading are found by one scan.

A scan reads a file of every installed distribution, and a load asks for several groups.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from typing import Protocol


def registered(group: str) -> EntryPoints:
    """The entry points of a group, as they were when this process first asked."""
    return _scan(tuple(sys.path)).select(group=group)


class _Found(Protocol):
    # What a scan for all groups gives is of another type in Python 3.11 than in those that follow.
    def select(self, *, group: str) -> EntryPoints: ...


@lru_cache(maxsize=4)
def _scan(path: tuple[str, ...]) -> _Found:
    """:param path: where distributions are looked for; another one is scanned anew."""
    return entry_points()
