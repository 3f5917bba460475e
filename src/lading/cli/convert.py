"""`lading convert` and `lading export`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lading.cli.command import command, no_restrict
from lading.cli.complete import complete_model, complete_target
from lading.cli.describe import DTYPES, dtype_text, parse_dtype, some
from lading.cli.names import name_or_path
from lading.cli.output import counted, human_bytes, human_count, write_json, write_pairs
from lading.system.filesystem import path_exists

if TYPE_CHECKING:
    from lading.checkpoints.verification import Verify
    from lading.operations.export import ExportReport

F = TypeVar("F", bound=Callable[..., Any])

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_BINARY = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


class Size(click.ParamType[int]):
    """A parameter that is a number of bytes, such as ``5GB`` or ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)B?", value, re.IGNORECASE)
        unit = None if match is None else match[2].capitalize()
        size = 0 if match is None or unit is None else int(float(match[1]) * (_UNITS | _BINARY)[unit])
        if size < 1:
            self.fail(f"expected a size such as 5GB or 512MiB, found {value!r}.", param, ctx)

        return size


def _write_options(function: F) -> F:
    """Add the options that both commands have."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object."),
        click.option("--no-progress", is_flag=True, help="Hide the progress bar."),
        click.option(
            "--verify", type=click.Choice(("auto", "always", "never")), default="auto",
            help="Check bytes against digests; auto (the default): unless the file is verified and unchanged.",
        ),
        click.option(
            "--dtype", type=click.Choice(DTYPES), default="keep",
            help="The dtype of floating-point tensors; keep (the default): as stored; auto: config.json's.",
        ),
        click.option(
            "--shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE",
            help="The largest size of a file, unless a single tensor is larger.",
        ),
        click.argument("folder", metavar="DIR", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        function = option(function)

    return function


@command("convert")
@click.argument("target", metavar="NAME|PATH", shell_complete=complete_target)
@_write_options
@click.option("--arch", metavar="FAMILY/ARCH", help="The architecture of a checkpoint at PATH without config.json.")
@no_restrict
def convert(
    target: str,
    folder: Path,
    shard_size: int,
    dtype: str,
    arch: str | None,
    no_restrict: bool,
    verify: Verify,
    no_progress: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint of any format as a Hugging Face repository.

    The checkpoint is that of the card NAME, or the one at PATH: safetensors, torch.save, Meta's or fairseq2's. DIR must
    be empty or must not exist; it is written completely or not at all.

    For example: lading convert ./consolidated.00.pth llama --arch llama/llama3_8b
    """
    from lading.catalog.store import get_asset_store

    found = name_or_path(target, get_asset_store())
    if arch is not None and isinstance(found, str):
        raise click.UsageError(f"--arch is for a checkpoint at a path, but {found!r} is a card, which names its own.")
    if arch is not None and "/" not in arch:
        raise click.BadParameter("expected FAMILY/ARCH, as in llama/llama3_8b.", param_hint="--arch")

    if arch is None and isinstance(found, Path) and found.exists():
        from lading.formats.config_json import read_hf_config

        if not read_hf_config(found):
            raise click.UsageError(
                f"{found} has no config.json, so the family of the model is unknown: name its architecture with --arch "
                "FAMILY/ARCH (`lading archs` shows them)."
            )

    _write(found, folder, shard_size, dtype, verify, no_progress, as_json, arch=arch, restrict=not no_restrict)


@command("export")
@click.argument("name", shell_complete=complete_model)
@_write_options
def export(
    name: str, folder: Path, shard_size: int, dtype: str, verify: Verify, no_progress: bool, as_json: bool
) -> None:
    """Write a model of the catalog as a Hugging Face repository.

    Like `lading convert`, but only for cards, which name the checkpoint and the tokenizer.

    For example: lading export qwen3_0.6b ./qwen --dtype float16
    """
    from lading.catalog.store import get_asset_store
    from lading.cli.names import unknown_model

    store = get_asset_store()
    if store.maybe_retrieve_card(name) is None:
        if path_exists(name):
            raise click.UsageError(f"{name!r} is a path, and no card has that name: use `lading convert` for paths.")
        raise unknown_model(name, store)

    _write(name, folder, shard_size, dtype, verify, no_progress, as_json)


def _write(
    target: str | Path,
    folder: Path,
    shard_size: int,
    dtype: str,
    verify: Verify,
    no_progress: bool,
    as_json: bool,
    **more: Any,
) -> None:
    from lading.operations.export import convert_checkpoint

    report = convert_checkpoint(
        target,
        folder,
        dtype=parse_dtype(dtype),
        shard_size=shard_size,
        verify=verify,
        progress=not no_progress,
        **more,
    )
    _show(report, as_json)


def _show(report: ExportReport, as_json: bool) -> None:
    if as_json:
        write_json(
            {
                "name": report.name,
                "family": report.family,
                "folder": report.folder,
                "files": [{"name": name, "bytes": size} for name, size in report.files.items()],
                "tensors": report.tensors,
                "parameters": report.parameters,
                "dtypes": report.dtypes,
                "bytes": report.bytes,
                "dropped": report.dropped,
            }
        )
        return

    weights = sum(name.endswith(".safetensors") for name in report.files)
    write_pairs(
        {
            "name": report.name,
            "family": report.family,
            "parameters": human_count(report.parameters),
            "dtypes": dtype_text(report.dtypes),
            "tensors": f"{report.tensors} in {counted(weights, 'shard')}",
            **({"dropped": some(report.dropped)} if report.dropped else {}),
            "written": f"{human_bytes(report.bytes)} in {counted(len(report.files), 'file')}",
            "folder": report.folder,
        }
    )
