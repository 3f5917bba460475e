"""Documents in plain objects, and descriptions of their problems."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

MAX_BYTES: Final = 1 << 20
"""The most bytes of a document, in UTF-8."""
MAX_FILE_BYTES: Final = 64 << 20
"""The most bytes of a file: some 300,000 cards, whose values take half a gigabyte of memory."""
MAX_DEPTH: Final = 32
"""The most levels of mappings and lists, the document itself included."""
MAX_KEY_LENGTH: Final = 200
"""The most characters of a key; below the 1,024 that YAML allows in a simple key."""
MAX_PROBLEMS: Final = 20
"""The most problems of a document; after them, the rest of it is not read."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class TooManyProblemsError(Exception):
    """A document with more than ``MAX_PROBLEMS`` problems."""


@dataclass(slots=True)
class Document:
    """A document in plain objects: mappings, lists, strings, numbers, booleans, null."""

    value: object = None
    problems: list[str] = field(default_factory=list)
    """Problems, each after its path in the document: ``.model_config.head_dim: expected …, found …``, or
    ``: line 3, column 7: …`` if the document cannot be parsed. If there are any, ``value`` is not valid."""

    def add(self, path: str, message: str) -> None:
        self.problems.append(f"{path}: {message}")
        if len(self.problems) > MAX_PROBLEMS:
            self.problems[-1] = f": there are more problems than these {MAX_PROBLEMS}"
            raise TooManyProblemsError

    def check_depth(self, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            self.add(path, f"expected at most {MAX_DEPTH} levels of nesting, found more")
            raise TooManyProblemsError

    def check_key(self, path: str, key: str, seen: Mapping[str, object]) -> None:
        if key in seen:
            self.add(join(path, key), "expected every key once, found it twice")
        elif not 0 < len(key) <= MAX_KEY_LENGTH or not key.isprintable():
            self.add(path, f"expected keys of 1 to {MAX_KEY_LENGTH} printable characters, found {show(key)}")

    def check_scalar(self, path: str, value: object) -> None:
        """Add a problem if a database with 64-bit integers and text in UTF-8 cannot store ``value``."""
        match value:
            case str() if _UNSTORABLE.search(value):
                self.add(path, f"expected text without NUL and unpaired surrogates, found {show(value)}")
            case bool():
                pass
            case int() if not -(2**63) <= value < 2**63:
                self.add(path, f"expected an integer of at most 64 bits, found {show(value)}")
            case float() if not math.isfinite(value):
                self.add(path, f"expected a finite number, found {show(value)}")
            case _:
                pass


_PATH_KEY = re.compile(r"[\w-]{1,60}")


def join(path: str, key: str) -> str:
    """Return ``path`` with ``key`` appended."""
    return f"{path}.{key}" if _PATH_KEY.fullmatch(key) else f"{path}.{key[:60]!r}"


def show(value: object) -> str:
    """Return a description of ``value`` for a message: short, on one line, and safe to print on a terminal."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() if abs(value) >= 2**64:
            return "an integer of more than 64 bits"
        case int() | float():
            return str(value)
        case str():
            return repr(value) if len(value) <= 60 else f"{value[:60]!r}…"
        case Mapping():
            return "a mapping"
        case _:
            return "a list"


def position(line: int, column: int) -> str:
    """Return a position in the text of a document, for a message."""
    return f"line {line}, column {column}"


def integer(text: str, base: int = 10) -> int:
    """Parse an integer; return an arbitrary one of more than 64 bits if the text is too long to fit in 64."""
    # Conversion takes quadratic time, and an integer of 64 bits is longest in base 2.
    return int(text, base) if len(text) <= len("-0b") + 64 else 2**64
