"""The update of the catalog from card files: read the rows, decide, write, all in the caller's transaction."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, func, select, true
from sqlalchemy.orm import Session

from lading.cards.card import FIELDS, CardEntry, checkpoint_ref
from lading.catalog.database.statements import chunks
from lading.catalog.importing import write as rows
from lading.catalog.importing.changes import (
    ADDED,
    PROGRAM,
    STDIN,
    ImportPlan,
    Key,
    StoredRow,
    architecture_key,
    architecture_text,
    architecture_title,
    card_key,
    card_title,
    claims_of,
    climb,
    decide,
)
from lading.catalog.importing.derived import Entries, card_of
from lading.catalog.records import ImportReport
from lading.catalog.schema import ArchitectureRow, CardRow, FamilyRow, SourceRow
from lading.errors import AssetCardError, CardFileError, NotSupportedError
from lading.sources.open import require_readable
from lading.system.entry_points import FAMILIES_GROUP, registered_here
from lading.system.filesystem import FileStat
from lading.system.uris import uri_path

if TYPE_CHECKING:
    from lading.cards.card_file import CardFile


def apply(
    session: Session,
    files: Sequence[CardFile],
    *,
    kind: str,
    replace: bool = False,
    keep_going: bool = False,
    stats: Mapping[str, FileStat] | None = None,
    gone: Collection[str] = (),
) -> ImportReport:
    """Update the catalog from ``files``.

    :param kind: ``seed``, ``user`` or ``import``.
    :param replace: whether the files may replace names that another source states differently.
    :param keep_going: whether to import what is right although something else is wrong.
    :param stats: the state of each source's file from before it was read.
    :param gone: sources that no longer exist; their rows go with them.

    :raises CardFileError: something is wrong, and ``keep_going`` is not set.
    """
    seeds = kind == "seed"
    files = [_without_unreadable(file) for file in files]
    of_cards = claims_of((f, card_key(e), e, dict(e.metadata)) for f in files for e in f.cards)
    of_architectures = claims_of(
        (f, architecture_key(e), e, {"base": e.base, "config": dict(e.config)}) for f in files for e in f.architectures
    )

    # A file with a problem withdraws nothing: a missing card may be the unreadable one.
    bad = {file.source for file in files if file.problems} | of_cards.problems.keys() | of_architectures.problems.keys()
    reread = {file.source for file in files if file.source not in (STDIN, ADDED, PROGRAM)} - bad | set(gone)

    kept = _kept_cards(session, of_cards.by_key, reread)
    missing = _missing(kept) if kind == "user" else set()
    cards = decide(of_cards, kept, reread=reread, missing=missing, seeds=seeds, replace=replace)
    kept = _kept_architectures(session, of_architectures.by_key, reread)
    missing |= _missing(kept) if kind == "user" else set()
    architectures = decide(of_architectures, kept, reread=reread, missing=missing, seeds=seeds, replace=replace)
    _refuse_towers(session, cards, architectures)

    problems = {file.source: list(file.problems) for file in files}
    for decision in (cards, architectures):
        for uri, lines in decision.problems.items():
            problems[uri] += lines
    all_problems = tuple(line for lines in problems.values() for line in lines)
    if all_problems and not keep_going:
        raise CardFileError(all_problems)

    ids = rows.write_sources(session, files, kind=kind, problems=problems, stats=stats or {})
    rows.write_architectures(session, architectures, ids)
    rows.write_cards(session, cards, ids, _entries(session, cards))
    rows.forget(session, gone)
    rows.forget_empty(session, {row.uri for row, _ in (*cards.moved, *architectures.moved)} & missing)
    withdrawn = bool(cards.removed or architectures.removed)
    if withdrawn or cards.changed or architectures.changed:
        rows.ask_again(session, but=ids.values(), seeds=withdrawn and not seeds, all_users=withdrawn)

    return _report(cards, architectures, warnings=_warnings(session, cards, architectures), problems=all_problems)


def _without_unreadable(file: CardFile) -> CardFile:
    """Return ``file`` without the cards whose checkpoint lading cannot read, and with the problems that they are."""
    problems: dict[str, str] = {}
    for entry in file.cards:
        try:
            ref = checkpoint_ref(card_of(entry))
            if not ref.gated:  # lading does not request what is gated, which may be at any address
                require_readable(ref.uri)
        except AssetCardError:
            continue  # the problem of a card, which its status shows
        except NotSupportedError as error:
            problems[entry.source] = f"{entry.source}.checkpoint: {error}"
    if not problems:
        return file

    cards = tuple(entry for entry in file.cards if entry.source not in problems)

    return dataclasses.replace(file, cards=cards, problems=(*file.problems, *problems.values()))


# --- what is there ----------------------------------------------------------------------------------------------------


def _kept_cards(session: Session, keys: Collection[Key], sources: Collection[str]) -> dict[Key, StoredRow]:
    statement = select(
        CardRow.id, CardRow.name, CardRow.env, CardRow.position, CardRow.metadata_, CardRow.folder, SourceRow.uri
    ).join(CardRow.source)

    conditions: list[ColumnElement[bool]]
    if (session.scalar(select(func.count(CardRow.id))) or 0) < len(keys):
        conditions = [true()]  # reading all rows is cheaper than so many queries for single ones
    else:
        conditions = [CardRow.name.in_(piece) for piece in chunks({name for name, _ in keys})]
        conditions += [SourceRow.uri.in_(piece) for piece in chunks(sources)]

    return {
        (name, env): StoredRow((name, env), uri, position, text, folder, row_id)
        for condition in conditions
        for row_id, name, env, position, text, folder, uri in session.execute(statement.where(condition))
    }


def _kept_architectures(session: Session, keys: Collection[Key], sources: Collection[str]) -> dict[Key, StoredRow]:
    row = ArchitectureRow
    statement = select(row.family, row.name, row.base, row.config, row.position, SourceRow.uri).join(row.source)
    conditions: list[ColumnElement[bool]] = [row.family.in_(piece) for piece in chunks({family for family, _ in keys})]
    conditions += [SourceRow.uri.in_(piece) for piece in chunks(sources)]

    return {
        (family, name): StoredRow((family, name), uri, position, architecture_text(base, config), None)
        for condition in conditions
        for family, name, base, config, position, uri in session.execute(statement.where(condition))
    }


def _missing(kept: Mapping[Key, StoredRow]) -> set[str]:
    """Return the sources of these rows whose file is gone."""
    paths = {uri: uri_path(uri) for uri in {row.uri for row in kept.values()}}

    return {uri for uri, path in paths.items() if path is not None and not os.path.lexists(path)}


def _entries(session: Session, cards: ImportPlan) -> Entries:
    """Return the cards that are about to change, and all their bases."""
    changes: dict[str, CardEntry | None] = {row.key[0]: None for row in cards.removed if not row.key[1]}
    for claim in cards.touched():
        if isinstance(claim.entry, CardEntry) and not claim.entry.env:
            changes[claim.entry.name] = claim.entry

    entries = Entries(session, changes)
    entries.load(name for name, entry in changes.items() if entry is not None and entry.base is not None)

    return entries


def _refuse_towers(session: Session, cards: ImportPlan, architectures: ImportPlan) -> None:
    entries = _entries(session, cards)

    def card_base(name: str) -> str | None:
        entry = entries.get(name)
        return None if entry is None else entry.base

    cards.refuse(climb("card", {c.key[0]: c for c in cards.written() if not c.key[1]}, card_base))

    for family in {claim.key[0] for claim in architectures.written()}:
        claims = {c.key[1]: c for c in architectures.written() if c.key[0] == family}
        statement = select(ArchitectureRow.name, ArchitectureRow.base).where(ArchitectureRow.family == family)
        bases = dict(session.execute(statement).all())
        bases |= {name: claim.entry.base for name, claim in claims.items()}
        architectures.refuse(climb("architecture", claims, bases.get))


# --- the report -------------------------------------------------------------------------------------------------------


def _warnings(session: Session, cards: ImportPlan, architectures: ImportPlan) -> tuple[str, ...]:
    """Return what may be intended (files come in any order), but does not work as it is."""
    warnings: list[str] = []

    wanted: dict[str, list[str]] = {}  # by the name of the card that should be there
    for claim in cards.written():
        name, env = claim.key
        if env:
            wanted.setdefault(name, []).append(
                f"{claim.entry.source}: the card {name!r} for the overlay {env!r} does not exist"
            )
        elif claim.entry.base is not None:
            wanted.setdefault(claim.entry.base, []).append(
                f"{claim.entry.source}: the card {name!r} is based on {claim.entry.base!r}, which is not in the catalog"
            )
    there = {
        name
        for piece in chunks(wanted)
        for name in session.scalars(select(CardRow.name).where(CardRow.env == "", CardRow.name.in_(piece)))
    }
    warnings += [line for name, lines in wanted.items() if name not in there for line in lines]

    for claim in architectures.written():
        base = claim.entry.base
        if base is not None and not session.scalar(
            select(ArchitectureRow.name).where(ArchitectureRow.family == claim.key[0], ArchitectureRow.name == base)
        ):
            warnings.append(
                f"{claim.entry.source}: the {claim.key[0]} architecture {claim.key[1]!r} is based on {base!r}, which "
                "is not in the catalog"
            )

    strange: dict[tuple[str, str], list[str]] = {}
    for claim in cards.written():
        if isinstance(claim.entry, CardEntry):
            for field in claim.entry.metadata:
                meant = _meant(field)
                if meant is not None and meant not in claim.entry.metadata:
                    strange.setdefault((field, meant), []).append(claim.entry.source)
    for (field, meant), sources in strange.items():
        more = f" (and {len(sources) - 1} more)" if len(sources) > 1 else ""
        warnings.append(f"{sources[0]}{more}: {field!r} is not a known field. Did you mean {meant!r}?")

    unregistered = set(session.scalars(select(FamilyRow.name).where(FamilyRow.entry_point.is_(None))))
    unregistered -= registered_here(FAMILIES_GROUP).keys()
    users: dict[str, list[str]] = {}
    plain = [claim.key[0] for claim in cards.written() if not claim.key[1]] if unregistered else []
    for piece in chunks(plain):
        found = session.execute(
            select(CardRow.family, CardRow.name)
            .where(CardRow.env == "", CardRow.name.in_(piece), CardRow.family.in_(unregistered))
            .order_by(CardRow.name)
        )
        for family, name in found:
            users.setdefault(str(family), []).append(name)
    for claim in architectures.written():
        if claim.key[0] in unregistered:
            users.setdefault(claim.key[0], []).append(architecture_title(claim.key))
    for family, names in sorted(users.items()):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.append(
            f"no installed package registers the model family {family!r}, so {shown} cannot be loaded; install it, or "
            "see `lading families`"
        )

    return tuple(warnings)


@lru_cache(maxsize=4096)
def _meant(field: str) -> str | None:
    """Return the known field that an unknown one probably means, by its name."""
    near = [] if field in FIELDS else get_close_matches(field.lower(), FIELDS, n=1, cutoff=0.85)

    return near[0] if near else None


def _report(
    cards: ImportPlan, architectures: ImportPlan, *, warnings: tuple[str, ...], problems: tuple[str, ...]
) -> ImportReport:
    def titles(of_cards: Iterable[Key], of_architectures: Iterable[Key]) -> tuple[str, ...]:
        return (*sorted(map(card_title, of_cards)), *sorted(map(architecture_title, of_architectures)))

    return ImportReport(
        added=titles((c.key for c in cards.added), (c.key for c in architectures.added)),
        changed=titles((c.key for _, c in cards.changed), (c.key for _, c in architectures.changed)),
        unchanged=titles(cards.unchanged, architectures.unchanged),
        removed=titles((r.key for r in cards.removed), (r.key for r in architectures.removed)),
        warnings=warnings,
        problems=problems,
    )
