"""Text ↔ plain objects: YAML 1.2 streams and JSON Lines, one document after another.

The text comes from strangers, so what YAML offers beyond JSON is refused: tags, anchors and aliases, merge keys,
directives, keys that are no strings. Whatever the text is, nothing is raised: each document comes with a list of what
is wrong with it, and one that is broken does not hide the next.

Scalars mean what they mean to ruamel's YAML 1.2 reader, and so to fairseq2 (``1e-5`` is a float, ``128_256`` an
integer, ``no`` a string), but for dates, which are strings.

Source: YAML 1.2.2 (https://yaml.org/spec/1.2.2), JSON Lines (https://jsonlines.org).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Final

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

MAX_BYTES: Final = 1 << 20
"""Of a document, in UTF-8."""
MAX_DEPTH: Final = 32
"""Levels of mappings and lists, the document itself included."""
MAX_KEY_LENGTH: Final = 200
"""Characters; below the 1,024 up to which YAML takes a key without further ado."""
MAX_PROBLEMS: Final = 20
"""After so many, the rest of a document is not looked at."""

_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class _TooManyProblemsError(Exception):
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
            raise _TooManyProblemsError

    def check_depth(self, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            self.add(path, f"expected at most {MAX_DEPTH} levels of nesting, found more")
            raise _TooManyProblemsError

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


# --- YAML ------------------------------------------------------------------------------------------------------------

_MARKER = re.compile(r"^(---|\.\.\.)(?![^ \t\n])", re.MULTILINE)
# Section 5.1 of the specification, less the carriage return.
_NON_PRINTABLE = re.compile("[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VERSION_1_2 = re.compile(r"%YAML[ \t]+1\.2[ \t]*(?:#.*)?")


def yaml_documents(text: str) -> Iterator[Document]:
    """The documents of a YAML stream, but for those without content.

    The stream is cut at its markers before it is parsed: one at the start of a line ends the document whatever
    surrounds it, so that what is wrong with a document stays with it.
    """
    # As the specification does; no scalar keeps the difference.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # A parser costs as much to set up as a small document does to parse.
    yaml = YAML(typ="safe", pure=True)
    directives: list[str] = []
    line = 1

    for chunk in _cut(text):
        content = [s for s in map(str.strip, chunk.removeprefix("---").split("\n")) if s and s[0] != "#"]
        if not chunk.startswith("---") and all(s[0] == "%" for s in content):
            directives += content
        elif content:
            unknown = next((d for d in directives if not _VERSION_1_2.fullmatch(d)), None)
            if unknown is None:
                yield _yaml_document(chunk, line, yaml)
            else:
                yield Document(None, [f": line {line}: expected no directive but %YAML 1.2, found {show(unknown)}"])
            directives = []
        line += chunk.count("\n")


def _cut(text: str) -> Iterator[str]:
    """The text between document markers; ``---`` stays with the document that it begins."""
    begin = 0
    for marker in _MARKER.finditer(text):
        yield text[begin : marker.start()]
        begin = marker.start() if marker[1] == "---" else marker.end()
    yield text[begin:]


def _yaml_document(text: str, first_line: int, yaml: YAML) -> Document:
    document = Document()
    if (size := len(text.encode())) > MAX_BYTES:
        document.add("", f"line {first_line}: expected a document of at most {MAX_BYTES:,} bytes, found {size:,}")
        return document
    if bad := _NON_PRINTABLE.search(text):
        at = bad.start()
        position = _position(first_line + text.count("\n", 0, at), at - text.rfind("\n", 0, at))
        document.add("", f"{position}: expected printable characters, found {bad[0]!r}")
        return document

    with closing(yaml.parse(text)) as events:
        try:
            document.value = _Composer(events, document).compose()
        except _TooManyProblemsError:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            position = _position(first_line + mark.line, mark.column + 1)
            document.problems.append(f": {position}: expected YAML, found an error: {_one_line(error.problem)}")
        except Exception as error:
            # The parser lets some of Python's own errors through: the escape "\UFFFFFFFF" is a ValueError.
            document.problems.append(f": line {first_line}: expected YAML, found an error: {_one_line(error)}")

    return document


def _position(line: int, column: int) -> str:
    return f"line {line}, column {column}"


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]


class _Composer:
    """Builds plain objects of parser events.

    ruamel's own composer builds nodes first, which recurses as deep as the text asks it to and follows aliases.
    """

    def __init__(self, events: Iterator[Any], document: Document) -> None:
        self.events = events
        self.document = document

    def compose(self) -> object:
        while not isinstance(next(self.events), DocumentStartEvent):
            pass
        value = self._value(next(self.events), "", 1)
        # The end of the document, and of the stream.
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                self.document.add("", "expected one document between two `---`, found another")

        return value

    def _value(self, event: Any, path: str, depth: int) -> object:
        if isinstance(event, AliasEvent):
            self.document.add(path, f"expected the value itself, found the alias {show(f'*{event.anchor}')}")
            return None
        if event.anchor is not None:
            self.document.add(path, f"expected no anchor, found {show(f'&{event.anchor}')}")
        if (tag := event.ctag) is not None:
            self.document.add(path, f"expected no tag, found {show((tag.handle or '') + tag.suffix)}")

        if isinstance(event, ScalarEvent):
            value = _resolve(event.value) if event.style is None else event.value
            self.document.check_scalar(path, value)
            return value

        self.document.check_depth(path, depth)

        return self._mapping(path, depth) if isinstance(event, MappingStartEvent) else self._list(path, depth)

    def _mapping(self, path: str, depth: int) -> dict[str, object]:
        mapping: dict[str, object] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._value(event, path, depth + 1)
            if not isinstance(key, str):
                quotes = " (put it in quotes)" if isinstance(event, ScalarEvent) else ""
                self.document.add(path, f"expected keys that are strings, found {show(key)}{quotes}")
                key = ""
            elif key == "<<" and event.style is None:
                self.document.add(path, "expected no merge key, found <<")
            else:
                self.document.check_key(path, key, mapping)
            mapping[key] = self._value(next(self.events), join(path, key), depth + 1)

        return mapping

    def _list(self, path: str, depth: int) -> list[object]:
        items: list[object] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            items.append(self._value(event, f"{path}[{len(items)}]", depth + 1))

        return items


_WORDS: Mapping[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
_INTEGER = re.compile(r"([-+]?)(0b[01_]*[01]_*|0o[0-7_]*[0-7]_*|0x[0-9a-fA-F_]*[0-9a-fA-F]_*|[0-9][0-9_]*)")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
)
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


def _resolve(text: str) -> object:
    """What a plain scalar stands for: the core schema of YAML 1.2, and the ``_`` and ``0b`` that ruamel takes, too."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "-+.0123456789":
        return text

    if match := _INTEGER.fullmatch(text):
        sign, digits = match[1], match[2].replace("_", "")
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2], 10)
        return _integer(f"{sign}{digits}", base)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))

    return text


