"""Threads whose completion can be awaited safely even if a signal interrupts the wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Worker:
    """A daemon thread with a safe wait.

    ``Thread.join`` is not safe: when a signal interrupts it with an exception, Python 3.11 releases the lock that the
    running thread holds and considers the thread ended, so that the caller would clean up while it still works.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work = work
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the thread has ended; return whether it has.

        :param timeout: in seconds; default: no limit.
        """
        return self._ended.wait(timeout)

    @property
    def ended(self) -> bool:
        """True if the thread has ended or was never started."""
        return self._ended.is_set() or self._thread.ident is None

    def wait_if_started(self) -> None:
        """Wait until the thread has ended, even if :meth:`start` was interrupted.

        An interrupt during ``start`` can leave a running thread that has no identifier yet.
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
