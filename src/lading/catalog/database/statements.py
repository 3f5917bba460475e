"""Values in and out of SQL statements: JSON text, chunks, and checks of damaged rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

from lading.errors import CatalogError, InternalError

T = TypeVar("T")


CHUNK = 5_000
"""The most values in one condition: well below the limit of any database."""


def chunks(values: Iterable[T]) -> Iterator[Sequence[T]]:
    """Yield ``values`` in pieces that fit into one statement."""
    at = iter(values)
    while piece := list(islice(at, CHUNK)):
        yield piece


@contextmanager
def intact(what: str) -> Iterator[None]:
    """Report a failure of the body, which makes values from rows, as damage: the rows are not what lading wrote.

    :raises CatalogError: the body failed.
    """
    try:
        yield
    # AttributeError: the ORM gives None for a row without a key, or without the row that it names.
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, InternalError) as error:
        raise CatalogError(
            f"The catalog is damaged: {what} cannot be made of its rows ({error}). `lading db check` says more."
        ) from error


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dumps(value: object) -> str:
    """Return a value as the JSON text that the catalog keeps.

    :raises ValueError: a number that JSON lacks, or text that is not Unicode.
    :raises TypeError: a value that JSON lacks.
    """
    text = _encode(value)
    text.encode()  # half of a surrogate pair passes the line above, but not the database's driver

    return text


def loads_object(text: str) -> dict[str, object]:
    """Return the mapping that :func:`dumps` wrote as ``text``.

    :raises ValueError: it is something else.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is not a JSON object")

    return value
