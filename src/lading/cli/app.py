"""The `lading` command line: its commands and global options."""

from __future__ import annotations

import click

from lading.cli.command import Program


def _version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from lading.system.version import __version__

        click.echo(f"lading {__version__}")
        context.exit()


@click.group(
    "lading",
    cls=Program,
    sections={
        "Ask": {
            "list": "lading.cli.list:list_models",
            "show": "lading.cli.show:show",
            "path": "lading.cli.path:path",
            "families": "lading.cli.families:families",
            "archs": "lading.cli.families:archs",
            "sql": "lading.cli.sql:sql",
            "browse": "lading.cli.browse:browse",
            "check": "lading.cli.check:check",
            "diff": "lading.cli.diff:diff",
            "plan": "lading.cli.plan:plan",
        },
        "Load": {
            "load": "lading.cli.load:load",
            "index": "lading.cli.index:index",
            "pull": "lading.cli.pull:pull",
            "verify": "lading.cli.verify:verify",
            "digests": "lading.cli.digests:digests",
        },
        "On this machine": {
            "env": "lading.cli.env:env",
            "adopt": "lading.cli.adopt:adopt",
            "du": "lading.cli.du:du",
            "rm": "lading.cli.rm:rm",
        },
        "Write": {
            "convert": "lading.cli.convert:convert",
            "export": "lading.cli.convert:export",
        },
        "Cards": {
            "add": "lading.cli.add:add",
            "import": "lading.cli.cards:import_",
            "export-cards": "lading.cli.cards:export_cards",
            "rename": "lading.cli.edit:rename",
            "relocate": "lading.cli.edit:relocate",
            "remove-card": "lading.cli.edit:remove_card",
        },
        "Database": {
            "db": "lading.cli.db:db",
        },
    },
    # What the users of hf, ollama and docker type.
    aliases={"ls": "list", "ps": "list", "download": "pull"},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
def app() -> None:
    """Load PyTorch models from a hub whose catalog is a SQLite database.

    For example: lading list 'qwen*'
    """
