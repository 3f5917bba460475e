"""Cards and architectures in the memory of this process, laid over those of the catalog.

The functions that read entries return both; one in memory takes the place of one of the same name in the catalog.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from typing import TYPE_CHECKING, Final

from sqlalchemy.orm import Session

from lading.cards.card import ArchitectureEntry, CardEntry
from lading.catalog.records import ImportReport
from lading.catalog.stored_cards import read_architectures as read_stored_architectures
from lading.catalog.stored_cards import read_cards as read_stored_cards
from lading.errors import CardFileError

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile

MEMORY: Final = "memory"
"""The source of entries that live in this process only."""

_CARDS: Final[dict[tuple[str, str], CardEntry]] = {}
_ARCHITECTURES: Final[dict[tuple[str, str], ArchitectureEntry]] = {}


def remember(
    session: Session, file: CardFile, *, replace: bool = False, keep_going: bool = False, dry_run: bool = False
) -> ImportReport:
    """Keep the entries of a file in memory; the parameters are those of :func:`~lading.catalog.import_cards`.

    :raises CardFileError: with all problems; among them are names of the catalog, unless ``replace``.
    """
    problems = list(file.problems)
    cards = {(entry.name, entry.env): entry for entry in file.cards}
    architectures = {(entry.family, entry.name): entry for entry in file.architectures}
    if not replace:
        for stored in read_stored_cards(session, {name for name, _ in cards}):
            entry = cards.get((stored.name, stored.env))
            if entry is not None and entry.metadata != stored.metadata:
                del cards[stored.name, stored.env]
                problems.append(_taken(entry.source, stored.source))
        for key in list(architectures):
            for other, _ in read_stored_architectures(session, *key):
                entry_here = architectures[key]
                if (entry_here.base, entry_here.config) != (other.base, other.config):
                    del architectures[key]
                    problems.append(_taken(entry_here.source, other.source))
    if problems and not keep_going:
        raise CardFileError(problems)

    before = {**_CARDS, **_ARCHITECTURES}
    stated = {**cards, **architectures}
    if not dry_run:
        _CARDS.update(cards)
        _ARCHITECTURES.update(architectures)
    titles = {key: f"{key[0]}@{key[1]}" if key[1] else key[0] for key in cards}
    titles |= {key: f"{key[0]}/{key[1]} (architecture)" for key in architectures}

    return ImportReport(
        added=tuple(titles[key] for key in stated if key not in before),
        changed=tuple(titles[key] for key in stated if key in before and stated[key] != before[key]),
        unchanged=tuple(titles[key] for key in stated if stated[key] == before.get(key)),
        problems=tuple(problems),
    )


def _taken(here: str, there: str) -> str:
    return f"{here}: expected a name that the catalog does not have, found that {there} has it; replace=True hides that"


def names_in_memory() -> Set[str]:
    """Return the names of the cards in memory, and of those with an overlay there."""
    return {name for name, _ in _CARDS}


def environments_in_memory() -> Set[str]:
    """Return the environments of the overlays in memory."""
    return {env for _, env in _CARDS} - {""}


def read_cards(session: Session, names: Collection[str] | None = None, *, env: str | None = None) -> list[CardEntry]:
    """Return the entries of cards as :func:`lading.catalog.stored_cards.read_cards`, and those in memory."""
    stored = read_stored_cards(session, names, env=env)
    if not _CARDS:
        return stored
    here = [
        entry
        for entry in _CARDS.values()
        if (names is None or entry.name in names) and (env is None or entry.env == env)
    ]

    return [entry for entry in stored if (entry.name, entry.env) not in _CARDS] + here


def read_architectures(
    session: Session, family: str | None = None, name: str | None = None
) -> list[tuple[ArchitectureEntry, str]]:
    """Return the entries of architectures as the function of that name in :mod:`lading.catalog.stored_cards`, and
    those in memory.
    """
    stored = read_stored_architectures(session, family, name)
    here = [
        (entry, MEMORY)
        for entry in _ARCHITECTURES.values()
        if family in (None, entry.family) and name in (None, entry.name)
    ]

    return [(entry, uri) for entry, uri in stored if (entry.family, entry.name) not in _ARCHITECTURES] + here
