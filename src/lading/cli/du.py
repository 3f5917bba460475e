"""`lading du`."""

from __future__ import annotations

import click

from lading.cli.command import command
from lading.cli.complete import complete_model
from lading.cli.output import Column, Form, listing_options, note, text, write_rows
from lading.cli.selection import has_wildcard
from lading.system.display import counted, human_bytes

_COLUMNS = ("name", "bytes", "kind", "files", "complete", "verified", "path", "checkpoint", "revision")


_TABLE = (
    Column(name="name", keep=True),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="kind"),
    Column(name="files", right=True),
    Column(name="verified", show=lambda verified: "" if verified is None else text(verified)),
    Column(name="path"),
)


@command("du")
@click.argument("pattern", required=False, shell_complete=complete_model)
@click.option("--orphans", is_flag=True, help="Files that this catalog fetched to lading's cache and no card names.")
@listing_options
def du(pattern: str | None, orphans: bool, form: Form) -> None:
    """Show the disk usage of models.

    PATTERN is a name with * and ? as in a shell. Counts the files that the catalog knows.

    For example: lading du 'qwen*'
    """
    if orphans and pattern is not None:
        raise click.UsageError("--orphans have no names that PATTERN could match.", click.get_current_context())

    from lading.catalog.store import get_asset_store
    from lading.operations.disk_usage import disk_usage

    store = get_asset_store()
    usage = disk_usage(pattern, store=store)
    shown = usage.orphans if orphans else usage.holdings
    if pattern is None or shown or has_wildcard(pattern) or "://" in pattern:
        pass
    elif store.maybe_retrieve_card(pattern) is None:
        from lading.checkpoints.names import unknown_model

        raise unknown_model(pattern, store)

    if shown or form is not Form.TABLE:
        rows: list[list[object]] = [[getattr(holding, c) for c in _COLUMNS] for holding in shown]
        if form is Form.TABLE:
            # Files that several models share count once, so the total may be less than the sum.
            total = usage.orphan_bytes if orphans else usage.bytes
            rows.append(["total", total, "", "", None, None, "", None, None])
        write_rows(_COLUMNS, rows, form, table=_TABLE)
    else:
        note("no orphans were found" if orphans else "nothing is on this machine")
    if usage.orphans and not orphans and form is Form.TABLE:
        note(
            f"{counted(len(usage.orphans), 'download')} of {human_bytes(usage.orphan_bytes)} in the cache "
            f"{'belongs' if len(usage.orphans) == 1 else 'belong'} to no card; `lading du --orphans` shows them"
        )