def _integer(text: str, base: int = 10) -> int:
    # Long ones take quadratic time to convert, and none that fits 64 bits is longer than in base 2.
    return int(text, base) if len(text) <= len("-0b") + 64 else 2**64


# --- JSON Lines ------------------------------------------------------------------------------------------------------


class _Members(list[tuple[str, object]]):
    """The members of a JSON object as they stand in the text, where a key may come twice."""


_JSON = json.JSONDecoder(object_pairs_hook=_Members, parse_int=_integer)


def json_documents(text: str) -> Iterator[Document]:
    """The documents of JSON Lines, but for blank lines."""
    # `splitlines` also cuts at characters that may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _json_document(line, number)


def _json_document(line: str, number: int) -> Document:
    document = Document()
    if (size := len(line.encode())) > MAX_BYTES:
        document.add("", f"line {number}: expected a line of at most {MAX_BYTES:,} bytes, found {size:,}")
        return document

    try:
        document.value = _plain(_JSON.decode(line), "", 1, document)
    except _TooManyProblemsError:
        pass
    except json.JSONDecodeError as error:
        document.add("", f"{_position(number, error.colno)}: expected JSON, found an error: {error.msg}")
    except RecursionError:
        document.add("", f"line {number}: expected at most {MAX_DEPTH} levels of nesting, found more")

    return document


def _plain(value: object, path: str, depth: int, document: Document) -> object:
    """``value`` with mappings for members."""
    if not isinstance(value, list):
        document.check_scalar(path, value)
        return value

    document.check_depth(path, depth)
    if not isinstance(value, _Members):
        return [_plain(item, f"{path}[{i}]", depth + 1, document) for i, item in enumerate(value)]

    mapping: dict[str, object] = {}
    for key, item in value:
        document.check_key(path, key, mapping)
        mapping[key] = _plain(item, join(path, key), depth + 1, document)

    return mapping


# --- back to YAML ----------------------------------------------------------------------------------------------------

_PLAIN = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./@+-]|:(?=[A-Za-z0-9_./@+-])| (?=[A-Za-z0-9_./(]))*")
# Not strings to readers of YAML 1.1.
_NOT_PLAIN = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def to_yaml(documents: Iterable[Mapping[str, object]]) -> str:
    """A YAML stream in block style, keys in the order given, which :func:`yaml_documents` reads back equal.

    :raises TypeError: a value that is not plain.
    """
    return "\n---\n\n".join("".join(f"{line}\n" for line in _block(document)) for document in documents)


def _block(value: Mapping[str, object] | list[object]) -> Iterator[str]:
    """The lines of a mapping or a list that is not empty."""
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
    """In double quotes; the escapes of JSON are some of those of YAML."""
    return "".join(map(_printable, json.dumps(text, ensure_ascii=False)))


def _printable(character: str) -> str:
    if character.isprintable():
        return character

    code = ord(character)

    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
