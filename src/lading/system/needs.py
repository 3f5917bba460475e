"""The need for torch, which questions about models do without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lading.errors import TorchNotFoundError


@contextmanager
def needs_torch(what: str) -> Iterator[None]:
    """Say that ``what`` needs torch, if the block fails to import it.

    :raises TorchNotFoundError: torch is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        if not lacks_torch(error):
            raise
        raise TorchNotFoundError.of(what, error) from error


def lacks_torch(error: ImportError) -> bool:
    """Return whether what cannot be imported is torch."""
    return (error.name or "").partition(".")[0] == "torch"
