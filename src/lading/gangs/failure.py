"""Exceptions of ranks, in a form that can be sent to other ranks."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lading.errors import GangError

KNOWN = "_known_to_gangs"
"""The attribute, on an exception that a gang has raised, with the position of the gang's calls at that time."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of one or more ranks.

    :ivar rank: the rank that raised it; the first of several.
    :ivar ranks: the ranks that caused it.
    :ivar text: the type and message of each exception.
    :ivar trace: the traceback on ``rank``.
    :ivar pickled: the exception of ``rank``; empty if it does not survive pickling.
    """

    rank: int
    ranks: tuple[int, ...]
    text: str
    trace: str
    pickled: bytes

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Create the failure of one rank."""
        message = str(error)
        text = f"rank {rank}: {type(error).__name__}{': ' if message else ''}{message}"
        ranks: tuple[int, ...] = (rank,)
        if isinstance(error, GangError):
            text, ranks = message, error.ranks  # this rank only forwards the error of others
        trace, pickled = "", b""
        with suppress(Exception):  # after a MemoryError there may be memory for the message only
            trace = "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(error)
            back = pickle.loads(pickled)
            if type(back) is not type(error) or str(back) != message:
                pickled = b""
        except Exception:
            pickled = b""

        return cls(rank, ranks, text, trace, pickled)

    @classmethod
    def merge(cls, failures: Sequence[Failure]) -> Failure:
        """Merge the failures of several ranks at one call; only the first keeps its traceback and exception."""
        ranks = sorted({rank for failure in failures for rank in failure.ranks})
        texts = dict.fromkeys(failure.text for failure in failures)

        return cls(failures[0].rank, tuple(ranks), "; ".join(texts), failures[0].trace, failures[0].pickled)

    def exception(self) -> BaseException | None:
        """Return the exception itself, or ``None`` if it cannot be unpickled in this process."""
        if not self.pickled:
            return None

        try:
            error = pickle.loads(self.pickled)
        except Exception:
            return None
        if not isinstance(error, BaseException):
            return None

        error.__dict__.pop(KNOWN, None)
        error.add_note(self._note())

        return error

    def as_gang_error(self) -> GangError:
        """Return the error for the ranks that did not fail, with the exception as its cause."""
        error = GangError(self.text, ranks=self.ranks)
        error.__cause__ = self.exception()
        if error.__cause__ is None and self.trace:
            error.add_note(self._note())

        return error

    def _note(self) -> str:
        return f"It was raised on rank {self.rank}:\n{self.trace}"
