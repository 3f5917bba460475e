"""Calls of obstore that end at once on Ctrl-C, or from another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future, wait
from functools import lru_cache
from typing import Any, TypeVar

from lading.sources.web.connection import StoppedError

T = TypeVar("T")

_LOOK = 0.2
"""The most seconds until a wait looks again."""


class Calls:
    """The asynchronous calls of one bucket, for callers that wait.

    obstore's own calls that wait heed no signal, and a store that does not answer holds them for minutes.
    """

    def __init__(self) -> None:
        self._running: set[Future[Any]] = set()
        self._lock = threading.Lock()

    def run(
        self, function: Callable[..., Awaitable[T]], *args: object, limit: float | None = None, grace: float = 0
    ) -> T:
        """Return what ``await function(*args)`` does.

        :param limit: the most seconds to wait; default: those of the request itself.
        :param grace: the seconds that the call has to end by itself if the wait is interrupted.

        :raises StoppedError: :meth:`end` was called.
        :raises TimeoutError: the limit has passed.
        """

        async def call() -> T:
            return await function(*args)

        with self._lock:  # the store may be asked, and `end` be called, before the next line
            future = asyncio.run_coroutine_threadsafe(call(), _event_loop())
            self._running.add(future)
        try:
            return result_of(future, limit)
        except CancelledError:
            raise StoppedError from None
        except BaseException:
            wait([future], grace)
            raise
        finally:
            future.cancel()  # does nothing to what has ended
            self._running.discard(future)

    def end(self) -> None:
        """End the calls in progress in other threads."""
        with self._lock:
            running = list(self._running)
        for future in running:
            future.cancel()


def result_of(future: Future[T], limit: float | None = None) -> T:
    """Return the result of a future.

    This looks again and again: a signal that comes just before a wait does not end it.

    :param limit: the most seconds to wait; default: no limit.

    :raises TimeoutError: the limit has passed.
    """
    until = None if limit is None else time.monotonic() + limit
    while not future.cancelled() and not wait([future], _LOOK).done:
        if until is not None and time.monotonic() >= until:
            raise TimeoutError

    return future.result()


@lru_cache(maxsize=1)
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return the event loop of all calls, in a thread of its own: that of the caller may have one that runs."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="lading-cloud", daemon=True).start()

    return loop
