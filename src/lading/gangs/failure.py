"""What went wrong on some ranks, in a form that reaches the others."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from lading.errors import GangError


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of another rank.

    :ivar ranks: the ranks that failed, as counted in the root gang.
    :ivar text: type and message of each.
    :ivar trace: the traceback on the first of them.
    :ivar pickled: the exception of the first of them; empty where it does not survive the journey.
    """

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
        if isinstance(error, GangError) and error.ranks:
            text, ranks = message, error.ranks  # a rank that only passes on what it has heard is not to blame
        # After a MemoryError there may be no memory for more than the words.
        try:
            trace = "".join(traceback.format_exception(error))
            pickled = pickle.dumps(error)
            back = pickle.loads(pickled)
            if type(back) is not type(error) or str(back) != message:
                pickled = b""
        except Exception:
            trace, pickled = "", b""

        return cls(ranks, text, trace, pickled)

    @classmethod
    def merge(cls, failures: Sequence[Failure]) -> Failure:
        """Failures of several ranks at one call; the first is the one that is shown in full."""
        ranks = sorted({rank for failure in failures for rank in failure.ranks})
        texts = dict.fromkeys(failure.text for failure in failures)

        return cls(tuple(ranks), "; ".join(texts), failures[0].trace, failures[0].pickled)

    def dump(self) -> bytes:
        """The form that travels."""
        return pickle.dumps((self.ranks, self.text, self.trace, self.pickled))

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

        error.add_note(f"It was raised on rank {self.ranks[0]}:\n{self.trace}")

        return error

    def as_gang_error(self) -> GangError:
        """The error for the ranks that did not fail, with the exception as its cause."""
        error = GangError(self.text, ranks=self.ranks)
        error.__cause__ = self.exception()
        if error.__cause__ is None and self.trace:
            error.add_note(f"It was raised on rank {self.ranks[0]}:\n{self.trace}")

        return error
