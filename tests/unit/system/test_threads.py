"""A wait for a thread that a signal ends takes nothing from the next wait."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from lading.system.threads import Worker


def test_an_interrupted_wait_does_not_end_the_thread() -> None:
    go_on, done = threading.Event(), []

    def work() -> None:
        go_on.wait(10)
        time.sleep(0.05)
        done.append(True)

    worker = Worker(work, "test")
    assert worker.ended  # it was not started
    worker.wait_if_started()

    worker.start()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        worker.wait(10)
    timer.join()

    assert not worker.ended
    assert not worker.wait(0.01)
    go_on.set()
    worker.wait_if_started()
    assert done == [True]
    assert worker.ended
    assert worker.wait()


def test_a_thread_that_raises_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())

    def work() -> None:
        raise RuntimeError

    worker = Worker(work, "test")
    worker.start()
    assert worker.wait(10)
    assert told.wait(10)
