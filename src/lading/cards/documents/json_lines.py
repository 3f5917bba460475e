"""JSON Lines (https://jsonlines.org), read to documents: one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lading.cards.documents.document import (
    MAX_BYTES,
    MAX_DEPTH,
    Document,
    TooManyProblemsError,
    integer,
    join,
    position,
)


class _Members(list[tuple[str, object]]):
    """The members of a JSON object as they stand in the text, where a key may come twice."""


_JSON = json.JSONDecoder(object_pairs_hook=_Members, parse_int=integer)


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
    except TooManyProblemsError:
        pass
    except json.JSONDecodeError as error:
        document.add("", f"{position(number, error.colno)}: expected JSON, found an error: {error.msg}")
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
