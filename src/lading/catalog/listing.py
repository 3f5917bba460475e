"""Lists of models, and names near a missing one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    ColumnElement,
    Select,
    SQLColumnExpression,
    TableClause,
    and_,
    column,
    func,
    literal,
    null,
    or_,
    select,
    table,
    union_all,
)
from sqlalchemy.orm import Session

from lading.cards.card import AssetCard, CheckpointRef, checkpoint_ref
from lading.catalog.database.statements import CHUNK, intact
from lading.catalog.memory_cards import MEMORY, names_in_memory
from lading.catalog.records import ModelSummary
from lading.catalog.schema import CARDS, CardRow, FamilyRow
from lading.catalog.search import found
from lading.errors import AssetCardError
from lading.formats.folder import is_there
from lading.formats.manifest import FLOAT_NAMES
from lading.system.entry_points import FAMILIES_GROUP, registered_here
from lading.system.filesystem import path_exists
from lading.system.uris import uri_path

_COLUMNS = tuple(field.name for field in fields(ModelSummary))
_ASSETS = table("assets", *(column(name) for name in _COLUMNS if name != "kind"))
_UNREGISTERED = table(
    "unregistered",
    *(column(name) for name in _COLUMNS if name not in ("family", "arch", "base", "license", "source")),
)

WITHOUT_CARD = ("unregistered", "unloadable")
"""The statuses of what is on this machine without a card."""

Sort = Literal["name", "size", "modified"]
"""The order of a list: by name, the largest first, or the one first whose files on this machine changed last."""

_FEW = 5_000
"""The most names to compare with a mistaken one; if there are more, only those that begin alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFilter:
    """The models to list, and their order, as :meth:`lading.catalog.store.AssetStore.models` describes them."""

    pattern: str | None = None
    include_all: bool = False
    unregistered: bool = False
    family: str | None = None
    status: str | None = None
    search: str | None = None
    local: bool = False
    dtype: str | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    sort: Sort = "name"
    limit: int | None = None


def list_models(
    session: Session, wanted: ModelFilter, overlaid: Mapping[str, Callable[[], AssetCard | None]]
) -> list[ModelSummary]:
    """Return the wanted models, with their status as this machine sees it.

    :param overlaid: for each name on whose chain an overlay lies, a function that returns its card.
    """
    c = (union_all(_all_of(_ASSETS), _all_of(_UNREGISTERED)) if wanted.unregistered else _all_of(_ASSETS)).subquery().c
    size = _size_of(c.bytes, c.parameters)
    base_only = (
        literal(value=False)
        if wanted.include_all
        else _is_base_only(c.name, c.arch, or_(c.checkpoint.is_(None), c.status == "gated"))
    )
    statement = select(*(c[name] for name in _COLUMNS), base_only)
    statement = statement.order_by(*([size.desc().nulls_last()] if wanted.sort == "size" else []), c.name)
    if not wanted.include_all:
        statement = statement.where(or_(c.family.is_not(None), c.problem.is_not(None), c.kind.is_not(None)))
        if len(overlaid) <= CHUNK:
            # An overlay may give a base a checkpoint.
            statement = statement.where(or_(~base_only, c.problem.is_not(None), c.name.in_(overlaid)))
    if wanted.family is not None:
        statement = statement.where(c.family == wanted.family)
    pattern, status = wanted.pattern, wanted.status
    if pattern is not None:
        # Databases differ in their patterns; all of them have prefixes.
        prefix = pattern[: min((i for i, sign in enumerate(pattern) if sign in "*?["), default=len(pattern))]
        statement = statement.where(c.name == pattern if prefix == pattern else _begins(session, c.name, prefix))
    if wanted.search is not None and wanted.search.strip():
        statement = statement.where(found(session.connection(), c.name, wanted.search))
    if status is not None and len(overlaid) <= CHUNK:
        # A model that is ready by the database may not be, a family may be registered in this process only, and an
        # overlay may change anything: the rest is right.
        unknown = {"unknown-family"} if registered_here(FAMILIES_GROUP) else set()
        possible = {status, *unknown, *(() if status == "unknown-family" else ("ready",))}
        statement = statement.where(or_(c.status.in_(possible), c.name.in_(overlaid)))

    if wanted.local and len(overlaid) <= CHUNK:
        statement = statement.where(or_(c.local_path.is_not(None), c.name.in_(overlaid)))
    if wanted.dtype is not None:
        most = FLOAT_NAMES.get(wanted.dtype.lower(), wanted.dtype.upper())
        statement = statement.where(or_(c.dtypes == most, c.dtypes.startswith(f"{most},", autoescape=True)))
    if wanted.min_bytes is not None:
        statement = statement.where(size >= wanted.min_bytes)
    if wanted.max_bytes is not None:
        statement = statement.where(size <= wanted.max_bytes)

    def matching() -> Iterator[ModelSummary]:
        for *row, is_base in session.execute(statement):
            if pattern is None or fnmatchcase(row[0], pattern):
                card = overlaid[row[0]]() if row[0] in overlaid else None
                model = as_seen_here(ModelSummary(**dict(zip(_COLUMNS, row, strict=True))), card)
                if is_base and (model.checkpoint is None or model.status == "gated") and model.problem is None:
                    continue
                if model.status in WITHOUT_CARD and not path_exists(model.local_path or ""):
                    continue  # it is gone, or on another machine
                if wanted.local and _modified_at(model) is None:
                    continue
                if status is None or model.status == status:
                    yield model

    models = sorted(matching(), key=_newest_first) if wanted.sort == "modified" else matching()

    return list(islice(models, wanted.limit))


