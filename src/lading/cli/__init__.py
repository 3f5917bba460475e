"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line of this process, and exit."""
    try:
        from lading.cli.app import app

        app()
    except KeyboardInterrupt:
        # Only the moments around the command itself are left for here: imports, and the way out.
        sys.exit(130)
