"""Reader of JSON Lines (https://jsonlines.org): one document per line."""

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
    """The members of a JSON object in the order of the text, duplicate keys included."""


_JSON = json.JSONDecoder(object_pairs_hook=_Members, parse_int=integer)


def json_documents(text: str) -> Iterator[Document]:
    """Yield the documents of JSON Lines; skip blank lines."""
    # `splitlines` also splits at characters that a JSON string may contain.
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
    """Return ``value`` with members turned into mappings."""
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
