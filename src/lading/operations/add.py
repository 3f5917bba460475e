"""Cards for checkpoints: each one that is found gets a name in the catalog, and its contents are recorded there."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lading.cards.addresses import stated_addresses
from lading.cards.card import AssetCardField, CardEntry, checkpoint_ref
from lading.catalog.added_cards import card_entry, record_additions
from lading.catalog.artifacts import record_artifacts
from lading.catalog.importing.changes import ADDED
from lading.catalog.own_store import CardStore, open_store
from lading.catalog.records import CheckpointContents, ModelSummary
from lading.catalog.store import AssetStore
from lading.checkpoints.card_links import names_of
from lading.errors import (
    AssetCardError,
    CardFileError,
    CatalogError,
    CheckpointNotFoundError,
    LadingError,
    NotSupportedError,
    first_line,
)
from lading.formats.folder import is_there
from lading.operations.adopt import adopt_checkpoints
from lading.operations.card_names import check_rule, choose_names
from lading.operations.describe_checkpoint import Describer, Description
from lading.operations.find_checkpoints import FoundCheckpoint, find_checkpoints
from lading.operations.moved import Move, MoveFinder
from lading.sources.hub.address import is_repo_id
from lading.sources.open import check_address
from lading.system.display import human_bytes, representation
from lading.system.filesystem import expand_home
from lading.system.uris import path_uri, shown_uri, uri_path

Status = Literal["added", "changed", "unchanged", "moved", "gone", "skipped", "failed"]

_BATCH = 500
"""The most checkpoints that one transaction records: the manifests of so many take some hundred megabytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedCard:
    """The result for one checkpoint that was found, or that is gone."""

    name: str | None
    """The name of its card; ``None`` without a card."""
    status: Status
    """``added`` now; ``changed`` by the given fields; ``unchanged``, for a checkpoint that had a card; ``moved``, with
    its card; ``gone``: the card stays, but nothing is at its path; ``skipped``: lading does not load it; ``failed``."""
    checkpoint: str
    """The path, or the address."""
    family: str | None = None
    arch: str | None = None
    license: str | None = None
    bytes: int | None = None
    """The size of its tensors, if its headers were read."""
    dtypes: str | None = None
    """The dtypes, separated by commas, that of the most elements first."""
    moved_from: str | None = None
    """The path at which it was before."""
    problem: str | None = None
    error: LadingError | OSError | None = None
    """The error, if it was skipped or failed."""

    def __repr__(self) -> str:
        return representation(
            self, f"{self.name or self.checkpoint} {self.status}", self.problem or human_bytes(self.bytes)
        )


def add_checkpoints(
    *paths: str | Path,
    name_from: str = "folder",
    recursive: bool = False,
    fields: Mapping[str, object] | None = None,
    dry_run: bool = False,
    restrict: bool = True,
    progress: bool = True,
    store: CardStore | None = None,
) -> tuple[AddedCard, ...]:
    """Write a card to the catalog for each checkpoint that has none, and record what it holds, without reading weights.

    A card states the family, and the architecture if there is one with exactly these numbers, by ``config.json``; and
    ``license``, ``base_model`` and ``pipeline_tag`` by the front matter of ``README.md``. A checkpoint that has a card
    keeps it. One that moved takes its card along, if this function wrote that.

    :param paths: folders, files, and addresses such as ``hg://org/name``; only headers are read there. A folder that
        is not a checkpoint is one with checkpoints in it.
    :param name_from: ``"folder"``: the name of the folder, and those of the folders above it where several checkpoints
        have it; ``"path"``: the path below the folder that was named; or a pattern with ``{folder}``, ``{parent}`` and
        ``{path}``.
    :param recursive: whether to search folders at any depth, also in checkpoints.
    :param fields: fields for all cards, in place of those that are found.
    :param dry_run: whether to change nothing, and only return the results.
    :param restrict: see :func:`lading.formats.index`.
    :param progress: whether to show a progress bar on stderr while files are hashed.

    :returns: a result for each checkpoint that was found, even if it cannot be used, and for each of these cards whose
        checkpoint is gone from the searched folders.

    :raises CheckpointNotFoundError: a path does not exist (also a ``FileNotFoundError``); nothing was written.
    :raises ValueError: ``name_from`` has an unknown placeholder.
    :raises AddressError: an address is not valid.
    :raises CardFileError: a field has a value that a card cannot have.
    :raises AssetNotFoundError: ``fields`` state a ``base`` that is not in the catalog.
    :raises CatalogError: the catalog cannot be read or written.
    """
    check_rule(name_from)
    base = card_entry("x", fields or {}).base
    store = open_store(store)
    if base is not None:
        store.retrieve_card(base)
    if not dry_run:
        store.database.require_writable()

    targets = [resolve_target(path) for path in paths]
    adder = _Adder(store, fields=fields or {}, dry_run=dry_run, restrict=restrict, progress=progress)
    for target in targets:
        if isinstance(target, Path):
            adder.search(target, recursive=recursive)
        else:
            adder.read_address(target)
    adder.decide(name_from, [target for target in targets if isinstance(target, Path)])

    return adder.write()