def _is_base_only(
    name: SQLColumnExpression[Any], arch: SQLColumnExpression[Any], no_weights: ColumnElement[bool]
) -> ColumnElement[bool]:
    """Return the condition that a card only serves as a base: it has no numbers, and no weights that can be fetched."""
    others = CARDS.alias()

    return and_(arch.is_(None), no_weights, select(others.c.id).where(others.c.base == name).exists())


def _size_of(bytes_: ColumnElement[int], parameters: ColumnElement[int]) -> ColumnElement[int]:
    """Return the size of a model in bytes: that of its checkpoint, if it is known, or else of weights in 16 bits."""
    return func.coalesce(bytes_, 2 * parameters)


def _all_of(view: TableClause) -> Select[Any]:
    """Return the query of all rows of a view, with nulls in the columns that it lacks."""
    return select(*(view.c[name] if name in view.c else null().label(name) for name in _COLUMNS))


def _newest_first(model: ModelSummary) -> float:
    modified = _modified_at(model)

    return math.inf if modified is None else -modified


def _modified_at(model: ModelSummary) -> float | None:
    """Return the time at which a model's files on this machine changed last; ``None`` if there are none."""
    if model.local_path is None:
        return None
    path = Path(model.local_path)
    try:
        files = [entry for entry in path.iterdir() if entry.is_file()] if path.is_dir() else [path]
        return max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    except OSError:
        return None


def _begins(session: Session, name: SQLColumnExpression[str], prefix: str) -> ColumnElement[bool]:
    """Return the condition that ``name`` begins with ``prefix``: a range of an index where the database sorts bytes."""
    if session.get_bind().dialect.name != "sqlite":
        return name.startswith(prefix, autoescape=True)

    # The first text after all that begin so. The highest character has no successor, and half of a pair is not text.
    head = prefix.rstrip(chr(sys.maxunicode))
    if not head:
        return name >= prefix
    last = ord(head[-1]) + 1
    behind = head[:-1] + chr(0xE000 if last == 0xD800 else last)

    return and_(name >= prefix, name < behind)


def summary_of(session: Session, card: AssetCard) -> ModelSummary | None:
    """Return the row of one card, as :func:`as_seen_here`.

    For a card that is not in the catalog this is the row of its checkpoint without a card; ``None`` if it has none.
    A card in memory has no row, and neither sizes nor digests.
    """
    row = session.execute(_all_of(_ASSETS).where(_ASSETS.c.name == card.name)).one_or_none()
    if row is None and card.name in names_in_memory():
        return _summary_in_memory(session, card)
    if row is None:
        c = _UNREGISTERED.c
        stated = _all_of(_UNREGISTERED).where(c.checkpoint == checkpoint_ref(card).key).order_by(c.kind).limit(1)
        row = session.execute(stated).one_or_none()

    return None if row is None else as_seen_here(ModelSummary(**dict(zip(_COLUMNS, row, strict=True))), card)


