"""Parser and writer of card files: YAML (one card or architecture per document) and JSON Lines (one per line).

Only the form of a file is checked here. Whether a base exists, or a configuration fits its family, is checked later,
as that takes the other cards and the family.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from lading.cards.adapters import adapter_problems
from lading.cards.card import (
    CONFIG_KEYS,
    FIELDS,
    TOKENIZER_CONFIG_KEYS,
    ArchitectureEntry,
    CardEntry,
    is_count,
    is_sha256,
    is_stream_mode,
    reads_as_path,
)
from lading.cards.documents.document import Document, join, show
from lading.cards.documents.json_lines import json_documents
from lading.cards.documents.read_yaml import yaml_documents
from lading.cards.documents.write_yaml import to_yaml
from lading.errors import did_you_mean

MAX_NAME_LENGTH: Final = 200
"""The most characters in the name of a card, an environment, an architecture or a family."""

_MAX_BAD_DOCUMENTS = 1_000
"""The most documents per file whose problems are listed; others are only counted."""

_STRING_FIELDS = (
    *(
        field
        for field in FIELDS
        if field not in (*CONFIG_KEYS, *TOKENIZER_CONFIG_KEYS, "parameters", "sha256", "adapters", "restrict", "stream")
    ),
    "dataset_family",
)
_ARCHITECTURE_FIELDS = ("architecture", "family", "base", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFile:
    """The content of one card file."""

    source: str
    """``file:///abs/path.yaml``, ``package:lading.seeds/qwen.yaml`` or ``stdin``."""
    sha256: str
    """The SHA-256 of its bytes, in hexadecimal."""
    cards: tuple[CardEntry, ...]
    architectures: tuple[ArchitectureEntry, ...]
    problems: tuple[str, ...]
    """Problems, one line each: ``qwen.yaml[3].model_config.head_dim: expected …, found …``. Documents with problems are
    left out of ``cards`` and ``architectures``."""


def parse(
    data: bytes, *, source: str, folder: Path | None = None, label: str | None = None, json_lines: bool = False
) -> CardFile:
    """Parse a card file. Invalid input never raises: all problems are in :attr:`CardFile.problems`.

    :param source: the origin of ``data``; kept as it is.
    :param folder: the folder of the file, against which relative paths in its cards resolve.
    :param label: the name of the file in messages; default: the last part of ``source``.
    :param json_lines: whether ``data`` is JSON Lines; else it is YAML.
    """
    reader = _Reader(label or source.rpartition("/")[2] or source, folder)
    try:
        # Some editors begin a file with a byte order mark.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"the byte {data[error.start]:#04x} at offset {error.start}"
        reader.problems.append(f"{reader.label}: line {line}: expected text in UTF-8, found {found}")
    else:
        for number, document in enumerate(json_documents(text) if json_lines else yaml_documents(text)):
            reader.take(document, f"{reader.label}[{number}]")
        reader.end()

    return CardFile(
        source=source,
        sha256=hashlib.sha256(data).hexdigest(),
        cards=tuple(reader.cards.values()),
        architectures=tuple(reader.architectures.values()),
        problems=tuple(reader.problems),
    )


def unfit(source: str, problem: str) -> CardFile:
    """Return an empty card file that reports why the file could not be read."""
    return CardFile(source=source, sha256="", cards=(), architectures=(), problems=(problem,))


def dump(cards: Iterable[CardEntry], architectures: Iterable[ArchitectureEntry] = ()) -> str:
    """Return the entries as multi-document YAML, architectures first, which :func:`parse` reads back equal.

    The folder of an entry is not written: relative paths stay as they are.
    """
    documents: list[Mapping[str, object]] = []
    for architecture in architectures:
        names = {"architecture": architecture.name, "family": architecture.family, "base": architecture.base}
        stated = {key: value for key, value in names.items() if value is not None}
        documents.append({**stated, "config": architecture.config})
    for card in cards:
        documents.append({"name": f"{card.name}@{card.env}" if card.env else card.name, **card.metadata})

    return to_yaml(documents)


