"""The changes that card files make to a catalog with rows: new, changed, gone and conflicting ones. Pure functions.

A *key* names a card or an overlay (name, environment), or an architecture (family, name). Each row belongs to the
source that stated it. A source may change and withdraw its own rows; it replaces another's only on request.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from lading.cards.addresses import stated_addresses
from lading.cards.card import CONFIG_KEYS, ArchitectureEntry, CardEntry
from lading.catalog.database.statements import dumps
from lading.catalog.stored_cards import label
from lading.system.filesystem import path_text

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile

Key = tuple[str, str]
Entry = CardEntry | ArchitectureEntry

MAX_DEPTH = 100
"""The most bases above a card. Real cards have far fewer, and each costs every look-up a step."""

SEEDS_URI = "package:"
"""The prefix of the sources of the package's own cards."""

STDIN = "stdin"
"""The source of piped input. It is not one file: a pipe that omits a card does not withdraw it."""

ADDED = "added"
"""The source of the cards that ``lading add`` and ``register_model`` write. The same holds for it."""

PROGRAM = "program"
"""The source of cards that a program passes as mappings, by default. The same holds for it."""

_POSITION = re.compile(r"\[(\d+)\]$")


class StatedRow(NamedTuple):  # as there is one per document, and a tuple is the cheapest value
    """A document that states a key."""

    key: Key
    entry: Entry
    uri: str
    position: int
    text: str
    """The content as JSON."""
    folder: str | None


class StoredRow(NamedTuple):
    """A row of the catalog."""

    key: Key
    uri: str
    position: int
    text: str
    folder: str | None
    row_id: int | None = None


@dataclass(frozen=True, slots=True)
class StatedRows:
    """The documents of an import, one per key."""

    by_key: dict[Key, StatedRow]
    stated: frozenset[tuple[Key, str]]
    """Pairs of a key and a source that states it."""
    problems: dict[str, list[str]]
    """By source."""


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """The changes that make the catalog match the files."""

    added: list[StatedRow] = field(default_factory=list)
    changed: list[tuple[StoredRow, StatedRow]] = field(default_factory=list)
    unchanged: list[Key] = field(default_factory=list)
    moved: list[tuple[StoredRow, StatedRow]] = field(default_factory=list)
    """Rows with the same content at another place."""
    removed: list[StoredRow] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """By source."""

    def written(self) -> Iterator[StatedRow]:
        """Yield the documents whose content goes into the catalog."""
        yield from self.added
        for _, claim in self.changed:
            yield claim

    def touched(self) -> Iterator[StatedRow]:
        """Yield the documents whose row changes in any way. Messages name the place of a card, so a move counts."""
        yield from self.written()
        for _, claim in self.moved:
            yield claim

    def refuse(self, reasons: Mapping[Key, str]) -> None:
        """Remove the refused documents from the plan, and keep the reasons."""
        for claim in self.written():
            if claim.key in reasons:
                self.problems.setdefault(claim.uri, []).append(reasons[claim.key])
        self.added[:] = [claim for claim in self.added if claim.key not in reasons]
        self.changed[:] = [(row, claim) for row, claim in self.changed if claim.key not in reasons]


def card_key(entry: CardEntry) -> Key:
    return entry.name, entry.env


def architecture_key(entry: ArchitectureEntry) -> Key:
    return entry.family, entry.name


def title(entry: Entry) -> str:
    """Return the name of an entry for a report."""
    if isinstance(entry, ArchitectureEntry):
        return architecture_title(architecture_key(entry))

    return card_title(card_key(entry))


def card_title(key: Key) -> str:
    return f"{key[0]}@{key[1]}" if key[1] else key[0]


def architecture_title(key: Key) -> str:
    return f"{key[0]}/{key[1]} (architecture)"


def architecture_text(base: str | None, config: str) -> str:
    """Return the content of an architecture as JSON; ``config`` is JSON already."""
    return f'{{"base":{json.dumps(base)},"config":{config}}}'


def claims_of(documents: Iterable[tuple[CardFile, Key, Entry, object]]) -> StatedRows:
    """Return one claim per key; the same key twice is a problem unless both files state the same.

    :param documents: file, key, entry and content of each document, in order.
    """
    by_key: dict[Key, StatedRow] = {}
    stated: set[tuple[Key, str]] = set()
    problems: dict[str, list[str]] = {}

    for number, (file, key, entry, content) in enumerate(documents):
        try:
            text = dumps(content)
            (key[0] + key[1]).encode()
        except (ValueError, TypeError) as error:
            problems.setdefault(file.source, []).append(
                f"{entry.source}: {title(entry)!r} holds a value that JSON cannot express: {error}"
            )
            continue

        position = _POSITION.search(entry.source)
        folder = path_text(entry.folder) if isinstance(entry, CardEntry) and entry.folder is not None else None
        claim = StatedRow(key, entry, file.source, int(position[1]) if position else number, text, folder)
        stated.add((key, file.source))

        first = by_key.setdefault(key, claim)
        if first is not claim and not _same(first, claim):
            problems.setdefault(file.source, []).append(
                f"{entry.source}: {title(entry)!r} is already described by {first.entry.source}. Keep one of the two."
            )

    return StatedRows(by_key, frozenset(stated), problems)


