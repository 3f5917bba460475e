"""Strict JSON objects: the headers of safetensors files, indexes of several files, and documents of digests.

:mod:`json` decodes values, but takes the last of equal keys, and builds whatever a file asks for: 100 MB of ``[],[],…``
as some 3 GB of lists. So this module goes from key to key itself, and the caller says what must come next. An error
names the key at which a file is wrong, and nothing after it is decoded.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NoReturn

from lading.errors import CorruptModelCheckpointError
from lading.formats.files import FETCH_AGAIN, corrupt

_MAX_DEPTH = 32
_MAX_FREE = 10_000_000
"""The most levels and characters of a value of free form."""

_MAX_VALUES = 10_000
"""The most values that are searched for equal ones; most files have a few."""

_MAX_ITEMS = 64
"""The most integers of a list."""

SPACE = r"[ \t\n\r]*+"  # RFC 8259, section 2
_SPACES = re.compile(SPACE)
_STRING = re.compile(rf'{SPACE}"([^"\\\x00-\x1f]*+)"')  # without escapes, as nearly all are
_KEY = re.compile(rf"{_STRING.pattern}{SPACE}:")
_MORE = re.compile(rf"{SPACE}([],}}])")
# Up to the first item that does not belong there. What has more than 19 digits is not even converted.
_INTEGER = r"(?:0|[1-9][0-9]{0,18}+)(?![\w.])"
_NUMBER = re.compile(rf"{SPACE}({_INTEGER})")
_ITEMS = rf"(?:{_INTEGER}{SPACE},{SPACE}){{0,{_MAX_ITEMS - 1}}}+(?:{_INTEGER}{SPACE}\]?)?"
_INTEGERS = re.compile(rf"{SPACE}(\[{SPACE}(?:\]|{_ITEMS}))")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[][{}]')
_SNIPPET = re.compile(r'"[^"]{0,60}"?|[{}\[\]:,]|[^ \t\n\r{}\[\]:,"]{1,60}')
_WORD_END = re.compile(r'[^ \t\n\r{}\[\]:,"]*\Z')


class Reader:
    """A reader of a JSON object from left to right.

    Its methods take ``where``, the part of the object that is read, for errors.

    :param label: the path or the address of the file, for errors.
    :param what: the name of ``data`` in errors.
    :param hint: how to fix the file.

    :raises CorruptModelCheckpointError: (all methods) something else comes next, or it is not JSON.
    """

    __slots__ = ("hint", "label", "position", "text")

    def __init__(self, data: bytes | bytearray, *, label: str, what: str, hint: str = FETCH_AGAIN) -> None:
        try:
            self.text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte {data[error.start]:#04x} at position {error.start}"
            raise corrupt(label, what, expected="UTF-8", found=found, hint=hint) from error

        self.label = label
        self.hint = hint
        self.position = 0
        """The position in ``text`` of the next character."""

    def fail(self, where: str, expected: str, found: str | None = None) -> CorruptModelCheckpointError:
        """Return the error for what comes next.

        :param found: default: the text that comes next.
        """
        if found is None:
            at = self._skip_space()
            snippet = _SNIPPET.match(self.text, at)
            found = f"{snippet[0] if snippet else 'the end of the text'!r} at position {at}"

        return corrupt(self.label, where, expected=expected, found=found, hint=self.hint)

    def comes(self, token: str) -> bool:
        """Return whether ``token`` comes next."""
        return self.text.startswith(token, self._skip_space())

    def members(self, where: str, read: Mapping[str, object] | None = None) -> Iterator[str]:
        """Yield the keys of an object, which must not repeat.

        The caller reads the value of each before it takes the next.

        :param read: the values that the caller has read so far, by their keys, if it keeps them.
        """
        if not self._take("{"):
            raise self.fail(where, "'{'")
        if self._take("}"):
            return

        keys: set[str] = set()
        while True:
            if match := _KEY.match(self.text, self.position):
                key = match[1]
                self.position = match.end()
            else:
                key = self.string(f"{where}, a key")
                if not self._take(":"):
                    raise self.fail(f"{where}, behind the key {key[:80]!r}", "':'")

            if key in (keys if read is None else read):
                raise self._twice(where, key)
            if read is None:
                keys.add(key)

            yield key

            more = _MORE.match(self.text, self.position)
            if more is None or more[1] == "]":
                raise self.fail(where, "',' or '}'")
            self.position = more.end()
            if more[1] == "}":
                return

    def string(self, where: str) -> str:
        """Return a string that can be encoded in UTF-8."""
        if match := _STRING.match(self.text, self.position):
            self.position = match.end()
            return match[1]

        if not self.comes('"'):
            raise self.fail(where, "a string")
        try:
            value, self.position = json.JSONDecoder().raw_decode(self.text, self._skip_space())
            value.encode("utf-8")
        except (json.JSONDecodeError, UnicodeEncodeError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "an unpaired surrogate"
            found = f"one that is not valid: {reason}, from position {self._skip_space()}"
            raise self.fail(where, "a string", found) from None

        return str(value)

    def string_map(self, where: str) -> dict[str, str]:
        """Return an object whose values are strings; equal ones are one object, since there may be thousands."""
        values: dict[str, str] = {}
        result: dict[str, str] = {}
        for key in self.members(where, result):
            value = self.string(f"{where}, {key[:80]!r}")
            result[key] = values.setdefault(value, value) if len(values) < _MAX_VALUES else value

        return result

    def integer(self, where: str) -> int:
        """Return an integer from 0 to 2^63 - 1."""
        expected = "an integer from 0 to 2^63 - 1"
        match = _NUMBER.match(self.text, self.position)
        if match is None:
            raise self.fail(where, expected)
        value = int(match[1])
        if value >= 2**63:
            raise self.fail(where, expected, f"{value}")
        self.position = match.end()

        return value

    def end(self, where: str) -> None:
        """Check that nothing but space follows."""
        if self._skip_space() < len(self.text):
            raise self.fail(where, "the end of the text")

    def integers(self, where: str, *, at_most: int) -> list[int]:
        """Return a list of integers from 0 to 2^63 - 1.

        :param at_most: the most integers; at most 64.
        """
        expected = f"a list of at most {at_most} integers from 0 to 2^63 - 1"
        match = _INTEGERS.match(self.text, self.position)
        if match is None:
            raise self.fail(where, expected)
        self.position = match.end()
        if not match[1].endswith("]"):
            raise self.fail(where, expected, "more" if self.comes(",") else None)

        values: list[int] = json.loads(match[1])
        if len(values) > at_most:
            raise self.fail(where, expected, "more")
        if values and max(values) >= 2**63:
            raise self.fail(where, expected, f"{max(values)}")

        return values

    def skip(self, where: str) -> None:
        """Go past a value of free form."""
        expected = f"a value of at most {_MAX_FREE} characters and {_MAX_DEPTH} levels of nesting"
        at = end = self._skip_space()
        depth = 0
        for match in _BRACKET.finditer(self.text, at, at + _MAX_FREE):
            end = match.end()
            depth += (match[0] in "[{") - (match[0] in "]}")
            if depth > _MAX_DEPTH:
                raise self.fail(where, expected, "more")
            if depth <= 0:
                break
        else:
            if len(self.text) - at > _MAX_FREE:
                raise self.fail(where, expected, "more")
            end = len(self.text)

        def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
            made = dict(pairs)
            if len(made) != len(pairs):
                raise self._twice(where, Counter(key for key, _ in pairs).most_common(1)[0][0])
            return made

        def refuse(constant: str) -> NoReturn:
            raise self.fail(where, "a value", repr(constant))

        # Numbers stay strings, as their digits are of no interest.
        free = json.JSONDecoder(object_pairs_hook=once, parse_int=str, parse_float=str, parse_constant=refuse)
        text = self.text[at:end]
        try:
            value, size = free.raw_decode(text)
            if "\\u" in text:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except json.JSONDecodeError as error:
            word = _WORD_END.search(text[: error.pos], max(error.pos - 20, 0))
            self.position = at + (word.start() if word else error.pos)
            raise self.fail(where, expected) from None
        except UnicodeEncodeError:
            raise self.fail(where, "a string", "one with an unpaired surrogate") from None
        self.position = at + size

    def _twice(self, where: str, key: str) -> CorruptModelCheckpointError:
        return self.fail(where, "every key once", f"the key {key[:80]!r} twice")

    def _take(self, token: str) -> bool:
        """Go past ``token`` if it comes next; return whether it did."""
        at = self._skip_space()
        if not self.text.startswith(token, at):
            return False
        self.position = at + len(token)

        return True

    def _skip_space(self) -> int:
        match = _SPACES.match(self.text, self.position)
        assert match is not None

        return match.end()
