"""`lading verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.failure import MISMATCH
from lading.cli.options import no_progress
from lading.cli.output import Column, Form, listing_options, note, printable, write_rows
from lading.cli.selection import Selection, select_models

if TYPE_CHECKING:
    from lading.cards.card import AssetCard
    from lading.operations.verify import VerifyReport

_COLUMNS = ("file", "result", "method", "expected", "found", "path", "model")
_COLORS = {"match": "green", "recorded": "green", "repaired": "yellow", "mismatch": "red"}
_TABLE = (
    Column(name="model"),
    Column(name="file", keep=True),
    Column(name="result", color=_COLORS.get),
    Column(name="method"),
    Column(name="path"),
)


def _origin(report: VerifyReport) -> str:
    """Return which digests the files do not match."""
    if not report.published or not report.different:
        return "its digests"
    more = f" and {len(report.different) - 3} more" if report.different[3:] else ""

    return printable(f"the digests of {', '.join(report.different[:3])}{more} that {report.published} publishes")


@command("verify")
@select_models("NAME|PATH|URI", complete=complete_target, here=True)
@click.option("--repair", is_flag=True, help="Fetch damaged files again.")
@no_progress
@listing_options
def verify(selection: Selection, repair: bool, no_progress: bool, form: Form) -> None:
    """Verify all bytes of files on this machine.

    Compares digests with the published ones, or else with those recorded when all bytes were first read. Exits with 4
    if a file does not match. NAME may be a pattern with * and ? as in a shell. A checkpoint at a PATH that the catalog
    does not know yet is recorded.

    For example: lading verify qwen3_0.6b
    """
    from lading.catalog.store import get_asset_store
    from lading.operations.verify import verify_model

    store = get_asset_store()
    rows: list[tuple[object, ...]] = []
    hints: list[str] = []
    unrecorded: dict[str, None] = {}

    def verify_one(name: str, target: AssetCard | Path) -> int:
        report = verify_model(target, repair=repair, progress=not no_progress, store=store)
        for check in report.checks:
            result: str = check.result
            if result != "mismatch" and check.file in report.repaired:
                result = "repaired"
            elif result == "recorded" and report.unrecorded:
                result = "not recorded"
            rows.append((check.file, result, check.method, check.expected, check.found, check.path, report.name))
        if report.unrecorded:
            unrecorded[f"none of this was recorded, as {printable(report.unrecorded)}"] = None
        if not report.good:
            hints.append(f"{printable(name)} does not match {_origin(report)}. {report.hint}")

        return 0 if report.good else MISMATCH

    selection.each_model(verify_one, store, ask=False)

    write_rows(_COLUMNS, rows, form, table=_TABLE)
    for hint in (*hints, *unrecorded):
        note(hint)
    selection.finish()