def resolve_target(target: str | Path) -> str | Path:
    """Return an address; or a path without links to folders, as a file keeps its name.

    :raises AddressError: the address is not valid.
    :raises CheckpointNotFoundError: nothing is at the path.
    """
    if isinstance(target, str) and "://" in target:
        path = uri_path(target)
        if path is None:
            check_address(target)
            return target
    else:
        path = expand_home(target)
    if not str(target) or not is_there(path):  # an empty variable of a shell is not the current folder
        hint = f" Did you mean hg://{path}?" if "/" in str(path) and is_repo_id(str(path)) else ""
        where = str(target) or repr("")
        raise CheckpointNotFoundError(path, f"No checkpoint is at {where}: the path does not exist.{hint}")

    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def _links_out(root: Path) -> list[Path]:
    """Return the links in a folder that lead to checkpoints outside of it: the search does not follow them."""
    try:
        links = sorted(entry for entry in root.iterdir() if entry.is_symlink() and entry.is_dir())
    except OSError:  # it is a file, or cannot be read, which the search reports
        return []
    targets = {link: link.resolve() for link in links}

    return [
        link
        for link, target in targets.items()
        if not target.is_relative_to(root) and any(p.path == target for p in find_checkpoints(target, depth=0))
    ]


@dataclass(slots=True, kw_only=True)
class _Found:
    """A checkpoint that was found, and what is decided about it."""

    described: Description
    status: Status = "added"
    name: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    """The fields of its card, as they are to be."""
    inherited: Mapping[str, object] = field(default_factory=dict)
    """The fields of the base of its card."""
    entries: list[CardEntry] = field(default_factory=list)
    """The cards to write."""
    move: Move | None = None
    """The way from its earlier path."""
    problem: str | None = None
    error: LadingError | None = None

    def fail(self, error: LadingError) -> None:
        """Give up, and report why."""
        self.status, self.error, self.entries = _status_of(error), error, []

    @property
    def contents(self) -> CheckpointContents | None:
        """The contents to record together with its card."""
        contents = self.described.contents
        if self.error is not None or contents is None or self.move is None:
            return None if self.error is not None else contents

        return self.move.contents(contents.manifest)

    def origin(self, move: Move) -> Path:
        """Return the path at which it was: of an adapter, the folder."""
        return move.origin if self.described.adapter_of is None else move.origin.parent

    def result(self) -> AddedCard:
        """Return the report of this checkpoint."""
        manifest, of = self.described.manifest, {**self.inherited, **self.fields}.get

        return AddedCard(
            name=self.name if self.error is None else None,
            status=self.status,
            checkpoint=self.described.shown,
            **{key: value if isinstance(value := of(name), str) else None for key, name in _SHOWN.items()},
            bytes=None if manifest is None else manifest.total_bytes,
            dtypes=None if manifest is None else ",".join(manifest.dtype_counts),
            moved_from=None if self.move is None else str(self.origin(self.move)),
            problem=self.problem if self.error is None else _line(self.error, self.described.shown),
            error=self.error,
        )


