"""The store: cards, architectures and checkpoints by name, all as frozen values."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from pathlib import Path

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from lading.cards.card import (
    USER_ENV,
    Architecture,
    ArchitectureEntry,
    AssetCard,
    CardEntry,
    checkpoint_ref,
    resolve_architecture,
    resolve_card,
    split_name,
)
from lading.catalog.checkpoints.copies import copies_at, copies_of_id, copies_with
from lading.catalog.checkpoints.manifests import find_columns, read_digests, read_manifest, read_roots
from lading.catalog.database.database import Database
from lading.catalog.database.statements import chunks, intact
from lading.catalog.importing.derived import card_of, descendants
from lading.catalog.listing import ModelFilter, Sort, list_models, near_names, summary_of
from lading.catalog.memory_cards import environments_in_memory, names_in_memory, read_architectures, read_cards
from lading.catalog.open import open_catalog
from lading.catalog.records import (
    ArchitectureSummary,
    DigestDocument,
    FamilySummary,
    LocalCopy,
    ModelSummary,
    StoredCheckpoint,
)
from lading.catalog.schema import ARCHITECTURES, CARDS, FAMILIES
from lading.catalog.stored_cards import read_architectures as read_stored_architectures
from lading.catalog.stored_cards import read_cards as read_stored_cards
from lading.errors import (
    AssetCardError,
    AssetNotFoundError,
    ModelArchitectureNotKnownError,
    SettingsError,
    did_you_mean,
)
from lading.formats.digests import Digests
from lading.formats.manifest import Manifest
from lading.sources.hub.address import SCHEMES
from lading.system.entry_points import FAMILIES_GROUP, registered_here
from lading.system.filesystem import FileStat, path_exists
from lading.system.settings import Settings

__all__ = [
    "ArchitectureSummary",
    "AssetStore",
    "FamilySummary",
    "LocalCopy",
    "ModelSummary",
    "StoredCheckpoint",
    "get_asset_store",
]

_log = logging.getLogger("lading")

_MATERIALISED = {"model_family": CARDS.c.family, "model_arch": CARDS.c.arch}
"""The fields whose resolved values are columns."""


def get_asset_store() -> AssetStore:
    """Return the store over the catalog that the environment names; a process opens it once per set of settings.

    :raises CatalogError: it cannot be opened.
    :raises CatalogOutdatedError: its schema is older or newer than this version of lading.
    """
    settings = Settings.from_environment()
    store = _store(settings)
    path = store.database.path
    if path is not None and not path.exists():  # removed under this process: create it again
        _store.cache_clear()
        store = _store(settings)

    return store


@lru_cache(maxsize=8)
def _store(settings: Settings) -> AssetStore:
    for path in settings.card_paths[1:]:
        if not path_exists(path):
            _log.warning(
                "LADING_CARDS names %s, which does not exist or cannot be read; its cards stay in the catalog.",
                path,
            )

    return AssetStore(open_catalog(settings))


class AssetStore:
    """The cards, architectures and checkpoints of a catalog."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def database(self) -> Database:
        return self._database

    @property
    def settings(self) -> Settings:
        """The settings that the catalog was opened with; they hold for all that is done with this store."""
        return self._database.settings

    # --- cards --------------------------------------------------------------------------------------------------------

    def retrieve_card(self, name: str) -> AssetCard:
        """Return the card that ``name`` means.

        ``name`` alone is the card with its first overlay of ``user`` and the default environment; ``name@env`` the card
        with just that overlay, ``name@`` without any. The same holds for its bases.

        :raises AssetNotFoundError: no card has this name, or no card has an overlay for ``env``.
        :raises AssetCardError: a base is missing or leads back to the card.
        :raises SettingsError: no card has an overlay for the default environment.
        """
        card = self.maybe_retrieve_card(name)
        if card is None:
            near = self._near(split_name(name)[0], models=False)
            raise AssetNotFoundError(name, f" Did you mean {' or '.join(map(repr, near))}?" if near else "")

        return card

    def maybe_retrieve_card(self, name: str) -> AssetCard | None:
        """Return the card like :meth:`retrieve_card`, but ``None`` for an unknown name."""
        plain, env = split_name(name)
        if not plain or not _is_text(name):
            return None

        with self._database.session() as session:
            try:
                envs = self._envs(session, plain, env)
            except AssetNotFoundError:
                if not read_cards(session, [plain], env=""):
                    return None  # an unknown name matters more than an unknown environment
                raise
            card = resolve_card(plain, envs, lambda name: _by_env(read_cards(session, [name])))

        return card if card is None or env is None else replace(card, env=env)

    def own_card(self, name: str) -> AssetCard:
        """Return a card with its own fields only, without overlays, so that one whose base is missing is found, too.

        :raises AssetNotFoundError: no card has this name.
        """
        with self._database.session() as session:
            entry = next(iter(read_cards(session, [name], env="")), None)
        if entry is None:
            raise AssetNotFoundError(name)

        return card_of(entry)

    def find_cards(self, field: str, value: object) -> Iterator[AssetCard]:
        """Yield all cards whose field ``field``, their own or a base's, equals ``value``; log and skip bad cards.

        :raises SettingsError: no card has an overlay for the default environment.
        """
        with self._database.session() as session:
            envs = self._envs(session, "", None)
            kept, conditions = _MATERIALISED.get(field), None
            if kept is not None and isinstance(value, str) and _is_text(value):
                conditions = [kept == value]
            names, entries = self._candidates(session, conditions, envs)

        def matches(card: AssetCard) -> bool:
            found = card.maybe_get_field(field)
            return found is not None and found.value == value

        yield from _matching(names, entries, envs, matches)

    def cards_at(self, uris: Collection[str]) -> Iterator[AssetCard]:
        """Yield all cards whose ``checkpoint``, their own or a base's, is one of these URIs; log and skip bad cards.

        The ids of the hub ignore case, and so does this for its addresses.

        :raises SettingsError: no card has an overlay for the default environment.
        """
        folded = {uri.lower() for uri in uris if uri.startswith(SCHEMES)}
        with self._database.session() as session:
            envs = self._envs(session, "", None)
            names, entries = self._candidates(session, _at(uris), envs)

        def matches(card: AssetCard) -> bool:
            uri = checkpoint_ref(card).uri
            return uri in uris or uri.lower() in folded

        yield from _matching(names, entries, envs, matches)

    def names_at(self, uris: Collection[str], *, below: tuple[str, ...] = ()) -> list[str]:
        """Return the names of all cards that :meth:`cards_at` may yield, and some more; bad ones, too.

        :param below: the beginnings of further URIs, such as ``file://``.

        :raises SettingsError: no card has an overlay for the default environment.
        """
        with self._database.session() as session:
            return sorted(self._names(session, _at(uris, below), self._envs(session, "", None)))

    @property
    def asset_names(self) -> Set[str]:
        """The names of all cards, overlays apart."""
        with self._database.session() as session:
            stored = session.scalars(select(CARDS.c.name).where(CARDS.c.env == ""))
            return frozenset(stored) | {entry.name for entry in read_cards(session, names_in_memory(), env="")}

    def _candidates(
        self, session: Session, conditions: Sequence[ColumnElement[bool]] | None, envs: Sequence[str]
    ) -> tuple[list[str], Mapping[str, Mapping[str, CardEntry]]]:
        """Return names of cards that include all matches, and the entries of these cards and their bases.

        :param conditions: conditions on the columns of resolved values; a card has to meet one of them; default: none.
        """
        if conditions is None:
            entries = _grouped(read_cards(session))
            return sorted(name for name, by_env in entries.items() if "" in by_env), entries

        names = self._names(session, conditions, envs)

        entries = {}
        level: Collection[str] = names
        while level:
            found = _grouped(read_cards(session, level))
            entries.update({name: found.get(name, {}) for name in level})
            bases = {entry.base for by_env in found.values() for entry in by_env.values()}
            level = {base for base in bases if base is not None and base not in entries}

        return sorted(names), entries

    def _names(self, session: Session, conditions: Sequence[ColumnElement[bool]], envs: Sequence[str]) -> set[str]:
        # The columns are right for every card without an overlay, or a card in memory, on its chain.
        names = self._overlaid(session, envs)
        for condition in conditions:
            names |= set(session.scalars(select(CARDS.c.name).where(CARDS.c.env == "", condition)))

        return names

    def _overlaid(self, session: Session, envs: Sequence[str]) -> set[str]:
        """Return the names of the cards with an overlay of ``envs``, or a card in memory, on their chain of bases."""
        found = set(session.scalars(select(CARDS.c.name).where(CARDS.c.env != "", CARDS.c.env.in_(envs))))
        found |= names_in_memory()

        return descendants(session, found) | found

    def _envs(self, session: Session, name: str, env: str | None) -> tuple[str, ...]:
        """Return the environments whose overlays to try, first to last."""
        if env == "":
            return ()

        wanted = self.settings.env if env is None else env
        if wanted is not None and wanted != USER_ENV:
            known = CARDS.c.env == wanted
            in_memory = environments_in_memory()
            if wanted not in in_memory and not session.scalar(
                select(CARDS.c.id).where(CARDS.c.env != "", known).limit(1)
            ):
                envs = session.scalars(select(CARDS.c.env).where(CARDS.c.env != "").distinct())
                others = sorted({USER_ENV, *envs, *in_memory})
                known_ones = f"Known: {', '.join(others)}.{did_you_mean(wanted, others)}"
                if env is not None:
                    hint = f" No card has an overlay for the environment {wanted!r}. {known_ones}"
                    raise AssetNotFoundError(f"{name}@{env}", hint)
                raise SettingsError(
                    f"LADING_ENV names the environment {wanted!r}, for which no card has an overlay. {known_ones}",
                )
        if env is not None:
            return (env,)

        return (USER_ENV,) if wanted in (None, USER_ENV) else (USER_ENV, str(wanted))

    # --- architectures and families -----------------------------------------------------------------------------------

    def architecture(self, name: str, family: str) -> Architecture:
        """Return the architecture ``name`` of ``family``, with its bases.

        :raises ModelArchitectureNotKnownError: the architecture does not exist.
        :raises AssetCardError: a base of it is missing, or leads back to it.
        """
        found = self.maybe_architecture(name, family)
        if found is None:
            known = [a.name for a in self.architectures(family)]
            raise ModelArchitectureNotKnownError(name, family, did_you_mean(name, known))

        return found

    def maybe_architecture(self, name: str, family: str) -> Architecture | None:
        """Return the architecture like :meth:`architecture`, but ``None`` if it does not exist."""
        if not _is_text(name + family):
            return None

        with self._database.session() as session:

            def look_up(name: str) -> ArchitectureEntry | None:
                return next((entry for entry, _ in read_architectures(session, family, name)), None)

            return resolve_architecture(name, family, look_up)

    def resolved_architectures(self, family: str) -> Iterator[Architecture]:
        """Yield the architectures of a family with their bases, by name, except for those that lack a base."""
        with self._database.session() as session:
            entries = {entry.name: entry for entry, _ in read_architectures(session, family)}

        for name in sorted(entries):
            with suppress(AssetCardError):
                if (found := resolve_architecture(name, family, entries.get)) is not None:
                    yield found

    def architectures(self, family: str | None = None) -> list[ArchitectureSummary]:
        """Return the architectures of a family, or of all families, by family and name."""
        with self._database.session() as session:
            found = read_architectures(session, family) if family is None or _is_text(family) else []

        summaries = [
            ArchitectureSummary(name=e.name, family=e.family, base=e.base, overrides=e.config, source=uri)
            for e, uri in found
        ]

        return sorted(summaries, key=lambda s: (s.family, s.name))

    def families(self) -> list[FamilySummary]:
        """Return the families that packages register, and those that cards and architectures name."""
        of_cards = select(CARDS.c.family, func.count()).where(CARDS.c.env == "").group_by(CARDS.c.family)
        of_architectures = select(ARCHITECTURES.c.family, func.count()).group_by(ARCHITECTURES.c.family)
        with self._database.session() as session:
            families = session.execute(select(FAMILIES)).all()
            cards = {row[0]: row[1] for row in session.execute(of_cards)}
            architectures = {row[0]: row[1] for row in session.execute(of_architectures)}

        here = registered_here(FAMILIES_GROUP)
        with intact("a family"):
            registered = {family.name: family.entry_point is not None for family in families}
            registered |= dict.fromkeys(here, True)
            return [
                FamilySummary(
                    name=name,
                    registered=is_registered,
                    architectures=architectures.get(name, 0),
                    cards=cards.get(name, 0),
                )
                for name, is_registered in sorted(registered.items())
            ]

    # --- models -------------------------------------------------------------------------------------------------------

    def models(
        self,
        pattern: str | None = None,
        *,
        include_all: bool = False,
        unregistered: bool = False,
        family: str | None = None,
        status: str | None = None,
        search: str | None = None,
        local: bool = False,
        dtype: str | None = None,
        min_bytes: int | None = None,
        max_bytes: int | None = None,
        sort: Sort = "name",
        limit: int | None = None,
    ) -> list[ModelSummary]:
        """Return the models of the catalog, with their status and checkpoint for this process and machine.

        :param pattern: a shell-style pattern of the name.
        :param include_all: also cards without a model.
        :param unregistered: also the checkpoints and artifacts on this machine that belong to no card.
        :param search: words that all occur, in any order, in the name or the fields of the card, its own or inherited;
            the last may be a prefix. Blank: no condition; without a word: no results.
        :param local: only those with files on this machine.
        :param dtype: only those that are mostly of this dtype, such as ``"bfloat16"``, ``"bf16"`` or ``"I8"``.
        :param min_bytes: only those whose tensors have at least this size, as far as it is known.
        :param max_bytes: only those whose tensors have at most this size, as far as it is known.
        :param sort: by ``"name"``; by ``"size"``, the largest first; or by ``"modified"``, the one first whose files on
            this machine changed last. What is not known comes last.
        :param limit: the most models to return.
        """
        if not _is_text(f"{pattern}{family}{dtype}"):
            return []

        with self._database.session() as session:
            envs = self._envs(session, "", None)

            def card(name: str) -> AssetCard | None:
                return resolve_card(name, envs, lambda name: _by_env(read_cards(session, [name])))

            wanted = ModelFilter(
                pattern=pattern,
                include_all=include_all,
                unregistered=unregistered,
                family=family,
                status=status,
                search=search,
                local=local,
                dtype=dtype,
                min_bytes=min_bytes,
                max_bytes=max_bytes,
                sort=sort,
                limit=limit,
            )
            overlaid = {name: partial(card, name) for name in self._overlaid(session, envs)}
            return list_models(session, wanted, overlaid)

    def summary(self, card: AssetCard) -> ModelSummary | None:
        """Return the summary that :meth:`models` has of a card, with the card's own overlays."""
        with self._database.session() as session:
            return summary_of(session, card)

    def suggest(self, name: str) -> list[str]:
        """Return the names of the models nearest to ``name``, the nearest first."""
        return self._near(name, models=True)

    def _near(self, name: str, *, models: bool) -> list[str]:
        if not name or not _is_text(name):
            return []

        with self._database.session() as session:
            found = [*get_close_matches(name, names_in_memory()), *near_names(session, name, models=models)]
            return [near for near in found if near != name][:3]

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoint(self, uri: str) -> StoredCheckpoint | None:
        """Return the catalog's knowledge of a checkpoint; ``None`` if it knows nothing."""
        if not _is_text(uri):
            return None

        with self._database.session() as session:
            row = find_columns(session, uri)
            if row is None:
                return None

            return StoredCheckpoint(
                uri=uri,
                revision=row.revision,
                manifest=read_manifest(session, row),
                copies=tuple(copies_of_id(session, row.id)),
                indexed_at=row.indexed_at,
                published=None
                if row.document_uri is None
                else DigestDocument(uri=row.document_uri, sha256=row.document_sha256),
            )

    def digests(self, uri: str, manifest: Manifest) -> Digests | None:
        """Return the recorded digests of a checkpoint's tensors.

        :param manifest: that of the checkpoint; the result is ``None`` if the catalog's has other tensors by now.
        """
        with self._database.session() as session:
            row = find_columns(session, uri)
            if row is None or row.tensors != len(manifest):
                return None
            if not read_manifest(session, row).tensors_equal(manifest):
                return None

            return read_digests(session, row.id, manifest)

    def find_content(self, sha256: str) -> Path | None:
        """Return a file on this machine that was verified to have this SHA-256, and is as it was then."""
        with self._database.session() as session:
            for copy in copies_with(session, sha256):
                try:
                    if copy.verified_at is not None and FileStat.from_stat(os.stat(copy.path)) == copy.stat:
                        return copy.path
                except OSError:
                    continue

        return None

    def is_verified(self, path: Path) -> bool:
        """Return whether the file at ``path`` was verified, and is as it was then."""
        with self._database.session() as session:
            copies = copies_at(session, path)
        try:
            found = FileStat.from_stat(os.stat(path))
        except OSError:
            return False

        return any(copy.verified_at is not None and copy.stat == found for copy in copies)

    def tensor_digests(self, uri: str) -> Mapping[str, str]:
        """Return the known digests of a checkpoint's tensors, by their names."""
        if not _is_text(uri):
            return {}

        with self._database.session() as session:
            return read_roots(session, uri)

    # --- export -------------------------------------------------------------------------------------------------------

    def names_stating(self, *fields: str) -> list[str]:
        """Return the names of the cards that state one of ``fields``, in any environment, or have such a base."""
        stated = [CARDS.c.metadata_.contains(f'"{field}"') for field in fields]
        with self._database.session() as session:
            names = set(session.scalars(select(CARDS.c.name).where(or_(*stated))))
            return sorted(names | descendants(session, names))

    def entries(self, pattern: str | None = None) -> tuple[list[CardEntry], list[ArchitectureEntry]]:
        """Return the documents behind the catalog, in their order: all, or those whose name matches a pattern."""

        def matches(name: str) -> bool:
            return pattern is None or fnmatchcase(name, pattern)

        with self._database.session() as session:
            cards = [entry for entry in read_stored_cards(session) if matches(entry.name)]
            architectures = [entry for entry, _ in read_stored_architectures(session) if matches(entry.name)]

        return cards, architectures


