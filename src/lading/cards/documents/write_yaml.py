"""Plain objects, written as a YAML stream."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping

_PLAIN = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./@+-]|:(?=[A-Za-z0-9_./@+-])| (?=[A-Za-z0-9_./(]))*")
# Not strings to readers of YAML 1.1.
_NOT_PLAIN = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def to_yaml(documents: Iterable[Mapping[str, object]]) -> str:
    """Return a YAML stream in block style, keys in the order given; :mod:`lading.cards.documents.read_yaml` reads
    equal values back.

    :raises TypeError: a value that is not plain.
    """
    return "\n---\n\n".join("".join(f"{line}\n" for line in _block(document)) for document in documents)


def _block(value: Mapping[str, object] | list[object]) -> Iterator[str]:
    """Yield the lines of a mapping or a list that is not empty."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, (Mapping, list)) and item:
                yield f"{_scalar(key)}:"
                yield from (f"  {line}" for line in _block(item))
            else:
                yield f"{_scalar(key)}: {_scalar(item)}"
    else:
        for item in value:
            lines = _block(item) if isinstance(item, (Mapping, list)) and item else iter([_scalar(item)])
            yield f"- {next(lines)}"
            yield from (f"  {line}" for line in lines)


def _scalar(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
        case str():
            return value if _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN else _quoted(value)
        case Mapping() if not value:
            return "{}"
        case list() if not value:
            return "[]"
        case _:
            raise TypeError(f"expected a plain value, found {value!r}, of type {type(value).__name__}")


def _quoted(text: str) -> str:
    """Return ``text`` in double quotes; YAML has all escapes of JSON."""
    return "".join(map(_printable, json.dumps(text, ensure_ascii=False)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character

    code = ord(character)

    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
