"""Options and types of parameters that several commands have."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

import click

from lading.formats.manifest import FLOAT_NAMES


class GivenPath(click.Path):
    """A path that is not empty: an unset variable of a shell is not the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        if not os.fspath(value):
            self.fail("expected a path, found ''.", param, ctx)

        return super().convert(value, param, ctx)


class GivenPlace(GivenPath):
    """A path, or an address, which stays a text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path, or the address."""
        return value if isinstance(value, str) and "://" in value else super().convert(value, param, ctx)


no_restrict = click.option(
    "--no-restrict",
    is_flag=True,
    help="Skip objects in a torch.save file that a state dict does not need, instead of refusing the file.",
)
"""The option of commands that read checkpoints at paths; they receive ``no_restrict``."""

dry_run = click.option("-n", "--dry-run", is_flag=True, help="Only show what would be done.")
no_progress = click.option("--no-progress", is_flag=True, help="Hide the progress bar.")
one_object = click.option("--json", "as_json", is_flag=True, help="One JSON object.")
verify_mode = click.option(
    "--verify",
    type=click.Choice(("auto", "always", "never")),
    default="auto",
    help="Check bytes against digests; auto (the default): unless the file is verified and unchanged.",
)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i)?)?B?", re.IGNORECASE)


class Size(click.ParamType[int]):
    """A parameter that is a number of bytes, such as ``5GB`` or ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value)
        power = 0 if match is None or match[2] is None else "KMGTP".index(match[2].upper()) + 1
        size = 0 if match is None else int(min(float(match[1]) * (1024 if match[3] else 1000) ** power, sys.maxsize))
        if size < 1:
            self.fail(f"expected a size such as 5GB or 512MiB, found {value!r}.", param, ctx)

        return size


DTYPES = click.Choice(("auto", "keep", *FLOAT_NAMES), case_sensitive=False)
"""The type of the option ``--dtype``."""
