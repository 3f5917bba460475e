"""Changes of cards in the catalog itself: removal, another name, another place of the checkpoint.

A card belongs to its source. One of a watched file, or of a package, would come back from there, so such a card is
changed in its file, and refused here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from lading.cards.addresses import stated_addresses, stated_uris, with_addresses
from lading.cards.card import CardEntry, split_name
from lading.catalog.added_cards import card_entry
from lading.catalog.checkpoints.record import write_checkpoint
from lading.catalog.database.database import Database
from lading.catalog.database.statements import dumps, intact
from lading.catalog.importing.changes import ImportPlan, StatedRow, StoredRow, card_key, card_title
from lading.catalog.importing.derived import Entries
from lading.catalog.importing.write import ask_again, forget, write_cards
from lading.catalog.links import link_by_uri
from lading.catalog.listing import near_names
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import CardChange, CheckpointContents
from lading.catalog.schema import CardRow, SourceRow
from lading.catalog.stored_cards import entry_of
from lading.errors import AssetCardError, AssetNotFoundError, CardFileError, PolicyError
from lading.system.uris import uri_path

_REFERENCES = ("base", "tokenizer_ref")
"""The fields that hold the name of another card."""


class _Held(NamedTuple):
    """A row of a card or an overlay, with its source."""

    row: StoredRow
    entry: CardEntry
    kind: str
    source_id: int

    @property
    def title(self) -> str:
        return card_title(self.row.key)


def remove_cards(*names: str, dry_run: bool = False, store: CardStore | None = None) -> tuple[CardChange, ...]:
    """Remove cards from the catalog, each with its overlays. What the catalog knows of their checkpoints stays.

    :param names: names of cards; ``name@env`` is one overlay.
    :param dry_run: whether to change nothing, and only return the changes.

    :raises AssetNotFoundError: a name is unknown; nothing was removed. The same holds below.
    :raises PolicyError: a watched file or a package states one of them, or another card refers to one.
    :raises CatalogError: the catalog cannot be written.
    """
    database = open_store(store).database
    with database.session(write=not dry_run) as session:
        rows = {held.row.key: held for name in names for held in _named(session, name)}
        _require_own(rows.values(), "remove")
        gone = {name for name, env in rows if not env}
        users = [held for held in _referring(session, gone) if held.row.key not in rows]
        if users:
            raise PolicyError(
                f"{', '.join(sorted(gone & _references(users)))}: other cards refer to it: "
                f"{', '.join(held.title for held in users)}. Nothing was removed. Remove these, too, or give them "
                "another base."
            )
        if not dry_run:
            plan = ImportPlan(removed=[held.row for held in rows.values()])
            write_cards(session, plan, {}, Entries(session, dict.fromkeys(gone)))
            forget(session, ())
            ask_again(session, but=(), seeds=True, all_users=True)

        return tuple(_change(held, "name", held.title, None) for held in rows.values())


def rename_card(old: str, new: str, *, dry_run: bool = False, store: CardStore | None = None) -> tuple[CardChange, ...]:
    """Give a card another name, also where other cards refer to it.

    :param dry_run: whether to change nothing, and only return the changes.

    :raises AssetNotFoundError: ``old`` is not a card.
    :raises AssetCardError: ``new`` is not a valid name, or that of another card; nothing was changed.
    :raises PolicyError: a watched file or a package states the card, or one that refers to it; nothing was changed.
    :raises CatalogError: the catalog cannot be written.
    """
    if "@" in old + new:
        raise AssetCardError(
            old, f"expected names of cards without an environment, found {old!r} and {new!r}. Overlays are renamed "
            "with their card."
        )  # fmt: skip
    try:
        new = card_entry(new, {}).name
    except CardFileError as error:
        raise AssetCardError(new, f"{error.problems[0]}. Nothing was renamed; choose another name.") from None
    database = open_store(store).database
    with database.session(write=not dry_run) as session:
        rows = _named(session, old)
        old = rows[0].row.key[0]
        if new == old:
            raise AssetCardError(
                new, f"The card {old!r} has this name already. Nothing was renamed; choose another name."
            )
        if taken := _find(session, CardRow.name == new):
            raise AssetCardError(
                new,
                f"The name {new!r} is that of another card ({taken[0].entry.source}). Nothing was renamed; choose "
                "another name.",
            )
        edits = {held.row.key: (held, replace(held.entry, name=new)) for held in rows}
        changes = [_change(held, "name", held.title, card_title((new, held.row.key[1]))) for held in rows]
        for held in _referring(session, {old}):
            fields = {field: new for field in _REFERENCES if held.entry.metadata.get(field) == old}
            _, entry = edits.get(held.row.key, (held, held.entry))
            edits[held.row.key] = held, replace(entry, metadata={**entry.metadata, **fields})
            changes += [_change(held, field, old, new) for field in fields]
        _require_own([held for held, _ in edits.values()], "rename")
        if not dry_run:
            _write(session, [*edits.values()], gone={old})
            ask_again(session, but=(), seeds=True, all_users=True)

        return tuple(changes)


def relocate_cards(
    database: Database, old: Path, new: Path, contents: Sequence[CheckpointContents], *, dry_run: bool
) -> list[CardChange]:
    """Have all cards that name a path, or one below it, name another one.

    :param old: an absolute path.
    :param new: the path that takes its place.
    :param contents: the contents of the checkpoints at their new places, to be recorded.

    :raises PolicyError: a file that lading reads states one of the cards; nothing was changed.
    :raises CatalogError: the catalog cannot be written.
    """
    with database.session(write=not dry_run) as session:
        edits, changes = [], []
        uri = CardRow.checkpoint_uri
        below = or_(uri == f"file://{old}", uri.startswith(f"file://{old}/", autoescape=True))
        stated = CardRow.metadata_.contains(dumps(str(old))[1:-1], autoescape=True)
        for held in _find(session, or_(below, stated)):
            moved = _moved(held.entry, old, new)
            if moved:
                edits.append((held, replace(held.entry, metadata=with_addresses(held.entry.metadata, moved))))
                before = dict(stated_addresses(held.entry.metadata))
                changes += [_change(held, name, before[name], address) for name, address in moved.items()]
        _require_own([held for held, _ in edits], "change")
        if not dry_run:
            _write(session, edits)
            for each in contents:
                write_checkpoint(session, each)
            link_by_uri(session)

        return changes


def _moved(entry: CardEntry, before: Path, after: Path) -> dict[str, str]:
    """Return the addresses of a card that are paths at or below ``before``, with the paths that take their places."""
    found = {}
    for name, stated, uri in stated_uris(entry):
        resolved = uri_path(uri)
        if resolved is None:
            continue
        # The move may have left a link at the old place, which the URI follows.
        plain = Path(os.path.normpath((entry.folder or Path("/")) / stated.removeprefix("file://")))
        for path in (plain, resolved):
            if path.is_relative_to(before):
                found[name] = str(after / path.relative_to(before))
                break

    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def _named(session: Session, name: str) -> list[_Held]:
    """Return the rows of a card and its overlays, or of one overlay; the card first.

    :raises AssetNotFoundError: there are none.
    """
    plain, env = split_name(name)
    found = _find(session, CardRow.name == plain, *([] if env is None else [CardRow.env == env]))
    if not found:
        near = near_names(session, plain, models=False) if plain else []
        raise AssetNotFoundError(name, f" Did you mean {' or '.join(map(repr, near))}?" if near else "")

    return sorted(found, key=lambda held: held.row.key)


def _referring(session: Session, names: Collection[str]) -> list[_Held]:
    """Return the rows of cards and overlays that name one of these cards as their base or for its tokenizer."""
    found = {}
    for name in names:
        for held in _find(session, CardRow.metadata_.contains(dumps(name), autoescape=True)):
            if name in _references([held]):
                found[held.row.key] = held

    return list(found.values())


def _references(rows: Iterable[_Held]) -> set[object]:
    return {held.entry.metadata.get(field) for held in rows for field in _REFERENCES}


def _find(session: Session, *conditions: ColumnElement[bool]) -> list[_Held]:
    c = CardRow
    rows = session.execute(
        select(c.id, c.name, c.env, c.metadata_, c.folder, c.position, SourceRow.uri, SourceRow.kind, SourceRow.id)
        .join(c.source)
        .where(*conditions)
        .order_by(c.source_id, c.position)
    )
    found = []
    with intact("a card"):
        for row_id, name, env, text, folder, position, uri, kind, source_id in rows:
            row = StoredRow((name, env), uri, position, text, folder, row_id)
            found.append(_Held(row, entry_of(name, env, text, folder, position, uri), kind, source_id))

    return found


def _require_own(rows: Iterable[_Held], verb: str) -> None:
    """Require that no file states these cards that lading reads by itself.

    :raises PolicyError: one does.
    """
    for held in rows:
        where = uri_path(held.row.uri) or held.row.uri
        if held.kind == "user":
            raise PolicyError(
                f"{held.title}: {where} states it ({held.entry.source}), and lading reads that file whenever it "
                f"changes. Nothing was changed; {verb} it there."
            )
        if held.kind == "seed":
            raise PolicyError(
                f"{held.title}: it comes with a package ({where}), which states it at every start. Nothing was "
                f"changed; to change its fields, write an overlay `{held.row.key[0]}@user` in a card file of your own."
            )


def _write(session: Session, edits: Sequence[tuple[_Held, CardEntry]], gone: Collection[str] = ()) -> None:
    """Replace rows by others.

    :param gone: the names that no row has any more.
    """
    plan = ImportPlan()
    changes: dict[str, CardEntry | None] = dict.fromkeys(gone)
    sources = {}
    for held, entry in edits:
        row = held.row
        text = dumps(dict(entry.metadata))
        plan.changed.append((row, StatedRow(card_key(entry), entry, row.uri, row.position, text, row.folder)))
        sources[row.uri] = held.source_id
        if not entry.env:
            changes[entry.name] = entry
    entries = Entries(session, changes)
    entries.load([name for name, entry in changes.items() if entry is not None])
    write_cards(session, plan, sources, entries)


def _change(held: _Held, field: str, before: str, after: str | None) -> CardChange:
    return CardChange(card=held.title, field=field, before=before, after=after, stated_in=held.row.uri)
