"""What went wrong on some ranks, in a form that reaches the others."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lading.errors import GangError

KNOWN = "_known_to_gangs"
"""An attribute of exceptions that a gang has raised: where its calls stood then."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of another rank.

    :ivar rank: who raised it; of several ranks, the first.
    :ivar ranks: the ranks to blame.
    :ivar text: type and message of each.
    :ivar trace: the traceback on ``rank``.
    :ivar pickled: the exception of ``rank``; empty where it does not survive the journey.
    """

    rank: int
    ranks: tuple[int, ...]
    text: str
    trace: str
    pickled: bytes

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The failure of one rank."""
        message = str(error)
        text = f"rank {rank}: {type(error).__name__}{': ' if message else ''}{message}"
        ranks: tuple[int, ...] = (rank,)
        if isinstance(error, GangError):
            text, ranks = message, error.ranks  # a rank that only passes on what it has heard is not to blame
        trace, pickled = "", b""
        with suppress(Exception):  # after a MemoryError there may be no memory for more than the words
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
        """Failures of several ranks at one call; the first is the one that is shown in full."""
        ranks = sorted({rank for failure in failures for rank in failure.ranks})
        texts = dict.fromkeys(failure.text for failure in failures)

        return cls(failures[0].rank, tuple(ranks), "; ".join(texts), failures[0].trace, failures[0].pickled)

    def dump(self) -> bytes:
        """The form that travels."""
        return pickle.dumps((self.rank, self.ranks, self.text, self.trace, self.pickled))

    @classmethod
    def load(cls, data: bytes | memoryview) -> Failure:
        """The failure that another rank of this job has dumped."""
        return cls(*pickle.loads(data))

    def exception(self) -> BaseException | None:
        """The exception itself, as far as it can be had here."""
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
        """The error for the ranks that did not fail, with the exception as its cause."""
        error = GangError(self.text, ranks=self.ranks)
        error.__cause__ = self.exception()
        if error.__cause__ is None and self.trace:
            error.add_note(self._note())

        return error

    def _note(self) -> str:
        return f"It was raised on rank {self.rank}:\n{self.trace}"
