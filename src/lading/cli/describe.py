"""Descriptions of indexed checkpoints, dtypes and sizes, shared by all commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import click

from lading.formats.manifest import FLOAT_NAMES
from lading.system.display import counted, human_bytes, human_count
from lading.system.uris import shown_uri

if TYPE_CHECKING:
    from lading.catalog.store import StoredCheckpoint


def checkpoint_object(stored: StoredCheckpoint) -> dict[str, object]:
    """Return the description of a checkpoint for JSON."""
    manifest = stored.manifest

    return {
        "uri": shown_uri(stored.uri),
        "revision": stored.revision or None,
        "format": manifest.format,
        "tensors": len(manifest),
        "parameters": manifest.parameters,
        "bytes": manifest.total_bytes,
        "dtypes": manifest.dtype_counts,
        "shards": [{"name": shard.name, "bytes": shard.size, "sha256": shard.sha256} for shard in manifest.shards],
        "indexed_at": stored.indexed_at,
    }


def checkpoint_pairs(stored: StoredCheckpoint) -> dict[str, object]:
    """Return the description of a checkpoint for :func:`lading.cli.output.write_pairs`."""
    manifest = stored.manifest

    return {
        **({"revision": stored.revision} if stored.revision else {}),
        "format": manifest.format,
        "size": human_bytes(manifest.total_bytes),
        "parameters": human_count(manifest.parameters),
        "dtypes": dtype_text(manifest.dtype_counts),
        "tensors": f"{len(manifest)} in {counted(len(manifest.shards), 'shard')}",
    }


def dtype_text(counts: Mapping[str, int]) -> str:
    """Format the number of elements by dtype as ``BF16 1.2B, F32 2K``."""
    return ", ".join(f"{dtype} {human_count(count)}" for dtype, count in counts.items())


def some(names: Collection[str], *, most: int = 3) -> str:
    """Format the first ``most`` of ``names`` and the number of the others."""
    first = list(names)[:most]
    more = len(names) - len(first)

    return ", ".join(first) + (f" and {more} more" if more else "")


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i)?)?B?", re.IGNORECASE)


class Size(click.ParamType[int]):
    """A parameter that is a number of bytes, such as ``5GB`` or ``512MiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value)
        power = 0 if match is None or match[2] is None else "KMGTP".index(match[2].upper()) + 1
        size = 0 if match is None else int(min(float(match[1]) * (1024 if match[3] else 1000) ** power, sys.maxsize))
        if size < 1:
            self.fail(f"expected a size such as 5GB or 512MiB, found {value!r}.", param, ctx)

        return size


DTYPES = click.Choice(("auto", "keep", *FLOAT_NAMES), case_sensitive=False)
"""The type of the option ``--dtype``."""
