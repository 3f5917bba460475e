"""`lading convert` and `lading export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lading.cli.command import command
from lading.cli.complete import complete_model, complete_target
from lading.cli.options import DTYPES, GivenPlace, Size, no_progress, no_restrict, one_object, verify_mode
from lading.cli.output import dtype_text, write_json, write_pairs
from lading.system.display import counted, human_bytes, human_count, some

if TYPE_CHECKING:
    from lading.cards.card import AssetCard

F = TypeVar("F", bound=Callable[..., Any])


def _write_options(function: F) -> F:
    """Add the options of both commands, which :func:`_write` takes."""
    for option in (
        one_object,
        no_progress,
        verify_mode,
        click.option(
            "--dtype", type=DTYPES, default="keep",
            help="The dtype of floating-point tensors; keep (the default): as stored; auto: config.json's.",
        ),
        click.option("--stacked", is_flag=True, help="Write the experts of a layer together, as the model has them."),
        click.option(
            "--drop", is_flag=True, help="Leave out trained tensors that a load ignores, instead of refusing."
        ),
        click.option(
            "--shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE",
            help="The largest size of a file, unless a single tensor is larger.",
        ),
        click.argument("folder", metavar="DIR|URI", type=GivenPlace(path_type=Path)),
    ):  # fmt: skip
        function = option(function)

    return function


@command("convert")
@click.argument("target", metavar="NAME|PATH|URI", shell_complete=complete_target)
@_write_options
@click.option("--arch", metavar="FAMILY/ARCH", help="The architecture of a checkpoint at PATH without config.json.")
@no_restrict
def convert(target: str, arch: str | None, no_restrict: bool, **options: Any) -> None:
    """Write a checkpoint of any format as a Hugging Face repository.

    The checkpoint is that of the card NAME, or the one at PATH: safetensors, torch.save, Meta's or fairseq2's. DIR must
    be empty or must not exist; it is written completely or not at all. So is a folder of an object store, such as
    s3://bucket/folder.

    For example: lading convert ./consolidated.00.pth llama --arch llama/llama3_8b
    """
    from lading.checkpoints.names import as_path, find_card

    # With --arch, a path is taken as it is, even if a card has it.
    found = (None if arch is None else as_path(target)) or find_card(target)
    if arch is not None and not isinstance(found, Path):
        raise click.UsageError(f"--arch is for a checkpoint at a path, but {target!r} is a card, which names its own.")
    if arch is not None and "/" not in arch:
        raise click.BadParameter("expected FAMILY/ARCH, as in llama/llama3_8b.", param_hint="--arch")

    if arch is None and isinstance(found, Path) and found.exists():
        from lading.formats.artifacts import artifact_in
        from lading.formats.config_json import read_hf_config

        if not read_hf_config(found) and artifact_in(found) is None:
            raise click.UsageError(
                f"{found} has no config.json, so the family of the model is unknown: name its architecture with --arch "
                "FAMILY/ARCH (`lading archs` shows them)."
            )

    _write(found, arch=arch, restrict=not no_restrict, **options)


@command("export")
@click.argument("name", metavar="NAME|URI", shell_complete=complete_model)
@_write_options
def export(name: str, **options: Any) -> None:
    """Write a model as a Hugging Face repository.

    Like `lading convert`, but not for a path that no card has: a card names the checkpoint and the tokenizer.

    For example: lading export qwen3_0.6b ./qwen --dtype float16; or: lading export qwen3_0.6b s3://bucket/qwen
    """
    from lading.checkpoints.names import find_card

    found = find_card(name)
    if isinstance(found, Path):
        raise click.UsageError(f"{name!r} is a path that no card has: use `lading convert` for paths.")

    _write(found, **options)


def _write(target: AssetCard | Path, *, dtype: str, no_progress: bool, as_json: bool, **options: Any) -> None:
    from lading.operations.export import convert_checkpoint

    report = convert_checkpoint(target, dtype=dtype, progress=not no_progress, **options)
    if as_json:
        files = [{"name": name, "bytes": size} for name, size in report.files.items()]
        write_json({**asdict(report), "files": files, "bytes": report.bytes})
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
