"""`lading check`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.failure import MISMATCH
from lading.cli.options import no_restrict
from lading.cli.output import Column, Form, listing_options, printable, write_objects, write_pairs
from lading.cli.selection import Selection, select_models
from lading.system.display import human_bytes, human_count, some

if TYPE_CHECKING:
    from lading.cards.card import AssetCard
    from lading.models.fit import CheckReport


_TABLE = (
    Column(name="name", keep=True),
    Column(name="fits", color={True: "green", False: "red"}.get),
    Column(name="family"),
    Column(name="parameters", show=human_count, right=True),
    Column(name="bytes", heading="size", show=human_bytes, right=True),
    Column(name="problems", show=lambda problems: some(problems, most=1)),
)


@command("check")
@select_models("NAME|PATH|URI", complete=complete_target)
@no_restrict
@listing_options
def check(selection: Selection, no_restrict: bool, form: Form) -> None:
    """Check that checkpoints fit their models.

    Compares the names, shapes and dtypes of the tensors with those that the architecture needs; reads no tensor. The
    model is that of the card NAME, or of the Hugging Face style folder at PATH. NAME may be a pattern with * and ? as
    in a shell.

    For example: lading check qwen3_0.6b
    """
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    objects: list[dict[str, object]] = []

    def check_one(name: str, target: AssetCard | Path) -> int:
        from lading.operations.check import check_model  # may import torch, which takes a second

        report = check_model(target, restrict=not no_restrict, store=store)
        objects.append({"name": name, "fits": report.fits, **asdict(report)})
        if form is Form.TABLE and not selection.several:
            _write_text(report)

        return 0 if report.fits else MISMATCH

    selection.each_model(check_one, store)

    if form is not Form.TABLE or selection.several:
        write_objects(objects, form, table=_TABLE, single=not selection.several)
    selection.finish()


def _write_text(report: CheckReport) -> None:
    if report.fits:
        click.echo("ok")
        write_pairs(_summary(report))
    for problem in report.problems:
        click.echo(printable(problem))


def _summary(report: CheckReport) -> dict[str, object]:
    return {
        "family": report.family,
        "parameters": human_count(report.parameters),
        "size": human_bytes(report.bytes),
        "tensors": f"{report.matched} of {report.tensors} are needed",
        **({"tied": some(report.tied)} if report.tied else {}),
        **({"dropped": some(report.dropped)} if report.dropped else {}),
        **({"initialized": some(report.drawn)} if report.drawn else {}),
        **({"contradicts": "; ".join(report.contradictions)} if report.contradictions else {}),
    }
