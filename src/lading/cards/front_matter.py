"""Reader of a repository's ``README.md``: what its front matter, a YAML document before the text, says of the model.

https://huggingface.co/docs/hub/model-cards describes the fields. The file may come from anyone. The few fields that
lading keeps are cut out of the text and read one by one, as the rest may hold a megabyte of benchmark results.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from lading.cards.documents.read_yaml import yaml_documents

log = logging.getLogger("lading")

README_NAME: Final = "README.md"

MAX_README_BYTES: Final = 4 << 20
"""The most bytes that are read. The largest front matters, those with results of benchmarks, have half of it."""

_MAX_FIELD = 16 << 10
"""The most characters of a field; the longest lists of base models have a tenth of it."""
_MAX_LENGTH = 200
"""The most characters of a value."""
_MAX_VALUES = 100
"""The most values of a list."""

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\n(?P<fields>.*?)^(?:---|\.\.\.)[ \t]*$", re.DOTALL | re.MULTILINE)
_FIELD = r"^{name}[ \t]*:[^\n]*(?:\n(?:[ \t\-#][^\n]*)?)*"
"""A field of the outermost mapping: its line, and those below that are indented, items of a list, or empty."""

_FIELDS: Final = ("license", "base_model", "pipeline_tag")
"""The fields that a card takes over."""


def front_matter_fields(data: bytes) -> dict[str, object]:
    """Return the fields of a card that a ``README.md`` states: ``license``, ``base_model``, ``pipeline_tag``.

    Each is a string; ``base_model`` is a list if there are several. A file without front matter has none, and fields of
    any other form are left out.

    :param data: the first :data:`MAX_README_BYTES` of the file.
    """
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace").replace("\r\n", "\n")
    matter = _FRONT_MATTER.match(text)
    if matter is None:
        return {}

    found: dict[str, object] = {}
    for name in _FIELDS:
        field = re.search(_FIELD.format(name=name), matter["fields"], re.MULTILINE)
        if field is None:
            continue
        value = _value(name, field[0])
        if value is None:
            log.info("README.md: `%s` is left out, as it is not a plain string or a list of such", name)
        else:
            found[name] = value

    return found


def _value(name: str, field: str) -> object:
    """Return the value of a field; ``None`` if a card cannot have it."""
    if len(field) > _MAX_FIELD:
        return None
    document = next(yaml_documents(field), None)
    if document is None or document.problems or not isinstance(document.value, dict):
        return None
    stated = document.value.get(name)
    listed = stated if isinstance(stated, list) else [stated]
    values = [value for value in listed if isinstance(value, str) and 0 < len(value) <= _MAX_LENGTH]
    if len(values) != len(listed) or not 0 < len(values) <= _MAX_VALUES or not "".join(values).isprintable():
        return None

    return values[0] if len(values) == 1 else values if name == "base_model" else ", ".join(values)