_SHOWN = {"family": "model_family", "arch": "model_arch", "license": "license"}


class _Adder:
    """The cards of one call: first all checkpoints are read, then names are given, then all is written."""

    def __init__(
        self, store: AssetStore, *, fields: Mapping[str, object], dry_run: bool, restrict: bool, progress: bool
    ) -> None:
        self._store = store
        self._given = fields
        self._dry_run = dry_run
        self._restrict = restrict
        self._progress = progress
        self._describer = Describer(store, restrict=restrict)
        self._found: dict[str, _Found | AddedCard] = {}
        """The results, or what is to become one, by URI or path."""
        # The cards of state dicts in files, with their names there, by the URI of the file.
        self._nested = _cards_of_state_dicts(store)
        self._cards = {model.name: model for model in store.models(include_all=True)}

    # --- reading ------------------------------------------------------------------------------------------------------

    def search(self, root: Path, *, recursive: bool) -> None:
        """Describe the checkpoint at ``root``, or those in it."""
        of_root = False
        for place in find_checkpoints(root, depth=None if recursive else 1):
            if of_root and place.path != root and not recursive:
                return
            self._describe(place)
            of_root = of_root or place.path == root
        for link in _links_out(root):
            error = NotSupportedError(
                f"{link} is a link to a checkpoint outside of {root}, and is not followed. Give its path, or "
                f"{shlex.quote(str(link.resolve()))}."
            )
            self._found[str(link)] = _failed(str(link), error)

    def read_address(self, uri: str) -> None:
        """Describe the checkpoint at an address."""
        self._attempt(shown_uri(uri), lambda: self._describer.at_address(uri))

    def _describe(self, place: FoundCheckpoint) -> None:
        if place.problem is not None:
            self._found[str(place.path)] = _failed(str(place.path), place.problem)
        elif place.repo is None:
            # A file of several state dicts cannot be read without the name of one.
            stated = next((inside for _, inside in self._nested.get(path_uri(place.path), [])), None)
            state_dict = self._given.get("state_dict", stated)
            self._attempt(str(place.path), lambda: self._describer.at_path(place, state_dict))
        else:
            self._describe_snapshots(place.path if place.commit is None else place.root)

    def _describe_snapshots(self, path: Path) -> None:
        """Describe the checkpoints of a repository in a Hugging Face cache, which are adopted."""
        for adopted in adopt_checkpoints(
            path, dry_run=self._dry_run, restrict=self._restrict, progress=self._progress, store=self._store
        ):
            uri = adopted.checkpoint
            if uri is None:
                error = adopted.error or NotSupportedError(f"{adopted.path}: {adopted.kind}: {adopted.problem}")
                self._found[str(adopted.path)] = _failed(str(adopted.path), error)
            else:
                self._attempt(uri, lambda uri=uri, path=adopted.path: self._describer.in_cache(uri, path))  # type: ignore[misc]

    def _attempt(self, where: str, describe: Callable[[], Description]) -> None:
        try:
            described = describe()
        except CatalogError:
            raise
        except (LadingError, OSError) as error:
            self._found[where] = _failed(where, error)
        else:
            self._found.setdefault(described.uri, _Found(described=described))  # folders may overlap

    # --- deciding -----------------------------------------------------------------------------------------------------

    def decide(self, rule: str, roots: Sequence[Path]) -> None:
        """Decide for each checkpoint which card it keeps or gets, and which cards have lost theirs."""
        found = [each for each in self._found.values() if isinstance(each, _Found)]
        own = {uri for each in found for uri in (each.described.uri, each.described.file_uri) if uri}
        owners = names_of(self._store, own.union(*(each.described.bases() for each in found)))
        moves = MoveFinder(self._store, progress=self._progress)
        new = []
        for each in found:
            files = each.described.files
            uri, file = each.described.uri, each.described.file_uri
            names = owners.get(uri) or owners.get(file) or [name for name, _ in self._nested.get(file, [])]
            each.move = moves.find(files) if files is not None and not names else None
            if names:
                self._keep(each, names, rule)
            elif each.move is not None and each.move.cards:
                self._move(each, each.move)
            else:
                new.append(each)
        self._give_names(new, rule)
        self._write_new(new, owners)

        moved = {name for each in found if each.move is not None for name in each.move.cards}
        with_adapters = set(self._store.names_stating("adapter", "adapters"))
        for model in self._cards.values():
            path = uri_path(model.checkpoint or "")
            may_be_gone = model.name in with_adapters or (path is not None and not is_there(path))
            if model.source == ADDED and may_be_gone and model.name not in moved:
                self._report_gone(model, roots)

    def _report_gone(self, model: ModelSummary, roots: Sequence[Path]) -> None:
        """Report a card of lading's own, if nothing is at a path that it states below the searched folders."""
        try:
            card = self._store.own_card(model.name)
            addresses = [AssetCardField(name, card, value).as_uri() for name, value in stated_addresses(card.metadata)]
        except LadingError:
            return  # a bad address, which `lading list` shows
        for path in filter(None, map(uri_path, addresses)):
            if any(path.is_relative_to(root) for root in roots) and not is_there(path):
                self._found[f"{model.name} {path}"] = _gone(model, path)

    def _keep(self, each: _Found, names: Sequence[str], rule: str) -> None:
        """Keep the card of a checkpoint; the given fields change one of lading's own."""
        own = next((name for name in names if self._cards[name].source == ADDED), None)
        each.name, each.status = own or names[0], "unchanged"
        card = self._cards[each.name]
        each.fields = self._fields_shown(each.name)
        each.problem = card.problem
        named_otherwise = rule != "folder" and choose_names([each.described.place], rule, lambda _: True) != [own]
        if own is not None and named_otherwise:
            each.problem = (
                f"{each.described.shown} has the card {own!r} already, which keeps its name; `lading rename "
                f"{shlex.quote(own)} NEW` gives it another one"
            )
        if not self._given:
            return
        if own is None:
            each.problem = f"its card {card.name!r} is stated by {card.source}, which the given fields do not change"
            return
        before = self._own_fields(own)
        if any(before.get(key) != value for key, value in self._given.items()):
            each.status = "changed"
            self._write_card(each, own, {**before, **self._given})

    def _fields_shown(self, name: object) -> Mapping[str, object]:
        """Return the fields that a result shows of a card, be it in the catalog or still to be written."""
        card = self._cards.get(str(name))
        if card is not None:
            return {field: getattr(card, key) for key, field in _SHOWN.items()}
        new = next((each for each in self._found.values() if isinstance(each, _Found) and each.name == name), None)

        return {} if new is None or name is None else {**new.inherited, **new.fields}

    def _own_fields(self, name: str) -> Mapping[str, object]:
        return self._store.own_card(name).metadata

    def _move(self, each: _Found, move: Move) -> None:
        """Have the cards of a checkpoint that moved name its new place, unless a file states one of them."""
        field, origin = each.described.field, each.origin(move)
        for name in move.cards:
            card = self._cards[name]
            if card.source != ADDED:
                each.fail(
                    NotSupportedError(
                        f"{each.described.shown} was at {origin}, the path that the card {name!r} still states "
                        f"({card.source}). Change it there, or run `lading relocate {shlex.quote(str(origin))} "
                        f"{shlex.quote(each.described.shown)}`."
                    )
                )
                return
            before = self._own_fields(name)
            if field in before:
                self._write_card(each, name, {**before, field: each.described.fields[field], **self._given})
        if each.error is None:
            each.status, each.name = "moved", move.cards[0]

    def _give_names(self, new: Sequence[_Found], rule: str) -> None:
        names = choose_names([each.described.place for each in new], rule, lambda name: name not in self._cards)
        counts = Counter(name.strip() for name in names)
        for each, name in zip(new, names, strict=True):
            each.fields = {**each.described.fields, **self._given}
            if other := self._cards.get(name.strip()):
                at = shown_uri(other.checkpoint or other.source or "")
                each.fail(_misnamed(name, f"{_TAKEN}, found {name!r}: the card of {at} has that name", each))
            elif counts[name.strip()] > 1:
                count = counts[name.strip()]
                each.fail(_misnamed(name, f"{_TAKEN}, found {name!r}: {count} checkpoints would have it", each))
            else:
                try:
                    each.name = card_entry(name, {}).name
                except CardFileError as error:
                    each.fail(_misnamed(name, error.problems[0], each))

    def _write_new(self, new: Sequence[_Found], owners: Mapping[str, Sequence[str]]) -> None:
        """Write cards for checkpoints; then those of adapters, which are based on the card of their model."""
        sound = {uri: [name for name in names if self._cards[name].status != "broken"] for uri, names in owners.items()}
        cards = {uri: names[0] for uri, names in sound.items() if names}
        for each in sorted(new, key=lambda each: each.described.adapter_of is not None):
            if each.name is None or each.error is not None:
                continue
            base = next((cards[uri] for uri in each.described.bases() if uri in cards), None)
            self._write_card(each, each.name, {**({} if base is None else {"base": base}), **each.fields})
            if each.error is None:
                cards[each.described.uri] = each.name

    def _write_card(self, each: _Found, name: str, fields: Mapping[str, object]) -> None:
        each.fields, each.inherited = fields, self._fields_shown(fields.get("base"))
        try:
            each.described.require_family(fields)
            each.entries.append(card_entry(name, fields))
        except (AssetCardError, NotSupportedError) as error:
            each.fail(error)

    # --- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> tuple[AddedCard, ...]:
        """Write everything in a few transactions, and return the results."""
        found = [each for each in self._found.values() if isinstance(each, _Found)]
        adapters = [
            file.parent
            for each in found
            if each.described.adapter_of is not None and each.name is not None and each.error is None
            if (file := uri_path(each.described.uri)) is not None
        ]
        artifacts = self._describer.artifacts
        if (artifacts or adapters) and not self._dry_run:
            # An adapter may have been listed as one without a card.
            record_artifacts(self._store.database, artifacts, searched=adapters)
        for start in range(0, 0 if self._dry_run else len(found), _BATCH):
            batch = found[start : start + _BATCH]
            entries = [entry for each in batch for entry in each.entries]
            contents = [each.contents for each in batch if each.contents is not None]
            if entries or contents:
                record_additions(self._store.database, entries, contents)

        return tuple(each.result() if isinstance(each, _Found) else each for each in self._found.values())


