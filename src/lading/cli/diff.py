"""`lading diff`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from lading.cli.command import command
from lading.cli.complete import complete_comparable
from lading.cli.options import no_progress, no_restrict
from lading.cli.output import Column, Form, listing_options, note, printable, text, write_rows
from lading.system.display import counted, runs_of

if TYPE_CHECKING:
    from lading.operations.diff import DiffReport
    from lading.transfer.compare import ValueDifference


@command("diff")
@click.argument("a", shell_complete=complete_comparable)
@click.argument("b", shell_complete=complete_comparable)
@click.option("--values", is_flag=True, help="Read both checkpoints, and measure how far their values are apart.")
@click.option("--by-layer", is_flag=True, help="List the layers that differ, not the tensors.")
@no_restrict
@no_progress
@listing_options
def diff(a: str, b: str, values: bool, by_layer: bool, no_restrict: bool, no_progress: bool, form: Form) -> None:
    """List the differences of checkpoints or architectures.

    A and B are names of cards, paths of checkpoints, or architectures as FAMILY/ARCH. Compares the names, shapes and
    dtypes of tensors, and their values if the digests of both are known; reports which values were not compared. With
    --values, reads both, and reports the largest differences and the share of changed elements. Of architectures, also
    compares the fields of the configurations.

    For example: lading diff qwen3_0.6b qwen3_0.6b_base
    """
    from lading.operations.diff import diff_models

    report = diff_models(a, b, values=values, restrict=not no_restrict, progress=not no_progress)

    rows = _layer_rows(report, form) if by_layer else _tensor_rows(report, form)
    if not values:
        rows = [row[: -len(_MEASURES)] for row in rows]
    columns, table = (_LAYER_COLUMNS, _LAYER_TABLE) if by_layer else (_COLUMNS, _TABLE)
    write_rows(
        (*columns, *_MEASURES) if values else columns,
        rows,
        form,
        table=(*table, *_MEASURES_TABLE) if values else table,
    )
    if form is Form.TABLE or report.not_compared:
        note(_summary(report, hint_at_values=not values))
    if form is Form.TABLE and (layers := _layers_that_differ(report)):
        note(layers)


NOT_COMPARED = "not compared"
"""The change that programs see for a tensor whose values were not compared."""

_FOR_PROGRAMS = (Form.JSON, Form.LINES, Form.CSV)
"""The forms that list what was not compared: a program could take an empty list for a proof that all is equal."""

_MOST_RUNS = 6
"""The most runs of layers to name one by one."""


def _tensor_rows(report: DiffReport, form: Form) -> list[tuple[object, ...]]:
    rows: list[tuple[str, str, object, object]] = [(c.name, c.kind, c.a, c.b) for c in report.changes]
    if form is Form.TABLE:
        rows = _with_prefixes(rows, report.prefix_changes())
    if form in _FOR_PROGRAMS:
        rows += [(name, NOT_COMPARED, None, None) for name in report.not_compared]

    return [(*row, *_measured([report.values[row[0]]] if row[0] in report.values else [])) for row in rows]


def _with_prefixes(
    rows: list[tuple[str, str, object, object]], prefixes: Mapping[tuple[str, str], Sequence[str]]
) -> list[tuple[str, str, object, object]]:
    """Return the rows with one for all tensors that are renamed by the same change of their prefix."""
    first, others = {}, set[str]()
    for (old, new), names in prefixes.items():
        first[names[0]] = (f"{old}* ({counted(len(names), 'tensor')})", "renamed", f"{old}*", f"{new}*")
        others.update(names[1:])

    return [first.get(row[0], row) for row in rows if row[0] not in others]


def _layer_rows(report: DiffReport, form: Form) -> list[tuple[object, ...]]:
    return [
        (layer.name or None, layer.differ, layer.tensors, layer.not_compared, *_measured(layer.values))
        for layer in report.layers()
        if layer.differ or (layer.not_compared and form in _FOR_PROGRAMS)
    ]


def _measured(differences: Sequence[ValueDifference]) -> tuple[object, ...]:
    """Return the values of the columns :data:`_MEASURES`."""
    if not differences:
        return (None,) * len(_MEASURES)

    most = max(each.max_abs for each in differences), max(each.max_rel for each in differences)
    elements = sum(each.elements for each in differences)
    changed = sum(each.changed for each in differences) / elements if elements else 0.0
    dtypes = dict.fromkeys(each.compared_as for each in differences)

    # JSON has no number for infinity, and `null` would look as if nothing were known.
    return (*(x if math.isfinite(x) else "inf" for x in most), changed, ", ".join(dtypes))


def _layers_that_differ(report: DiffReport) -> str:
    """Return where the tensors that differ are; empty if none does."""
    layers = report.layers()
    differ = sum(layer.differ for layer in layers)
    if not differ:
        return ""

    stacks: dict[str, list[int]] = {}
    of_stack: dict[str, list[int]] = {}
    for layer in layers:
        stack, _, number = layer.name.rpartition(".")
        if layer.name:
            of_stack.setdefault(stack, []).append(int(number))
            if layer.differ:
                stacks.setdefault(stack, []).append(int(number))

    tensors = f"{differ} of {counted(len(report.names), 'tensor')}"
    differing = f"{'are known to ' if report.unknown else ''}differ"
    inside = sum(layer.differ for layer in layers if layer.name)
    if not inside:
        return f"{tensors} {differing}, none of them in a layer"

    places = " and ".join(
        f"{_stack(stack, len(numbers), alone=len(of_stack) == 1)} {_numbers(numbers, of_stack[stack])}"
        for stack, numbers in stacks.items()
    )
    if inside == differ:
        return f"{tensors} {differing}, all in {places}"

    return f"{tensors} {differing}: {inside} in {places}, {differ - inside} in no layer"


def _stack(name: str, layers: int, *, alone: bool) -> str:
    if name and not alone:
        return printable(name)

    return "layer" if layers == 1 else "layers"


def _numbers(numbers: Sequence[int], of: Sequence[int]) -> str:
    """Return numbers as ``3, 5 and 20 to 27``.

    :param of: all that there are.
    """
    runs = runs_of(sorted(numbers))
    if len(runs) > _MOST_RUNS:
        return f"{runs[0][0]} to {runs[-1][1]} ({len(numbers)} of {len(of)})"

    shown = [str(first) if first == last else f"{first} to {last}" for first, last in runs]

    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)


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

    same = f"{counted(report.same, 'tensor')} of the same shape and dtype"

    return f"{differences}; {same} ({values}){hint}" if report.same else f"{differences}; {same}"


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

_COLUMNS = ("name", "change", "a", "b")
_TABLE = (
    Column(name="name", keep=True),
    Column(name="change"),
    Column(name="a", show=_show),
    Column(name="b", show=_show),
)

_LAYER_COLUMNS = ("layer", "differ", "tensors", "not_compared")
_LAYER_TABLE = (
    Column(name="layer", keep=True),
    Column(name="differ", right=True),
    Column(name="tensors", right=True),
    Column(name="not_compared", heading="not compared", right=True),
)

_MEASURES_TABLE = (
    Column(name="max_abs", heading="max abs", show=_show_number, right=True),
    Column(name="max_rel", heading="max rel", show=_show_number, right=True),
    Column(name="changed", show=_show_share, right=True),
    Column(name="compared_as", heading="compared as"),
)
