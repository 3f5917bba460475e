"""Entry points: those of the installed packages, found by one scan for all groups, and those of this process.

A scan reads a file of every installed distribution, and a load needs several groups.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoints, entry_points
from types import MappingProxyType
from typing import Any, Final, Protocol

FAMILIES_GROUP: Final = "lading.families"

_HERE: Final[dict[str, dict[str, Any]]] = {}
"""The objects that this process registered, by group and name."""


def register(group: str, name: str, value: object) -> None:
    """Register an object under a name of ``group`` for this process."""
    _HERE.setdefault(group, {})[name] = value


def registered_here(group: str) -> Mapping[str, Any]:
    """Return what this process registered in ``group``, by name."""
    return MappingProxyType(_HERE.get(group, {}))


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