def _cards_of_state_dicts(store: AssetStore) -> Mapping[str, list[tuple[str, str]]]:
    """Return the cards that state a state dict in a file, each with its state dict, by the URI of the file."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in store.names_stating("state_dict"):
        with suppress(AssetCardError):  # a broken card, which `lading list` shows
            card = store.maybe_retrieve_card(name)
            ref = None if card is None or card.has_field("checkpoint_path") else checkpoint_ref(card)
            if ref is not None and ref.path is not None:
                found.setdefault(ref.uri, []).append((name, ref.path))

    return found


_TAKEN = "expected a name that no other checkpoint has"


def _misnamed(name: str, problem: str, each: _Found) -> AssetCardError:
    return AssetCardError(name, f"{each.described.shown}: {problem}. Use another rule for names, `--name-from`.")


def _gone(model: ModelSummary, path: Path) -> AddedCard:
    return AddedCard(
        name=model.name,
        status="gone",
        checkpoint=str(path),
        family=model.family,
        arch=model.arch,
        license=model.license,
        bytes=model.bytes,
        dtypes=model.dtypes,
        problem=f"nothing is at {path} any more. If it moved, run `lading relocate {path} NEW`; `lading remove-card "
        f"{model.name}` removes the card.",
    )


def _failed(where: str, error: LadingError | OSError) -> AddedCard:
    return AddedCard(name=None, status=_status_of(error), checkpoint=where, problem=_line(error, where), error=error)


def _status_of(error: LadingError | OSError) -> Status:
    return "skipped" if isinstance(error, NotSupportedError) else "failed"


def _line(error: LadingError | OSError, where: str) -> str:
    """Return one line that says what is wrong, and where."""
    line = first_line(error)

    return line if where in line else f"{where}: {line}"