def decide(
    claims: StatedRows,
    kept: Mapping[Key, StoredRow],
    *,
    reread: Collection[str],
    missing: Collection[str] = (),
    seeds: bool,
    replace: bool,
) -> ImportPlan:
    """Compare ``claims`` with the existing rows and return the changes.

    :param kept: the rows of the claimed keys, and all rows of the sources in ``reread``.
    :param reread: the sources whose claims are complete, so that their other rows are withdrawn.
    :param missing: the sources whose file is gone: a claim with the same content replaces theirs, as for a moved file.
    :param seeds: whether the claims are those of the package, which yield to all others.
    """
    decision = ImportPlan(problems={uri: list(lines) for uri, lines in claims.problems.items()})

    for key, claim in claims.by_key.items():
        row = kept.get(key)
        if row is None:
            decision.added.append(claim)
            continue

        same = _same(row, claim)
        withdrawn = row.uri in reread and (key, row.uri) not in claims.stated
        moved = same and row.uri in missing
        if row.uri == claim.uri or withdrawn or moved or (replace and not same):
            if not same:
                decision.changed.append((row, claim))
                continue
            if (row.uri, row.position, row.folder) != (claim.uri, claim.position, claim.folder):
                decision.moved.append((row, claim))
            decision.unchanged.append(key)
        elif same or _is_built_in(row, claim):
            decision.unchanged.append(key)
        elif not seeds:
            decision.problems.setdefault(claim.uri, []).append(
                f"{claim.entry.source}: {title(claim.entry)!r} is already described differently by "
                f"{label(row.uri, row.position)} ({row.uri}). Rename it, or replace the other one with "
                "`--replace`."
            )

    decision.removed.extend(row for key, row in kept.items() if row.uri in reread and key not in claims.by_key)

    return decision


def climb(noun: str, claims: Mapping[str, StatedRow], base_of: Callable[[str], str | None]) -> dict[Key, str]:
    """Return the claims to refuse because their bases form a cycle or a tower, and why.

    :param claims: by the name that ``base_of`` takes.
    :param base_of: the base of each name after the import.
    """
    refused: dict[Key, str] = {}
    for name, claim in claims.items():
        path = {name: None}  # an ordered set
        base = claim.entry.base
        while base is not None and base not in path and len(path) <= MAX_DEPTH:
            path[base] = None
            base = base_of(base)

        problem = ""
        if base == name:
            problem = f"the bases of the {noun} {name!r} form a cycle: {' → '.join([*path, name])}"
        elif len(path) > MAX_DEPTH:
            problem = f"the {noun} {name!r} has more than {MAX_DEPTH - 1} bases above it"
        if problem:
            refused[claim.key] = f"{claim.entry.source}: {problem}"

    return refused


def _same(a: StatedRow | StoredRow, b: StatedRow) -> bool:
    if a.text != b.text and _parsed(a.text) != json.loads(b.text):
        return False

    # The same relative path in another folder is another file.
    return a.folder == b.folder or not (isinstance(b.entry, CardEntry) and _has_relative_path(b.entry))


def _is_built_in(row: StoredRow, claim: StatedRow) -> bool:
    """Return whether a card of the package states all that ``claim`` does; it may state more, such as a license.

    fairseq2's own card files have the names of cards that lading includes, and must import as they are.
    """
    if not row.uri.startswith(SEEDS_URI):
        return False
    stored, stated = _parsed(row.text), json.loads(claim.text)
    # The package states configurations by the name of today.
    stated = {CONFIG_KEYS[-1] if key in CONFIG_KEYS else key: value for key, value in stated.items()}

    return isinstance(stored, dict) and all(k in stored and stored[k] == v for k, v in stated.items())


def _parsed(text: str) -> object:
    """Return the content of a row; for a damaged row, an object that equals nothing."""
    try:
        return json.loads(text)
    except ValueError:
        return object()


def _has_relative_path(entry: CardEntry) -> bool:
    return any("://" not in v and not v.startswith(("/", "~")) for _, v in stated_addresses(entry.metadata))
