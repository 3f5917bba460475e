"""What the tests of gangs share: gangs that live as long as their worker, and what they should raise."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lading.errors import GangError
from lading.gangs import Gangs, create_gangs
from tests.distributed.workers import Outcome

TIMEOUT = 4.0
"""The timeout of the gangs where a rank is stopped."""

_MADE: dict[Any, Gangs] = {}


_KEPT = 4
"""Gangs that stay: each of them has its ranks tell one another that they live, which takes the time of all others."""


def gangs_of(timeout: float = 300, **sizes: int) -> Gangs:
    key = (timeout, *sorted(sizes.items()))
    gangs = _MADE.pop(key, None) or create_gangs(timeout=timedelta(seconds=timeout), **sizes)
    _MADE[key] = gangs  # the one used last stands last
    if len(_MADE) > _KEPT:
        _MADE.pop(next(iter(_MADE))).close()  # all ranks ask for the same ones in the same order
    return gangs


def raised_by(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except BaseException as ex:
        return ex
    raise AssertionError("nothing was raised")


def check_gang_errors(outcomes: list[Outcome], rank: int) -> None:
    for outcome in outcomes:
        assert isinstance(outcome.error, GangError), (outcome, outcome.trace)
        assert outcome.error.ranks == (rank,), outcome.error
        assert f"rank {rank}" in str(outcome.error)