class _Reader:
    """The entries and problems of the documents read so far."""

    def __init__(self, label: str, folder: Path | None) -> None:
        self.label = label
        self.folder = folder
        self.cards: dict[tuple[str, str], CardEntry] = {}
        self.architectures: dict[tuple[str, str], ArchitectureEntry] = {}
        self.problems: list[str] = []
        self.bad_documents = 0

    def take(self, document: Document, source: str) -> None:
        """Add the entry of ``document``, or its problems; ``source`` names it in messages."""
        problems = document.problems
        value = document.value
        if not problems:
            if not isinstance(value, dict):
                problems.append(f": expected a mapping with the fields of a card, found {show(value)}")
            # Cards may have any field, so `architecture` alone is not decisive.
            elif "architecture" in value and "name" not in value:
                self._take_architecture(value, source, problems)
            else:
                self._take_card(value, source, problems)

        self.bad_documents += bool(problems)
        if self.bad_documents <= _MAX_BAD_DOCUMENTS:
            self.problems += (f"{source}{problem}" for problem in problems)

    def end(self) -> None:
        """Finish the file: report how many problems were not listed."""
        if (more := self.bad_documents - _MAX_BAD_DOCUMENTS) > 0:
            self.problems.append(f"{self.label}: {more} more documents have problems")

    def _take_card(self, value: dict[str, object], source: str, problems: list[str]) -> None:
        name, env = _card_name(value, problems)
        metadata = {key: item for key, item in value.items() if key != "name"}

        # A null is valid in any field: with it a card removes what its base says.
        for key in _STRING_FIELDS:
            if (item := metadata.get(key)) is not None:
                _check_string(item, key, problems)
        for key in (*CONFIG_KEYS, *TOKENIZER_CONFIG_KEYS):
            if (item := metadata.get(key)) is not None and not isinstance(item, dict):
                problems.append(f".{key}: expected a mapping, found {show(item)}")
        _check_digests(metadata.get("sha256"), problems)
        if (adapters := metadata.get("adapters")) is not None:
            problems += (f".adapters{problem}" for problem in adapter_problems(adapters))
        if (count := metadata.get("parameters")) is not None and not is_count(count):
            problems.append(f".parameters: expected a positive integer below 10^18, found {show(count)}")
        if (mode := metadata.get("stream")) is not None and not is_stream_mode(mode):
            problems.append(f".stream: expected true, false or auto, found {show(mode)}")
        if isinstance(base := metadata.get("base"), str):
            metadata["base"] = _plain_name(base, "base", problems)

        if not problems and (other := self.cards.get((name, env))):
            problems.append(f".name: expected every name once in a file, found that {other.source} has it, too")
        if not problems:
            self.cards[name, env] = CardEntry(name=name, env=env, metadata=metadata, folder=self.folder, source=source)

    def _take_architecture(self, value: dict[str, object], source: str, problems: list[str]) -> None:
        if unknown := [key for key in value if key not in _ARCHITECTURE_FIELDS]:
            expected, found = ", ".join(_ARCHITECTURE_FIELDS), ", ".join(map(show, unknown[:5]))
            hint = did_you_mean(unknown[0], _ARCHITECTURE_FIELDS)
            problems.append(f": expected the fields {expected} and no others, found {found}.{hint}")

        names = {"architecture": "", "family": "", "base": ""}
        for key in names:
            if key == "base" and value.get(key) is None:
                continue
            if key not in value:
                problems.append(f": expected a field {key!r}, found none")
            elif (stated := _check_string(value[key], key, problems)) is not None:
                names[key] = _plain_name(stated, key, problems)
        name, family, base = names.values()

        config = value.get("config", {})
        if not isinstance(config, dict):
            problems.append(f".config: expected a mapping, found {show(config)}")
        elif not problems and (other := self.architectures.get((family, name))):
            message = (
                f"expected every architecture of a family once in a file, found that {other.source} is {name!r}, too"
            )
            problems.append(f".architecture: {message}")
        elif not problems:
            self.architectures[family, name] = ArchitectureEntry(
                name=name, family=family, base=base or None, config=config, source=source
            )


def _card_name(value: Mapping[str, object], problems: list[str]) -> tuple[str, str]:
    """Return the name and the environment of a card."""
    if "name" not in value:
        near = get_close_matches("name", value, n=1)
        found = show(near[0]) if near else "none; only architectures have no name, but an 'architecture'"
        problems.append(f": expected a field 'name', found {found}")
        return "", ""

    stated = _check_string(value["name"], "name", problems)
    if stated is None:
        return "", ""

    name, *envs = stated.split("@")
    if len(envs) > 1:
        problems.append(f".name: expected 'name' or 'name@environment', found {show(stated)}")
        return "", ""

    env = "".join(envs).strip()

    return _plain_name(name, "name", problems), _plain_name(env, "name", problems) if env else ""


def _check_string(value: object, key: str, problems: list[str]) -> str | None:
    if isinstance(value, str):
        return value

    quotes = " (put it in quotes)" if isinstance(value, (int, float)) else ""
    problems.append(f".{key}: expected a string, found {show(value)}{quotes}")

    return None


def _check_digests(value: object, problems: list[str]) -> None:
    """Add a problem if ``value`` is neither a SHA-256 nor a mapping of file names to them."""
    if value is None:
        return
    for name, digest in value.items() if isinstance(value, dict) else [("", value)]:
        if not is_sha256(digest):
            place = join(".sha256", name) if name else ".sha256"
            problems.append(f"{place}: expected 64 hexadecimal digits, found {show(digest)}")


def _plain_name(name: str, key: str, problems: list[str]) -> str:
    """Return ``name`` without surrounding white space; add a problem if it is not a valid name."""
    name = name.strip()
    if not name:
        problems.append(f".{key}: expected a name, found an empty one")
    elif len(name) > MAX_NAME_LENGTH:
        problems.append(f".{key}: expected a name of at most {MAX_NAME_LENGTH} characters, found {len(name)}")
    elif not name.isprintable():
        problems.append(f".{key}: expected a name of printable characters, found {show(name)}")
    elif reads_as_path(name) or "://" in name:
        problems.append(f".{key}: expected a name that is neither a path nor an address, found {show(name)}")
    elif "@" in name:
        problems.append(f".{key}: expected a name without @, found {show(name)}")

    return name
