"""The command line."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading
import time


def main() -> None:
    """Run the command line of this process, and exit."""
    _fill_closed_streams()
    sys.unraisablehook = _interrupt_again
    # Imported modules are never garbage, but scanning their 100,000 objects would take a tenth of the time of a short
    # command; and a search for garbage at the exit, where the system takes all memory back, a third of it.
    gc.set_threshold(200_000)
    atexit.register(gc.freeze)

    try:
        from lading.cli.app import app

        app()
    except KeyboardInterrupt:
        # During the command, `Program` handles it; this covers imports and the exit.
        sys.exit(130)


def _interrupt_again(lost: sys.UnraisableHookArgs) -> None:
    """Interrupt the main thread once more, if an interruption came where Python drops all exceptions.

    That is so in the callbacks of weak references, as each import has one: without this, a command lost about one in a
    hundred interruptions of its first half second.
    """
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return

    def interrupt() -> None:
        time.sleep(0.01)  # until the callback has ended
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()


def _fill_closed_streams() -> None:
    """Open the null device in place of each closed standard stream.

    Otherwise the next opened file takes its number, and a C library that writes to stderr would damage a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
