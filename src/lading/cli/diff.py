"""`lading diff`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lading.cli.command import command, no_progress, no_restrict
from lading.cli.complete import complete_comparable
from lading.cli.names import name_or_path
from lading.cli.output import Column, Form, listing_options, note, text, write_rows
from lading.system.display import counted
from lading.system.filesystem import path_exists

if TYPE_CHECKING:
    from lading.catalog.store import AssetStore
    from lading.operations.diff import DiffReport
    from lading.transfer.compare import ValueDifference


@command("diff")
@click.argument("a", shell_complete=complete_comparable)
@click.argument("b", shell_complete=complete_comparable)
@click.option("--values", is_flag=True, help="Read both checkpoints, and measure how far their values are apart.")
@no_restrict
@no_progress
@listing_options
def diff(a: str, b: str, values: bool, no_restrict: bool, no_progress: bool, form: Form) -> None:
    """List the differences of checkpoints or architectures.

    A and B are names of cards, paths of checkpoints, or architectures as FAMILY/ARCH. Compares the names, shapes and
    dtypes of tensors, and their values if the digests of both are known; reports which values were not compared. With
    --values, reads both, and reports the largest differences and the share of changed elements. Of architectures, also
    compares the fields of the configurations.

    For example: lading diff qwen3_0.6b qwen3_0.6b_base
    """
    from lading.catalog.store import get_asset_store

    store = get_asset_store()
    targets = [_target(each, store) for each in (a, b)]

    from lading.operations.diff import diff_models

    report = diff_models(*targets, values=values, restrict=not no_restrict, progress=not no_progress, store=store)

    rows: list[tuple[object, ...]] = [(change.name, change.kind, change.a, change.b) for change in report.changes]
    if form in (Form.JSON, Form.LINES, Form.CSV):
        # Otherwise, a program could take an empty list for a proof that all values are equal.
        rows += [(name, NOT_COMPARED, None, None) for name in report.not_compared]
    if values:
        rows = [(*row, *_measured(report.values.get(str(row[0])))) for row in rows]
    if rows or form is not Form.TABLE:
        columns = ("name", "change", "a", "b", *(_MEASURES if values else ()))
        write_rows(columns, rows, form, table=_VALUES_TABLE if values else _TABLE)
    if form is Form.TABLE or report.not_compared:
        note(_summary(report, hint_at_values=not values))


NOT_COMPARED = "not compared"
"""The change that programs see for a tensor whose values were not compared."""


def _target(target: str, store: AssetStore) -> str | Path:
    """Return ``target`` if it is an architecture as FAMILY/ARCH; else resolve it as other commands do."""
    family, slash, arch = target.partition("/")
    if slash and store.maybe_retrieve_card(target) is None:
        known = store.maybe_architecture(arch, family) is not None
        if known or (not path_exists(target) and family in {f.name for f in store.families()}):
            return target

    return name_or_path(target, store)


def _measured(difference: ValueDifference | None) -> tuple[object, ...]:
    """Return the values of the columns :data:`_MEASURES`."""
    if difference is None:
        return (None,) * len(_MEASURES)

    # JSON has no number for infinity, and `null` would look as if nothing were known.
    largest = (x if math.isfinite(x) else "inf" for x in (difference.max_abs, difference.max_rel))

    return (*largest, difference.changed_share, difference.compared_as)


def _summary(report: DiffReport, *, hint_at_values: bool) -> str:
    differences = counted(len(report.changes), "difference") if report.changes else "no difference"
    other = sum(change.kind == "values" for change in report.changes)
    if report.unknown and not report.changes:
        differences += " in names, shapes and dtypes"
    if not report.equal and not other:
        values = "values not compared"
    else:
        values = f"values: {report.equal} equal, {other} different, {report.unknown} not compared"
    hint = "; `lading verify NAME` records the digests that values are compared by" if report.unknown else ""
    if hint and hint_at_values:
        hint += ", `--values` reads them"

    return f"{differences}; {counted(report.same, 'tensor')} of the same shape and dtype ({values}){hint}"


def _show(value: object) -> str:
    match value:
        case {"dtype": dtype, "shape": shape}:
            return text(shape) if dtype is None else f"{dtype} {text(shape)}"
        case _:
            return text(value)


def _show_number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else text(value)


def _show_share(share: float | None) -> str:
    if not share:
        return text(None if share is None else "0%")

    # Almost all must not look like all, nor almost none like none.
    return "100%" if share == 1 else f"{min(max(100 * share, 0.01), 99.9):.3g}%"


_MEASURES = ("max_abs", "max_rel", "changed", "compared_as")
"""The columns of values that were read."""

_TABLE = (
    Column(name="name", keep=True),
    Column(name="change"),
    Column(name="a", show=_show),
    Column(name="b", show=_show),
)

_VALUES_TABLE = (
    *_TABLE,
    Column(name="max_abs", heading="max abs", show=_show_number, right=True),
    Column(name="max_rel", heading="max rel", show=_show_number, right=True),
    Column(name="changed", show=_show_share, right=True),
    Column(name="compared_as", heading="compared as"),
)
