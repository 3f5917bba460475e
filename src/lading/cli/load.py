"""`lading load`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Literal

import click

from lading.cli.command import command
from lading.cli.complete import complete_target
from lading.cli.options import DTYPES, no_progress, no_restrict, one_object, verify_mode
from lading.cli.output import dtype_text, write_json, write_pairs
from lading.errors import NotSupportedError
from lading.system.display import counted, human_bytes, human_count, some

if TYPE_CHECKING:
    import torch

    from lading.models.report import LoadReport


@command("load")
@click.argument("target", metavar="NAME|PATH|URI", shell_complete=complete_target)
@click.option("--device", metavar="DEVICE", help="For example cpu, cuda or cuda:1; default: torch's.")
@click.option("--dtype", type=DTYPES, help="The parameters' dtype; auto: config.json's; keep: as stored.")
@click.option("--mmap", is_flag=True, help="Map the files instead of reading them.")
@click.option(
    "--stream/--no-stream", default=None, help="Read from the source, without files here; default: as the card says."
)
@verify_mode
@no_restrict
@no_progress
@one_object
def load(
    target: str,
    device: str | None,
    dtype: str | None,
    mmap: bool,
    stream: bool | None,
    verify: Literal["auto", "always", "never"],
    no_restrict: bool,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Load a model, and show its size and the speed.

    The model is that of the card NAME, or of the Hugging Face style folder at PATH.

    For example: lading load qwen3_0.6b --dtype auto
    """
    from lading.checkpoints.names import find_card

    # Reports an unknown name before the import of torch, which takes a second.
    card = find_card(target)

    from lading.models.hub import load_with_report

    _, report = load_with_report(
        card,
        device=None if device is None else _device(device),
        dtype=dtype,
        mmap=mmap,
        stream=stream,
        verify=verify,
        restrict=not no_restrict,
        progress=not no_progress,
    )
    moved = report.bytes_read + report.bytes_mapped

    if as_json:
        write_json({**asdict(report), "seconds": report.seconds, "bytes_per_second": moved / report.seconds})
        return

    pages = ", ".join(f"{human_bytes(count)} of {size}" for size, count in report.pages.items())
    write_pairs(
        {
            "name": report.name,
            "model": f"{report.model_class} ({report.family})",
            "device": report.device,
            "parameters": human_count(report.parameters),
            "dtypes": dtype_text(report.dtypes),
            "tensors": f"{report.tensors} in {counted(report.shards, 'shard')}",
            **({"dropped": some(report.dropped)} if report.dropped else {}),
            **({"adapters": ", ".join(report.adapters)} if report.adapters else {}),
            **_transfer(report),
            **({"mapped": human_bytes(report.bytes_mapped)} if report.bytes_mapped else {}),
            **({"pages": pages} if pages else {}),
            "seconds": f"{report.seconds:.3f} (" + ", ".join(f"{k} {v:.3f}" for k, v in report.phases.items()) + ")",
            "speed": f"{moved / report.seconds / 1e9:.2f} GB/s",
        }
    )


def _transfer(report: LoadReport) -> dict[str, str]:
    """Return the lines about the bytes that were read."""
    if not report.streamed:
        return {"read": f"{human_bytes(report.bytes_read)} in {counted(report.reads, 'read')}"}

    return {
        "streamed": f"{human_bytes(report.bytes_read)} in {counted(report.reads, 'request')}",
        "checked": "verified" if report.verified else "unverified",
    }


def _device(name: str) -> torch.device:
    """Return the device with this name.

    :raises click.BadParameter: it cannot hold tensors on this machine.
    """
    from lading.models.device import require_usable

    try:
        device = require_usable(name)
    except NotSupportedError as error:
        raise click.BadParameter(error.message, param_hint="--device") from None

    if device.type == "meta":
        raise click.BadParameter("the meta device holds no data.", param_hint="--device")

    return device
