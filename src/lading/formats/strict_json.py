"""JSON for those who know what must come next.

A general parser builds all that a hostile file asks it to (100 MB of ``[],[],…`` make more than 2 GB of lists, deep
nesting ends the recursion), and is silent on duplicate keys. Here the caller asks for one thing after another, and the
first one that differs ends the matter: nothing is built that was not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder

from lading.errors import CorruptModelCheckpointError
from lading.formats.files import corrupt

_SPACE = r"[ \t\n\r]*+"  # RFC 8259, section 2
_SPACES = re.compile(_SPACE)
_STRING = re.compile(_SPACE + r'"([^"\\\x00-\x1f]*+)"')  # without escapes, as nearly all are
_KEY = re.compile(_STRING.pattern + _SPACE + ":")
_MORE = re.compile(_SPACE + "([],}])")
_INTEGER = re.compile(_SPACE + r"(0|[1-9][0-9]{0,18}+)(?![\w.])")
_LITERAL = re.compile(r"(?:true|false|null|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?)(?![\w.])")
_SNIPPET = re.compile(r'"[^"]{0,60}"?|[{}\[\]:,]|[^ \t\n\r{}\[\]:,"]{1,60}')
_DECODER = JSONDecoder()

_MAX_DEPTH = 32


class StrictJson:
    """A reader that goes through JSON from left to right.

    Its methods take ``where``, the part of the document that is being read, for the error.

    :raises CorruptModelCheckpointError: (all methods) something else comes next, or it is not JSON.
    """

    __slots__ = ("label", "position", "text")

    def __init__(self, data: bytes | bytearray, *, label: str, what: str) -> None:
        """:param what: what ``data`` is, for the error where it is not even text."""
        try:
            self.text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise corrupt(
                label, what, expected="UTF-8", found=f"byte {data[error.start]:#04x} at position {error.start}"
            ) from error

        self.label = label
        self.position = 0
        """Of the next character in ``text``."""

    def fail(self, where: str, expected: str, found: str | None = None) -> CorruptModelCheckpointError:
        """The error for what comes next.

        :param found: default: what stands there in the document.
        """
        if found is None:
            at = self._skip_space()
            snippet = _SNIPPET.match(self.text, at)
            found = f"{snippet[0] if snippet else 'the end of the text'!r} at position {at}"

        return corrupt(self.label, where, expected=expected, found=found)

    def comes(self, token: str) -> bool:
        """Whether ``token`` comes next."""
        return self.text.startswith(token, self._skip_space())

    def take(self, token: str) -> bool:
        """Go past ``token`` if it comes next; say whether it did."""
        at = self._skip_space()
        if not self.text.startswith(token, at):
            return False

        self.position = at + len(token)

        return True

    def expect(self, token: str, where: str) -> None:
        """Go past ``token``."""
        if not self.take(token):
            raise self.fail(where, repr(token))

    def end(self, where: str) -> None:
        """Make sure that nothing but white space is left."""
        if self._skip_space() != len(self.text):
            raise self.fail(where, "nothing more")

    def string(self, where: str) -> str:
        """A string; it can be encoded in UTF-8, so it has no unpaired surrogates."""
        if match := _STRING.match(self.text, self.position):
            self.position = match.end()
            return match[1]

        at = self._skip_space()
        if not self.text.startswith('"', at):
            raise self.fail(where, "a string")

        try:
            value, self.position = _DECODER.raw_decode(self.text, at)
            value.encode("utf-8")
        except (JSONDecodeError, UnicodeEncodeError) as error:
            reason = error.msg if isinstance(error, JSONDecodeError) else "an unpaired surrogate"
            raise self.fail(where, "a string", f"one that is not valid: {reason}, from position {at}") from error

        return str(value)

    def integers(self, where: str, *, at_most: int) -> list[int]:
        """A list of integers from 0 to 2^63 - 1."""
        values: list[int] = []
        expected = "a list of integers from 0 to 2^63 - 1"

        if not self.take("["):
            raise self.fail(where, expected)
        if self.take("]"):
            return values

        while True:
            match = _INTEGER.match(self.text, self.position)
            # The pattern lets 19 digits through: what has more is not even converted.
            if match is None or (value := int(match[1])) >= 2**63:
                raise self.fail(where, expected)
            if len(values) == at_most:
                raise self.fail(where, f"a list of at most {at_most} integers", "more")
            values.append(value)
            self.position = match.end()

            if not self._more("]", where):
                return values

    def members(self, where: str) -> Iterator[str]:
        """The keys of an object; the caller reads the value behind each of them before it asks for the next.

        No key comes twice.
        """
        self.expect("{", where)
        if self.take("}"):
            return

        keys: set[str] = set()
        while True:
            if match := _KEY.match(self.text, self.position):
                key = match[1]
                self.position = match.end()
            else:
                key = self.string(f"{where}, a key")
                self.expect(":", f"{where}, behind the key {key[:80]!r}")

            if key in keys:
                raise self.fail(where, "every key once", f"the key {key[:80]!r} twice")
            keys.add(key)

            yield key

            if not self._more("}", where):
                return

    def string_map(self, where: str) -> dict[str, str]:
        """An object whose values are strings; equal ones are one object, since thousands may be."""
        values: dict[str, str] = {}
        result: dict[str, str] = {}
        for key in self.members(where):
            value = self.string(f"{where}, {key[:80]!r}")
            result[key] = values.setdefault(value, value)

        return result

    def skip(self, where: str, *, depth: int = 0) -> None:
        """Any value; keys come once here, too."""
        if depth > _MAX_DEPTH:
            raise self.fail(where, f"at most {_MAX_DEPTH} levels of nesting", "more")

        at = self._skip_space()
        match self.text[at : at + 1]:
            case "{":
                for _ in self.members(where):
                    self.skip(where, depth=depth + 1)
            case "[":
                self.position = at + 1
                if self.take("]"):
                    return
                self.skip(where, depth=depth + 1)
                while self._more("]", where):
                    self.skip(where, depth=depth + 1)
            case '"':
                self.string(where)
            case _:
                literal = _LITERAL.match(self.text, at)
                if literal is None:
                    raise self.fail(where, "a value")
                self.position = literal.end()

    def _more(self, end: str, where: str) -> bool:
        """Go past a comma, which says that more is to come, or past ``end``."""
        match = _MORE.match(self.text, self.position)
        if match is None or match[1] not in (",", end):
            raise self.fail(where, f"',' or {end!r}")
        self.position = match.end()

        return match[1] == ","

    def _skip_space(self) -> int:
        match = _SPACES.match(self.text, self.position)
        assert match is not None

        return match.end()
