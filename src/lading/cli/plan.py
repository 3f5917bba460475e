"""`lading plan`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.failure import MISMATCH
from lading.cli.options import DTYPES, GivenPath, Size, no_restrict
from lading.cli.output import Column, Form, listing_options, note, text, write_rows
from lading.system.display import counted, human_bytes

if TYPE_CHECKING:
    from lading.operations.plan import LoadPlan

_AXIS = click.IntRange(min=1, max=1_000_000)


@command("plan")
@click.argument("target", metavar="NAME|PATH|URI", shell_complete=complete_target)
@click.option("--tp", type=_AXIS, default=1, help="Ranks of tensor parallelism.")
@click.option("--ep", type=_AXIS, default=1, help="Ranks of expert parallelism.")
@click.option("--sdp", type=_AXIS, default=1, help="Ranks that parameters are fully sharded over.")
@click.option("--pp", type=_AXIS, default=1, help="Ranks of pipeline parallelism.")
@click.option("--rdp", type=_AXIS, default=1, help="Replicas of the model.")
@click.option(
    "--dtype",
    type=DTYPES,
    default="auto",
    help="The parameters' dtype; auto: config.json's; keep: as stored.",
)
@click.option("--rank", type=click.IntRange(min=0), multiple=True, help="Only this rank; may be repeated.")
@click.option("--device-memory", type=Size(), help="Exit with 4 unless the weights fit into SIZE, such as 80GiB.")
@click.option("--picture", type=GivenPath(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Also draw it.")
@no_restrict
@listing_options
def plan(
    target: str,
    dtype: str,
    rank: tuple[int, ...],
    device_memory: int | None,
    picture: Path | None,
    no_restrict: bool,
    form: Form,
    **sizes: Any,
) -> None:
    """Show what each rank of gangs would read and hold.

    It uses the checkpoint's manifest: it reads no weights and fetches nothing. Memory is that of parameters
    and persistent buffers; activations, gradients and the state of an optimizer come on top.

    For example: lading plan qwen3_0.6b --tp 2 --sdp 2 --device-memory 24GiB
    """
    from lading.catalog.store import get_asset_store
    from lading.checkpoints.names import find_card

    store = get_asset_store()
    # Whether the name is known is said before torch is imported, which takes a second.
    model = find_card(target, store)
    if picture is not None and picture.suffix.lower() != ".svg":  # so that a slip does not overwrite weights
        raise click.BadParameter(f"expected a name that ends in .svg, found {picture.name!r}.", param_hint="--picture")
    if rank and max(rank) >= (world := math.prod(sizes.values())):
        raise click.BadParameter(f"the world has {counted(world, 'rank')}, from 0 on.", param_hint="--rank")

    from lading.operations.plan import plan_load

    found = plan_load(model, dtype=dtype, ranks=rank or None, restrict=not no_restrict, store=store, **sizes)
    if picture is not None:
        from lading.operations.plan_svg import picture as draw

        picture.write_text(draw(found), encoding="utf-8")

    rows = [
        (
            r.rank, r.pp, r.rdp, r.sdp, r.ep, r.tp, r.bytes_read, r.reads, r.files, r.memory_bytes, r.memory,
            None if device_memory is None else r.memory_bytes <= device_memory,
        )
        for r in found.ranks
    ]  # fmt: skip
    axes = [Column(name=axis, right=True) for axis, size in found.sizes.items() if size > 1]
    fits = Column(name="fits", show=text, color={True: "green", False: "red"}.get)
    last = [] if device_memory is None else [fits]
    write_rows(_COLUMNS, rows, form, table=(*_TABLE[:1], *axes, *_TABLE[1:], *last))
    if form is Form.TABLE:
        note(_summary(found))
    if device_memory is not None and any(r.memory_bytes > device_memory for r in found.ranks):
        click.get_current_context().exit(MISMATCH)


_COLUMNS = ("rank", "pp", "rdp", "sdp", "ep", "tp", "bytes_read", "reads", "files", "memory_bytes", "memory", "fits")


def _memory(memory: dict[str, int]) -> str:
    return ", ".join(f"{dtype} {human_bytes(size)}" for dtype, size in memory.items())


_TABLE = (
    Column(name="rank", right=True),
    Column(name="bytes_read", heading="read", show=human_bytes, right=True),
    Column(name="reads", right=True),
    Column(name="files", right=True),
    Column(name="memory", heading="memory of weights", show=_memory),
)


def _summary(plan: LoadPlan) -> str:
    largest = max((rank.memory_bytes for rank in plan.ranks), default=0)

    return (
        f"of {human_bytes(plan.checkpoint_bytes)} in {counted(plan.files, 'file')}"
        + (f", and {human_bytes(plan.adapter_bytes)} of adapters on each rank" if plan.adapter_bytes else "")
        + "; weights alone, at most "
        f"{human_bytes(largest)}: activations, gradients and optimizer state come on top"
    )
