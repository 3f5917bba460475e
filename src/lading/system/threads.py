"""Threads that can be waited for also when a signal ends the wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Worker:
    """A daemon thread.

    Waiting for it is not ``Thread.join``: when a signal interrupts that with an exception, Python 3.11 takes the lock
    that the running thread holds for one of its own, releases it, and calls the thread ended from then on. Whoever
    cleaned up behind it would do so while it still works.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has ended; returns whether it has.

        :param timeout: in seconds; default: none.
        """
        return self._ended.wait(timeout)

    @property
    def ended(self) -> bool:
        """Whether it has, or was never started."""
        return self._ended.is_set() or self._thread.ident is None

    def wait_if_started(self) -> None:
        """Wait until it has ended, though :meth:`start` may have been interrupted.

        An interrupt may come while that waits for the thread, which then runs although it has no number yet.
        """
        until = time.monotonic() + 1
        while self._thread.ident is None and time.monotonic() < until:
            time.sleep(0.001)
        if self._thread.ident is not None:
            self._ended.wait()

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._ended.set()
