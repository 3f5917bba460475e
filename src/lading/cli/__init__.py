"""The command line."""

from __future__ import annotations

import gc
import os
import sys


def main() -> None:
    """Run the command line of this process, and exit."""
    _fill_closed_streams()
    # What is imported stays, and is much: looking for garbage in it takes a tenth of the time of a short command.
    gc.set_threshold(100_000)

    try:
        from lading.cli.app import app

        app()
    except KeyboardInterrupt:
        # Only the moments around the command itself are left for here: imports, and the way out.
        sys.exit(130)


def _fill_closed_streams() -> None:
    """Open the null device as each standard stream that is closed.

    The next files that are opened would else take their numbers, and what a library written in C says on stderr would
    go into a checkpoint.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
