"""Strict JSON objects: the headers of safetensors files, and indexes of several files.

:mod:`json` takes the last of equal keys, and accepts numbers that are not JSON or that it rounds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lading.formats.files import corrupt


class Number(str):
    """A number that is not a plain integer of at most 19 digits, as written."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class _Odd:
    """A value that JSON does not allow, with the expected one."""

    expected: str
    found: str


def read_object(
    data: bytes | bytearray, *, label: str, what: str, member: Callable[[str], str] = repr
) -> tuple[dict[str, Any], str]:
    """Return the JSON object at the beginning of ``data``, and the text after it.

    Each string in it can be encoded in UTF-8. It contains no ``float``: see :class:`Number`.

    :param label: the path or the address of the file, for errors.
    :param what: the name of ``data`` in errors.
    :param member: returns the name of a member of the object in errors, by its key.

    :raises CorruptModelCheckpointError: it is not a JSON object, a key occurs twice in one of its objects, or it is
        nested too deeply for Python's own reader.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {data[error.start]:#04x} at position {error.start}"
        raise corrupt(label, what, expected="UTF-8", found=found) from error
    if not text.startswith("{"):
        raise corrupt(label, what, expected="'{'", found=repr(text[:1]) if text else "the end of the text")

    odd: list[_Odd] = []

    def refuse(expected: str, found: str) -> _Odd:
        odd.append(_Odd(expected, found))
        return odd[-1]

    def once(pairs: list[tuple[str, Any]]) -> object:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return refuse("every key once", f"the key {twice[:80]!r} twice")

    def decode(parse_int: Callable[[str], Any] | None = None, hook: Any = once) -> tuple[Any, int]:
        decoder = json.JSONDecoder(
            object_pairs_hook=hook,
            parse_float=Number,
            parse_int=parse_int,
            parse_constant=lambda name: refuse("a value", repr(name)),
        )
        return decoder.raw_decode(text)

    try:
        try:
            # Minus zero is an integer in Python, but not in other readers of the format.
            parse_int = _integer if "-0" in text else None
            # With a key for each colon, all keys differ. Without the hook, 10,000 tensors take 20 ms, not 30.
            value, end = decode(parse_int, hook=None)
            if text.count(":") != len(value) + sum(len(inner) for inner in value.values() if isinstance(inner, dict)):
                odd.clear()
                value = None  # frees it before the next one
                value, end = decode(parse_int)
        except json.JSONDecodeError:
            raise
        except ValueError:  # more digits than Python converts
            value, end = decode(_integer)
    except json.JSONDecodeError as error:
        around = text[max(error.pos - 60, 0) : error.pos + 20]
        found = f"{around!r} around position {error.pos}: {error.msg}"
        raise corrupt(label, what, expected="JSON", found=found) from None
    except RecursionError:
        raise corrupt(label, what, expected="a few levels of nesting", found="more than can be read") from None

    if odd or "\\u" in text:
        _require_plain(value, label, what, member)

    return value, text[end:]


def shown(value: object) -> str:
    """Return a value, or its beginning, for an error."""
    if isinstance(value, dict):
        return repr("{")
    if isinstance(value, list):
        return repr("[")

    return repr(str(value) if isinstance(value, Number) else json.dumps(value)[:60])[:80]


def string_map(value: object, *, label: str, where: str) -> dict[str, str]:
    """Return an object whose values are strings; equal ones are one object, since there may be thousands.

    :raises CorruptModelCheckpointError: it is another value, or contains another one.
    """
    if type(value) is not dict:
        raise corrupt(label, where, expected="'{'", found=shown(value))
    values: dict[str, str] = {}
    for key, item in value.items():
        if type(item) is not str:
            raise corrupt(label, f"{where}, {key[:80]!r}", expected="a string", found=shown(item))
        value[key] = values.setdefault(item, item)

    return value


def _integer(digits: str) -> int | Number:
    return Number(digits) if len(digits) > 19 or digits == "-0" else int(digits)


def _require_plain(value: object, label: str, what: str, member: Callable[[str], str]) -> None:
    """Refuse an object that contains an odd value, or a string that is not text."""
    if isinstance(value, _Odd):
        raise corrupt(label, what, expected=value.expected, found=value.found)
    assert isinstance(value, dict)
    for key, item in value.items():
        _require_all_plain(key, label, what)
        where = member(key[:80])
        if isinstance(item, dict):
            for inner_key, inner in item.items():
                _require_all_plain([inner_key, inner], label, f"{where}, {inner_key[:80]!r}")
        else:
            _require_all_plain(item, label, where)


def _require_all_plain(value: object, label: str, where: str) -> None:
    # Without recursion: the value may be nested as deeply as Python's recursion allows.
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, _Odd):
            raise corrupt(label, where, expected=inner.expected, found=inner.found)
        if isinstance(inner, list):
            left += inner
        elif isinstance(inner, dict):
            left += [*inner, *inner.values()]
        elif isinstance(inner, str):
            try:
                inner.encode("utf-8")
            except UnicodeEncodeError:
                found = f"one with an unpaired surrogate: {inner[:60]!r}"
                raise corrupt(label, where, expected="a string", found=found) from None
