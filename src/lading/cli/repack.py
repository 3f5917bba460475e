"""`lading repack`."""

from __future__ import annotations

import click

from lading.cli.command import command
from lading.cli.complete import complete_model
from lading.cli.names import unknown_model
from lading.cli.output import counted, human_bytes, printable, write_json


@command("repack")
@click.argument("name", shell_complete=complete_model)
@click.option("--tp", type=click.IntRange(min=2, max=1_000_000), required=True, help="Ranks of tensor parallelism.")
@click.option("--no-progress", is_flag=True, help="Show no bar.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def repack(name: str, tp: int, no_progress: bool, as_json: bool) -> None:
    """Cut beforehand what ranks read by columns.

    The file is a sidecar in lading's cache; the checkpoint stays as it is. Loads over gangs of this size use it, so
    that each rank reads no more than it keeps. `lading rm` removes both.

    For example: lading repack qwen3_0.6b --tp 4
    """
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    if store.maybe_retrieve_card(name) is None:
        raise unknown_model(name, store)

    from lading.operations.repack import repack_model

    report = repack_model(name, tp=tp, progress=not no_progress, store=store)
    if as_json:
        write_json(
            {
                "name": report.name,
                "tp": report.tp,
                "path": report.path,
                "tensors": report.tensors,
                "bytes": report.bytes,
                "checkpoint_bytes": report.checkpoint_bytes,
                "written": report.written,
            }
        )
        return

    done = "cut" if report.written else "already cut"
    click.echo(
        f"{printable(report.name)}: {counted(report.tensors, 'tensor')} {done} for tp={report.tp}, "
        f"{human_bytes(report.bytes)} ({report.share:.0%} of the checkpoint) in {printable(str(report.path))}"
    )
