"""`lading browse`."""

from __future__ import annotations

import socket
from importlib.metadata import PackageNotFoundError, version

import click

from lading.cli.command import command
from lading.cli.output import note
from lading.errors import NotSupportedError
from lading.system.version import DISTRIBUTION

HOST = "127.0.0.1"
"""The only address of the server: other machines cannot connect to it."""


@command("browse")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8001,
    show_default=True,
    help="The port of the server; 0: any that is free.",
)
def browse(port: int) -> None:
    """Show the catalog in a web browser, read-only.

    It prints an address that logs you in, once; others on this machine see nothing. The pages are those of datasette,
    with a page for each model. Ctrl-C ends the server. It needs a catalog in a SQLite file, and datasette:
    pip install 'lading-hub[browse]'

    For example: lading browse --port 0
    """
    _require_datasette()
    _require_sqlite()

    from lading.catalog.store import get_asset_store

    with _listen(port) as listener:
        from lading.cli.browse.site import make_site, serve  # imports datasette, in a second

        site = make_site(get_asset_store())
        port = listener.getsockname()[1]
        click.echo(f"http://{HOST}:{port}/-/auth-token?token={site._root_token}")
        note("serving until Ctrl-C; the address works once, from then on the browser is logged in.")
        serve(site, listener)


def _require_datasette() -> None:
    """Require a datasette with the interface that the site uses.

    :raises NotSupportedError: it is not installed, or another version is.
    """
    try:
        found = f"version {version('datasette')} is installed"
        suits = found.startswith("version 0.")
    except PackageNotFoundError:
        found, suits = "it is not installed", False
    if not suits:
        raise NotSupportedError(
            f"`lading browse` needs datasette 0.65, but {found}. To install it: `pip install '{DISTRIBUTION}[browse]'`."
        )


def _require_sqlite() -> None:
    """Require a catalog in a SQLite file, before any server is asked for another one.

    :raises NotSupportedError: the catalog is on a server, or in memory.
    """
    from lading.catalog.database.target import Target
    from lading.system.settings import Settings

    target = Target.from_url(Settings.from_environment().database_url)
    if target.path is None:
        hint = (
            "Set LADING_DATABASE_URL to a file."
            if target.is_sqlite
            else "Ask it with `lading sql`, or with a client of that server, such as psql or pgAdmin."
        )
        raise NotSupportedError(f"`lading browse` expects a catalog in a SQLite file, but found {target}. {hint}")


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise OSError(
            error.errno, f"Port {port} of {HOST} cannot be used ({error.strerror}). Choose another: `--port 0`"
        ) from error
