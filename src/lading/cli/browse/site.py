"""The web site of a catalog: datasette over a read-only connection, and two pages of our own for each model."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sqlite3
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import uvicorn
from datasette import hookimpl
from datasette.app import Datasette
from datasette.database import Database as DatasetteDatabase
from datasette.filters import FilterArguments
from datasette.plugins import pm
from datasette.utils import parse_metadata
from datasette.utils.asgi import NotFound, Request, Response
from markupsafe import Markup

from lading.catalog.database.connection import connect_readonly, readonly_engine
from lading.catalog.database.database import Database
from lading.catalog.search import INDEX, names_found
from lading.catalog.store import AssetStore
from lading.cli.browse.model_page import AXES, MOST_RANKS, model_page, plan_picture
from lading.errors import LadingError
from lading.system.display import human_bytes, human_count
from lading.system.uris import without_secrets

CATALOG = "catalog"
"""The name of the database on the site."""

_FOLDER = Path(__file__).parent

_SIZE = re.compile("[1-9][0-9]{0,5}")

_LISTS_OF_CARDS = ("models", "assets")
"""The views with a row for each card."""


def make_site(store: AssetStore) -> Datasette:
    """Return the site of a catalog, which is a SQLite file, without changing the catalog now or later."""
    database = store.database
    assert database.path is not None
    reader = Database(database.target, readonly_engine(database.path), writable=False, settings=database.settings)
    metadata = parse_metadata((_FOLDER / "metadata.yaml").read_text(encoding="utf-8"))
    pm.register(_Pages(AssetStore(reader), metadata["databases"][CATALOG]))  # the site looks for templates in plugins

    # Where rich is installed, it would write each error to stdout, with the values of all variables.
    pm.get_plugin("datasette.handle_exception").rich = None

    site = Datasette(
        metadata=metadata,
        settings={
            "allow_download": False,
            "default_cache_ttl": 0,  # the catalog is alive
            "sql_time_limit_ms": 900,  # a list that takes longer to count has no count, and a page within a second
            "suggest_facets": False,  # each suggestion is a query over all rows
        },
    )
    site.remove_database("_memory")
    site.add_database(_Catalog(site, str(database.path)), name=CATALOG)

    return site


def serve(site: Datasette, listener: socket.socket) -> None:
    """Serve a site until the process is interrupted."""
    config = uvicorn.Config(site.app(), log_level="warning", lifespan="on", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


class _Catalog(DatasetteDatabase):  # type: ignore[misc]
    """The catalog, in connections that cannot write."""

    def connect(self, write: bool = False) -> sqlite3.Connection:
        connection = connect_readonly(Path(self.path))
        self._all_file_connections.append(connection)

        return connection

    async def table_names(self) -> list[str]:
        return [name for name in await super().table_names() if not name.startswith(INDEX)]

    async def hidden_table_names(self) -> list[str]:
        # The views come first; the tables are a click away.
        return await self.table_names()

    async def fts_table(self, table: str) -> None:
        return None  # `_Pages.filters_from_request` searches as `lading list --search` does


class _Pages:
    """The plugin that adds the pages of a model to datasette."""

    def __init__(self, store: AssetStore, described: Mapping[str, Any]) -> None:
        self.__name__ = __package__  # datasette takes a plugin for a module, and finds the templates by its name
        self._store = store
        self._described = described

    @hookimpl  # type: ignore[untyped-decorator]
    def prepare_connection(self, conn: sqlite3.Connection, database: str) -> None:
        """Hide secrets: those in addresses, and the words that a search finds them by."""
        if database == CATALOG:
            conn.set_authorizer(_authorize)
            conn.text_factory = lambda data: without_secrets(data.decode("utf-8", errors="replace"))

    @hookimpl(trylast=True)  # type: ignore[untyped-decorator]
    def filters_from_request(self, request: Request, database: str, table: str) -> Any:
        """Offer the search of `lading list --search` in the lists of cards."""
        if database != CATALOG or table not in _LISTS_OF_CARDS:
            return None

        async def filters() -> FilterArguments:
            search = (request.args.get("_search") or "").strip()
            context = {"supports_search": True, "search": search}
            if not search:
                return FilterArguments([], extra_context=context)
            names = await asyncio.to_thread(self._names_found, search)

            return FilterArguments(
                ["name IN (SELECT value FROM json_each(:found))"],
                {"found": json.dumps(names)},
                [f"search matches “{search}”"],
                context,
            )

        return filters()

    def _names_found(self, search: str) -> list[str]:
        with self._store.database.read() as connection:
            return names_found(connection, search)

    @hookimpl  # type: ignore[untyped-decorator]
    def extra_template_vars(self, template: str) -> dict[str, object]:
        return dict(self._described) if template == "index.html" else {}

    @hookimpl  # type: ignore[untyped-decorator]
    def render_cell(
        self, value: object, column: str, table: str | None, database: str, datasette: Any
    ) -> Markup | None:
        """Link the names of models to their pages, and write sizes and counts for people."""
        if database != CATALOG or value is None:
            return None
        if column == "model" or (column in ("name", "base") and table in _LISTS_OF_CARDS):
            page = f"{datasette.urls.path('/-/model')}?{urlencode({'name': str(value)})}"
            return Markup('<a href="{}">{}</a>').format(page, value)
        if isinstance(value, int) and column in ("bytes", "parameters"):
            shown = human_bytes(value) if column == "bytes" else human_count(value)
            return Markup('<span title="{:,}">{}</span>').format(value, shown)

        return None

    @hookimpl  # type: ignore[untyped-decorator]
    def forbidden(self) -> Response:
        return Response.text(
            "Open the address that `lading browse` printed. It works once; to get another, start the command again.",
            status=403,
        )

    @hookimpl  # type: ignore[untyped-decorator]
    def register_routes(self) -> list[tuple[str, object]]:
        return [(r"/-/model$", self.model), (r"/-/plan\.svg$", self.plan)]

    async def model(self, datasette: Any, request: Request) -> Response:
        """Return the page of a model."""
        await datasette.ensure_permissions(request.actor, ["view-instance"])
        name = request.args.get("name") or ""
        sharing = self._described["queries"]["sharing"]["sql"]
        try:
            page = await asyncio.to_thread(model_page, name, self._store, sharing)
        except LadingError as error:
            raise NotFound(without_secrets(error.message)) from error

        return Response.html(await datasette.render_template("model.html", page, request=request))

    async def plan(self, datasette: Any, request: Request) -> Response:
        """Return the picture of the plan of a model, or the reason why it has none."""
        await datasette.ensure_permissions(request.actor, ["view-instance"])
        given = {axis: request.args.get(axis) or "1" for axis in AXES}
        sizes = {axis: int(size) for axis, size in given.items() if _SIZE.fullmatch(size)}
        if sizes.keys() != given.keys() or prod(sizes.values()) > MOST_RANKS:
            expected = f"Expected sizes of {', '.join(AXES)} whose product is from 1 to {MOST_RANKS:,}."
            return Response.text(expected, status=400)
        try:
            drawn = await asyncio.to_thread(plan_picture, request.args.get("name") or "", self._store, **sizes)
        except LadingError as error:
            return Response.text(without_secrets(error.message), status=404)

        return Response(drawn, content_type="image/svg+xml; charset=utf-8")


def _authorize(action: int, table: str | None, column: str | None, database: str | None, view: str | None) -> int:
    """Return whether a statement may read a column: not the words of addresses, which are no longer addresses."""
    if action == sqlite3.SQLITE_READ and table is not None:
        if (table, column) == ("cards", "search_text"):
            return sqlite3.SQLITE_IGNORE
        # SQLite names the columns of the index by its settings.
        if table.startswith(INDEX) and table != f"{INDEX}_config":
            return sqlite3.SQLITE_DENY

    return sqlite3.SQLITE_OK
