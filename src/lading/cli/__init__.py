"""The command line."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line of this process, and exit."""
    # What is imported stays, and is much: looking for garbage in it takes a tenth of the time of a short command.
    gc.set_threshold(100_000)

    try:
        from lading.cli.app import app

        app()
    except KeyboardInterrupt:
        # Only the moments around the command itself are left for here: imports, and the way out.
        sys.exit(130)
