"""The process that rewrites a torch checkpoint as safetensors; :mod:`lading.formats.torch_save.rewrite` starts it and
limits it.

No other module of this folder imports numpy.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from lading.errors import LadingError, PolicyError
from lading.formats.torch_save.archive import Record, require_crc
from lading.formats.torch_save.reader import Placed, place_tensors
from lading.formats.torch_save.unpickle import ITEM_SIZES

SLACK = 1 << 30
"""The bytes of memory beyond those of the interpreter and of the mapping of the file; and the bytes by which the output
may exceed twice the file, as it does for tensors that repeat their elements."""

CHUNK = 32 << 20
"""The bytes to put in order at once."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38

_FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.system", "ctypes.")


def main() -> None:
    order = json.loads(sys.argv[2])
    try:
        limit(seconds=order["seconds"], size=os.fstat(order["file"]).st_size, parent=order["parent"])
        with open(order["file"], "rb", closefd=False) as file, open(order["out"], "wb", closefd=False) as out:
            rewrite(
                file,
                out,
                order["base"],
                order["size"],
                suffix=order["suffix"],
                state_dict=order["state_dict"],
                label=order["label"],
                restrict=order["restrict"],
            )
    except (LadingError, OSError) as error:
        kind = type(error).__name__ if isinstance(error, LadingError) else "OSError"
        sys.stdout.write(json.dumps([kind, str(error)]))
        sys.exit(3)


def limit(*, seconds: int, size: int, parent: int) -> None:
    """Restrict this process to what it needs."""
    # If the user may not have a separate network, the hook below at least refuses sockets.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)

    with open("/proc/self/statm", "rb") as statm:
        memory = int(statm.read().split()[0]) * resource.getpagesize()
    _set_limit(resource.RLIMIT_AS, memory + size + SLACK)
    _set_limit(resource.RLIMIT_FSIZE, 2 * size + SLACK)
    _set_limit(resource.RLIMIT_CPU, seconds)
    _set_limit(resource.RLIMIT_NPROC, 0)
    _set_limit(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write reports it instead

    def refuse(event: str, args: tuple[object, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PolicyError(f"The process that rewrites a checkpoint tried {event!r}, and was stopped.")

    sys.addaudithook(refuse)


def _set_limit(which: int, value: int) -> None:
    _, hard = resource.getrlimit(which)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def rewrite(
    file: BinaryIO,
    out: BinaryIO,
    base: int,
    size: int,
    *,
    suffix: str,
    state_dict: str | None,
    label: str,
    restrict: bool,
) -> None:
    """Write the tensors of the torch checkpoint in ``file`` to ``out``, as safetensors, their names with ``suffix``."""
    placed = place_tensors(file, base=base, size=size, label=label, restrict=restrict, state_dict=state_dict)
    # The largest elements first: then all are aligned.
    placed.sort(key=lambda entry: (-ITEM_SIZES[entry.tensor.dtype], entry.offset))
    sizes = [math.prod(entry.tensor.shape) * ITEM_SIZES[entry.tensor.dtype] for entry in placed]
    if sum(sizes) > 2 * size + SLACK:
        raise PolicyError(
            f"{label}: expected tensors of about the size of the file, {size} bytes, found {sum(sizes)} bytes, as some "
            "of them repeat their elements. Save a smaller state dict."
        )

    out.write(_header(placed, sizes, suffix))
    checked: set[Record] = set()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for entry in placed:
            record = entry.record
            if record not in checked and record.size:
                # This reads all of it in any case, and it is in memory when its tensors are put in order.
                with memoryview(data) as view, view[record.offset : record.offset + record.size] as stored:
                    require_crc(record, stored, label=label)
                checked.add(record)
            out.writelines(np.ascontiguousarray(chunk).data.cast("B") for chunk in _chunks(_view(data, entry)))


def _header(placed: Sequence[Placed], sizes: Sequence[int], suffix: str) -> bytes:
    """Return the header of a safetensors file, padded so that the tensors begin at a multiple of 64 bytes."""
    header: dict[str, object] = {}
    at = 0
    for entry, nbytes in zip(placed, sizes, strict=True):
        tensor = entry.tensor
        place = [at, at + nbytes]
        header[entry.name + suffix] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": place}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)

    return len(text).to_bytes(8, "little") + text


def _view(data: mmap.mmap, entry: Placed) -> np.ndarray[Any, Any]:
    """Return a view of the elements in the order of the tensor; numpy checks that all of them lie in the file."""
    item = ITEM_SIZES[entry.tensor.dtype]
    if 0 in entry.tensor.shape:
        return np.empty(entry.tensor.shape, f"u{item}")

    return np.ndarray(
        entry.tensor.shape,
        f"u{item}",
        buffer=data,
        offset=entry.offset,
        strides=tuple(stride * item for stride in entry.tensor.strides),
    )


def _chunks(view: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yield ``view`` in parts of at most :data:`CHUNK` bytes, in row-major order."""
    if view.size == 0:
        return
    if view.nbytes <= CHUNK:
        yield view
        return

    rows = CHUNK // (view.nbytes // len(view))
    if rows == 0:
        for row in view:
            yield from _chunks(row)
    else:
        for i in range(0, len(view), rows):
            yield view[i : i + rows]