def _grouped(entries: Collection[CardEntry]) -> dict[str, dict[str, CardEntry]]:
    grouped: dict[str, dict[str, CardEntry]] = {}
    for entry in entries:
        grouped.setdefault(entry.name, {})[entry.env] = entry

    return grouped


def _matching(
    names: Iterable[str],
    entries: Mapping[str, Mapping[str, CardEntry]],
    envs: Sequence[str],
    matches: Callable[[AssetCard], bool],
) -> Iterator[AssetCard]:
    """Yield the cards of these names that match; log and skip bad cards."""
    for name in names:
        try:
            card = resolve_card(name, envs, lambda name: entries.get(name, {}))
            if card is not None and matches(card):
                yield card
        except AssetCardError as error:
            _log.warning("A card of the catalog cannot be used: %s", error)


def _at(uris: Collection[str], below: tuple[str, ...] = ()) -> list[ColumnElement[bool]]:
    """Return conditions, one for a checkpoint at one of these URIs, others for one below the rest."""
    exact = [uri for uri in uris if _is_text(uri)]
    folded = {uri.lower() for uri in exact if uri.startswith(SCHEMES)}
    column = CARDS.c.checkpoint_uri

    return [
        *(column.in_(some) for some in chunks(exact)),  # by an index
        *(func.lower(column).in_(some) for some in chunks(folded)),
        *(column.startswith(beginning, autoescape=True) for beginning in below),
    ]


def _by_env(entries: Collection[CardEntry]) -> dict[str, CardEntry]:
    return {entry.env: entry for entry in entries}


def _is_text(name: str) -> bool:
    """Return whether a database can keep ``name``: not with half a surrogate pair, as in some paths, or a NUL."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False

    return "\0" not in name
