"""`lading verify`."""

from __future__ import annotations

from pathlib import Path

import click

from lading.cli.command import command, no_progress
from lading.cli.complete import complete_target
from lading.cli.failure import explain
from lading.cli.names import name_or_path
from lading.cli.output import Column, Form, listing_options, note, printable, write_rows
from lading.errors import CatalogError

MISMATCH = 4

_COLUMNS = ("file", "result", "method", "expected", "found", "path", "model")
_COLORS = {"match": "green", "recorded": "green", "repaired": "yellow", "mismatch": "red"}
_TABLE = (
    Column(name="model"),
    Column(name="file", keep=True),
    Column(name="result", color=_COLORS.get),
    Column(name="method"),
    Column(name="path"),
)


@command("verify")
@click.argument("names", metavar="[NAME|PATH...]", nargs=-1, shell_complete=complete_target)
@click.option("--all", "everything", is_flag=True, help="All models whose files are on this machine.")
@click.option("--repair", is_flag=True, help="Fetch damaged files again.")
@no_progress
@listing_options
def verify(names: tuple[str, ...], everything: bool, repair: bool, no_progress: bool, form: Form) -> None:
    """Verify all bytes of files on this machine.

    Compares digests with the published ones, or else with those recorded when all bytes were first read. Exits with 4
    if a file does not match. Reports models that cannot be verified, and continues with the others. A checkpoint at a
    PATH that the catalog does not know yet is recorded.

    For example: lading verify qwen3_0.6b
    """
    from lading.catalog.store import get_asset_store
    from lading.operations.verify import verify_model

    if bool(names) == everything:
        raise click.UsageError("Give names of models, paths of checkpoints, or --all.", click.get_current_context())

    store = get_asset_store()
    targets: list[str | Path]
    if everything:
        targets = [model.name for model in store.models(status="ready")]
    else:  # reports a wrong name before minutes of hashing
        targets = [name_or_path(name, store) for name in names]

    rows: list[tuple[object, ...]] = []
    hints: list[str] = []
    unrecorded = ""
    codes: list[int] = []
    for target in targets:
        try:
            report = verify_model(target, repair=repair, progress=not no_progress, store=store)
        except Exception as error:  # any error of one model, even a bug in its family
            if isinstance(error, CatalogError) or (len(targets) == 1 and not everything):
                raise
            code, message = explain(error)
            codes.append(code)
            hints.append(f"error: {printable(str(target))} could not be verified: {message}")
            continue
        for check in report.checks:
            result: str = check.result
            if result != "mismatch" and check.file in report.repaired:
                result = "repaired"
            elif result == "recorded" and report.unrecorded:
                result = "not recorded"
            rows.append((check.file, result, check.method, check.expected, check.found, check.path, report.name))
        if not report.good:
            codes.append(MISMATCH)
            hints.append(f"{printable(str(target))} does not match its digests. {report.hint}")
        unrecorded = unrecorded or report.unrecorded

    write_rows(_COLUMNS, rows, form, table=_TABLE)
    for hint in hints:
        note(hint)
    if unrecorded:
        note(f"none of this was recorded, as {printable(unrecorded)}")
    if codes:
        click.get_current_context().exit(max(codes))
