"""What the command line does with the catalog, for Python: over the default store unless another one is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lading.catalog import import_cards as ingest
from lading.catalog import query as reading
from lading.catalog.query import QueryResult
from lading.catalog.records import ImportReport
from lading.catalog.store import AssetStore, get_asset_store

__all__ = ["import_cards", "query"]


def import_cards(
    *paths: str | Path,
    replace: bool = False,
    keep_going: bool = False,
    dry_run: bool = False,
    store: AssetStore | None = None,
) -> ImportReport:
    """Import cards and architectures from files and folders, in one transaction.

    :param replace: take the place of cards that came from another source.
    :param keep_going: import the good cards of files that also hold bad ones.
    :param dry_run: only say what would change.

    :raises CardFileError: with all problems of all files; nothing was imported.
    :raises FileNotFoundError: a path that is not there.
    """
    database = (store or get_asset_store()).database

    return ingest.import_files(database, ingest.collect(paths), replace=replace, keep_going=keep_going, dry_run=dry_run)


def query(
    sql: str,
    parameters: Mapping[str, object] | None = None,
    *,
    deadline_s: float = 30.0,
    limit: int | None = None,
    store: AssetStore | None = None,
) -> QueryResult:
    """The rows of a query that only reads.

    :param parameters: values of ``:name`` placeholders.
    :param deadline_s: seconds.
    :param limit: of rows; further ones are left out, and the result says so.

    :raises PolicyError: it does more than read.
    :raises QueryError: the database does not understand it.
    :raises CatalogError: the deadline passed.
    """
    return reading.query((store or get_asset_store()).database, sql, parameters, deadline_s=deadline_s, limit=limit)
