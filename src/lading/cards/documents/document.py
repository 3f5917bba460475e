"""A document in plain objects, what is wrong with it, and how that is put into words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

MAX_BYTES: Final = 1 << 20
"""Of a document, in UTF-8."""
MAX_FILE_BYTES: Final = 64 << 20
"""The largest file of documents: some 300,000 cards, whose values take half a gigabyte of memory."""
MAX_DEPTH: Final = 32
"""Levels of mappings and lists, the document itself included."""
MAX_KEY_LENGTH: Final = 200
"""Characters; below the 1,024 up to which YAML takes a key without further ado."""
MAX_PROBLEMS: Final = 20
"""After so many, the rest of a document is not looked at."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class TooManyProblemsError(Exception):
    """Enough is wrong with a document."""


@dataclass(slots=True)
class Document:
    """A document in plain objects: mappings, lists, strings, numbers, booleans, null."""

    value: object = None
    problems: list[str] = field(default_factory=list)
    """What is wrong with it, each behind its place in the document: ``.model_config.head_dim: expected …, found …``,
    or ``: line 3, column 7: …`` where it cannot be read at all. Where there are any, ``value`` means nothing."""

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
        """Add a problem for what a database with integers of 64 bits and text in UTF-8 cannot keep."""
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
    """``path`` and one more step."""
    return f"{path}.{key}" if _PATH_KEY.fullmatch(key) else f"{path}.{key[:60]!r}"


def show(value: object) -> str:
    """A value for a message: short, on one line, and harmless on a terminal."""
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
    """A place in the text of a document, for a message."""
    return f"line {line}, column {column}"


def integer(text: str, base: int = 10) -> int:
    """The integer that digits stand for; one of more than 64 bits where they are too many to be worth it."""
    # Long ones take quadratic time to convert, and none that fits 64 bits is longer than in base 2.
    return int(text, base) if len(text) <= len("-0b") + 64 else 2**64
