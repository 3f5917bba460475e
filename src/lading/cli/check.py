"""`lading check`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lading.cli.command import command, no_restrict, one_object
from lading.cli.complete import complete_target
from lading.cli.describe import some
from lading.cli.names import name_or_path
from lading.cli.output import printable, write_json, write_pairs
from lading.system.display import human_bytes, human_count

if TYPE_CHECKING:
    from lading.models.fit import CheckReport

MISMATCH = 4


@command("check")
@click.argument("target", metavar="NAME|PATH", shell_complete=complete_target)
@no_restrict
@one_object
def check(target: str, no_restrict: bool, as_json: bool) -> None:
    """Check that a checkpoint fits its model.

    Compares the names, shapes and dtypes of the tensors with those that the architecture needs; reads no tensor. The
    model is that of the card NAME, or of the Hugging Face style folder at PATH.

    For example: lading check qwen3_0.6b
    """
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    # Reports an unknown name before the import of torch, which takes a second.
    model = name_or_path(target, store)

    from lading.operations.check import check_model

    report = check_model(model, restrict=not no_restrict, store=store)

    if as_json:
        write_json({"name": target, "fits": report.fits, **asdict(report)})
    elif report.fits:
        click.echo("ok")
        write_pairs(_summary(report))
    else:
        for problem in report.problems:
            click.echo(printable(problem))

    if not report.fits:
        click.get_current_context().exit(MISMATCH)


def _summary(report: CheckReport) -> dict[str, object]:
    return {
        "family": report.family,
        "parameters": human_count(report.parameters),
        "size": human_bytes(report.bytes),
        "tensors": f"{report.matched} of {report.tensors} are needed",
        **({"tied": some(report.tied)} if report.tied else {}),
        **({"dropped": some(report.dropped)} if report.dropped else {}),
        **({"initialized": some(report.drawn)} if report.drawn else {}),
    }
