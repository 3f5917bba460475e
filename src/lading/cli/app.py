"""The `lading` command line: its commands and global options."""

from __future__ import annotations

import click

from lading.cli.command import Program


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"lading {version('lading')}")
        context.exit()


@click.group(
    "lading",
    cls=Program,
    lazy={
        "list": "lading.cli.list:list_models",
        "show": "lading.cli.show:show",
        "path": "lading.cli.path:path",
        "families": "lading.cli.families:families",
        "archs": "lading.cli.families:archs",
        "sql": "lading.cli.sql:sql",
        "load": "lading.cli.load:load",
        "plan": "lading.cli.plan:plan",
        "check": "lading.cli.check:check",
        "diff": "lading.cli.diff:diff",
        "index": "lading.cli.index:index",
        "adopt": "lading.cli.adopt:adopt",
        "rm": "lading.cli.rm:rm",
        "du": "lading.cli.du:du",
        "pull": "lading.cli.pull:pull",
        "verify": "lading.cli.verify:verify",
        "convert": "lading.cli.convert:convert",
        "export": "lading.cli.convert:export",
        "import": "lading.cli.cards:import_",
        "export-cards": "lading.cli.cards:export_cards",
        "db": "lading.cli.db:db",
    },
    aliases={"ls": "list"},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def app() -> None:
    """Load PyTorch models from a hub whose catalog is a SQLite database.

    For example: lading list 'qwen*'
    """
