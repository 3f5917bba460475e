"""Reader of YAML 1.2 streams (https://yaml.org/spec/1.2.2).

Features that JSON does not have are refused: tags, anchors, aliases, merge keys, directives, keys that are not strings.

Scalars resolve as in ruamel's YAML 1.2 reader, and so as in fairseq2 (``1e-5`` is a float, ``128_256`` an integer,
``no`` a string), except that dates are strings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

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

from lading.cards.documents.document import MAX_BYTES, Document, TooManyProblemsError, integer, join, position, show

_MARKER = re.compile(r"^(---|\.\.\.)(?![^ \t\n])", re.MULTILINE)
# Section 5.1 of the specification, without the carriage return.
_NON_PRINTABLE = re.compile("[^\t\n\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_VERSION_1_2 = re.compile(r"%YAML[ \t]+1\.2[ \t]*(?:#.*)?")


def yaml_documents(text: str) -> Iterator[Document]:
    """Yield the documents of a YAML stream; skip those without content.

    The stream is split at its document markers before it is parsed, so that an error in one document does not affect
    the others.
    """
    # The specification normalizes line breaks, too.
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # To set up a parser costs as much as to parse a small document.
    yaml = YAML(typ="safe", pure=True)
    directives: list[str] = []
    line = 1

    for chunk in _split(text):
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


def _split(text: str) -> Iterator[str]:
    """Yield the text between document markers; ``---`` stays with the document that it begins."""
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
        place = position(first_line + text.count("\n", 0, at), at - text.rfind("\n", 0, at))
        document.add("", f"{place}: expected printable characters, found {bad[0]!r}")
        return document

    with closing(yaml.parse(text)) as events:
        try:
            document.value = _Composer(events, document).compose()
        except TooManyProblemsError:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = position(first_line + mark.line, mark.column + 1)
            document.problems.append(f": {place}: expected YAML, found an error: {_one_line(error.problem)}")
        except Exception as error:
            # The parser raises some of Python's own errors: the escape "\UFFFFFFFF" is a ValueError.
            document.problems.append(f": line {first_line}: expected YAML, found an error: {_one_line(error)}")

    return document


def _one_line(message: object) -> str:
    return " ".join(str(message).split())[:200]


class _Composer:
    """Composer of plain objects from parser events.

    ruamel's own composer builds nodes first, recurses as deep as the text is nested, and follows aliases.
    """

    def __init__(self, events: Iterator[Any], document: Document) -> None:
        self.events = events
        self.document = document

    def compose(self) -> object:
        while not isinstance(next(self.events), DocumentStartEvent):
            pass
        value = self._value(next(self.events), "", 1)
        # Only the ends of the document and of the stream may follow.
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
    """Resolve a plain scalar by the core schema of YAML 1.2, extended by the ``_`` and ``0b`` that ruamel accepts."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in "-+.0123456789":
        return text

    if match := _INTEGER.fullmatch(text):
        sign, digits = match[1], match[2].replace("_", "")
        base = {"0b": 2, "0o": 8, "0x": 16}.get(digits[:2], 10)
        return integer(f"{sign}{digits}", base)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))

    return text