def _summary_in_memory(session: Session, card: AssetCard) -> ModelSummary:
    stated: dict[str, str | None] = {}
    problem = None
    try:
        ref = checkpoint_ref(card)
        for field in ("model_family", "model_arch", "license"):
            stated[field] = None if (found := card.maybe_get_field(field)) is None else found.as_(str)
    except AssetCardError as error:
        ref, problem = CheckpointRef(uri="", gated=True, info_url=None), error.message
    family = stated.get("model_family")
    status = "broken" if problem else None if family is None else "gated" if ref.gated else "ready"
    if status is not None and problem is None and family not in registered_here(FAMILIES_GROUP):
        installed = select(FamilyRow.name).where(FamilyRow.name == family, FamilyRow.entry_point.is_not(None))
        status = status if session.scalar(installed) else "unknown-family"
    empty: dict[str, Any] = dict.fromkeys(_COLUMNS)
    values = {"name": card.name, "family": family, "arch": stated.get("model_arch"), "license": stated.get("license")}
    values |= {"base": card.base.name if card.base else None, "status": status, "checkpoint": ref.uri or None}

    return as_seen_here(ModelSummary(**(empty | values | {"source": MEMORY, "problem": problem})), card)


def as_seen_here(model: ModelSummary, card: AssetCard | None) -> ModelSummary:
    """Return a model's summary with the state of its files and the overlays of this process, which no database sees.

    :param card: the card of the name in this process, if overlays may lie on its chain.
    """
    if model.status == "unknown-family" and model.family in registered_here(FAMILIES_GROUP):
        model = replace(model, status="ready")  # what the rest of this function corrects
    if card is not None and model.status in ("ready", "remote", "gated"):
        try:
            ref = checkpoint_ref(card)
        except AssetCardError as error:
            return replace(model, status="broken", problem=error.message)
        if ref.uri != (model.checkpoint or ""):
            status = "gated" if ref.gated else "ready" if uri_path(ref.uri) else "remote"
            model = replace(model, status=status, checkpoint=ref.uri or None, local_path=None, verified_at=None)

    if model.status != "ready" or (model.local_path is not None and path_exists(model.local_path)):
        return model

    path = uri_path(model.checkpoint or "")
    if path is None:
        status = "remote" if model.checkpoint else "gated"
        return replace(model, status=status, local_path=None, verified_at=None)
    if is_there(path):
        return replace(model, local_path=str(path))

    return replace(
        model,
        status="broken",
        local_path=None,
        verified_at=None,
        problem=f"The checkpoint of the card {model.name!r} is expected at {path}, but nothing is there.",
    )


def near_names(session: Session, name: str, *, models: bool) -> list[str]:
    """Return the names of cards (or only of models) that ``name`` may mean, the nearest first."""
    conditions = [CardRow.env == ""]
    if models:
        no_weights = or_(CardRow.checkpoint_uri.is_(None), CardRow.gated == 1)
        conditions += [CardRow.family.is_not(None), ~_is_base_only(CardRow.name, CardRow.arch, no_weights)]
    statement = select(CardRow.name).where(*conditions).order_by(CardRow.name).limit(_FEW + 1)
    known = session.scalars(statement).all()
    if len(known) > _FEW:
        heads = {"".join(signs) for signs in product(*({sign.lower(), sign.upper()} for sign in name[:2]))}
        alike = or_(*(_begins(session, CardRow.name, head) for head in sorted(heads)))
        known = session.scalars(statement.where(alike)).all()

    # Case and punctuation are the most frequent mistakes: Qwen3-0.6B for qwen3_0.6b.
    by_key: dict[str, list[str]] = {}
    with intact("a name"):
        for other in known:
            by_key.setdefault(_key(other), []).append(other)
    near = get_close_matches(_key(name), by_key, n=3, cutoff=0.6)

    return [other for key in near for other in by_key[key]][:3]


def _key(name: str) -> str:
    # A damaged catalog may return bytes, which raise here.
    return str.casefold(name).translate(str.maketrans("- /", "___"))
