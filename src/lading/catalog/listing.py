"""Lists of models, and names near a name that nobody has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path

from sqlalchemy import Connection, column, func, or_, select, table

from lading.card import uri_path
from lading.catalog.records import ModelSummary
from lading.catalog.schema import CardRow

_COLUMNS = tuple(field.name for field in fields(ModelSummary))
_ASSETS = table("assets", *(column(name) for name in _COLUMNS))

_FEW = 5_000
"""Names that are compared with a mistaken one; where there are more, only those that begin alike are."""


def list_models(
    connection: Connection,
    pattern: str | None,
    *,
    include_all: bool,
    family: str | None,
    status: str | None,
    limit: int | None,
) -> list[ModelSummary]:
    """The models whose name matches a shell-style pattern, with their status as this machine sees it."""
    c = _ASSETS.c
    statement = select(*(c[name] for name in _COLUMNS)).order_by(c.name)
    if not include_all:
        statement = statement.where(or_(c.family.is_not(None), c.problem.is_not(None)))
    if family is not None:
        statement = statement.where(c.family == family)
    if pattern is not None:
        # Databases differ in their patterns; what all of them have is a prefix.
        prefix = pattern[: min((i for i, sign in enumerate(pattern) if sign in "*?["), default=len(pattern))]
        statement = statement.where(c.name.startswith(prefix, autoescape=True))

    def matching() -> Iterator[ModelSummary]:
        for row in connection.execute(statement):
            if pattern is None or fnmatchcase(row[0], pattern):
                model = _as_seen_here(ModelSummary(**dict(zip(_COLUMNS, row, strict=True))))
                if status is None or model.status == status:
                    yield model

    return list(islice(matching(), limit))


def _as_seen_here(model: ModelSummary) -> ModelSummary:
    """The database cannot look at files: a copy may have gone, or be another machine's."""
    if model.status != "ready" or (model.local_path is not None and Path(model.local_path).exists()):
        return model

    path = uri_path(model.checkpoint or "")
    if path is None:
        return replace(model, status="remote", local_path=None, verified_at=None)
    if path.exists():
        return replace(model, local_path=str(path))

    return replace(
        model,
        status="broken",
        local_path=None,
        verified_at=None,
        problem=f"The checkpoint of the card {model.name!r} is {path}, where nothing is.",
    )


def near_names(connection: Connection, name: str, *, models: bool) -> list[str]:
    """Names of cards (or only of models) that ``name`` may have been meant to be, the nearest first."""
    conditions = [CardRow.env == ""]
    if models:
        conditions.append(CardRow.family.is_not(None))
    if (connection.scalar(select(func.count(CardRow.id)).where(*conditions)) or 0) > _FEW:
        conditions.append(CardRow.name.istartswith(name[:2], autoescape=True))
    known = connection.scalars(select(CardRow.name).where(*conditions).order_by(CardRow.name).limit(_FEW)).all()

    # Case and signs are what is mistaken most often: Qwen3-0.6B for qwen3_0.6b.
    by_key: dict[str, list[str]] = {}
    for other in known:
        by_key.setdefault(_key(other), []).append(other)
    near = get_close_matches(_key(name), by_key, n=3, cutoff=0.6)

    return [other for key in near for other in by_key[key]][:3]


def _key(name: str) -> str:
    return name.casefold().translate(str.maketrans("- /", "___"))
