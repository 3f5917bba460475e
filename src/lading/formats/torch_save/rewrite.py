"""The rewrite of a checkpoint whose tensors are not ranges of bytes, once, as a safetensors file in a cache.

A child process of the same Python does this, without environment variables and network, and with limits on memory,
time and the size of its output. It gets two open files rather than paths, and reads the pickle with the same reader
that found the tensors (:mod:`lading.formats.torch_save.unpickle`), so that it cannot run anything either; it adds only
the handling of strides.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lading.errors import (
    CorruptModelCheckpointError,
    LadingError,
    ModelCheckpointError,
    NotSupportedError,
    PolicyError,
    RefusedPickleError,
)
from lading.formats.files import corrupt, open_regular
from lading.formats.safetensors import index_file

FOLDER = "rewritten"
"""The folder within the cache."""

_FILE, _INDEX = ".safetensors", ".safetensors.index.json"
"""The endings of the names of rewritten files."""

VERSION = 1
"""The version of rewritten files; a file of another version is written again."""

SECONDS = 120
"""The seconds that the child may take, and one more for each :data:`BYTES_PER_SECOND` of the file."""

BYTES_PER_SECOND = 10_000_000

_STALE_SECONDS = 86_400
"""The age in seconds at which lading removes the temporary file of a killed process."""

_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from lading.formats.torch_save.rewrite_child import main; main()"
)


@dataclass(frozen=True, slots=True)
class Original:
    """A torch checkpoint to rewrite."""

    path: Path
    base: int = 0
    """The byte of the file at which it begins."""
    size: int | None = None
    """The bytes of it; ``None``: up to the end of the file."""
    suffix: str = ""
    """A suffix for the names of its tensors."""
    state_dict: str | None = None
    """The dotted path of the state dict in it; ``None``: the usual ones."""


def rewrite(original: Original, cache: Path, *, restrict: bool = True) -> Path:
    """Return the safetensors file, in ``cache``, with the tensors of a torch checkpoint.

    This writes it if it is missing for this state of the checkpoint; an existing one is always complete.

    :raises CheckpointNotFoundError: the file does not exist.
    :raises CorruptModelCheckpointError: it is damaged, or changed meanwhile.
    :raises PolicyError: unpickling it would import what a state dict does not need, or the result would be much
        larger.
    :raises ModelCheckpointError: the child took too much memory or time.
    :raises OSError: a file cannot be read or written.
    """
    with _open(original, cache) as (file, size, target):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target.parent)
            with _new(target) as (fd, temporary):
                _run_child(file, fd, original, size, restrict)
                index_file(temporary)  # checks the header, regardless of what the child did

    return target


def rewrite_all(originals: Sequence[Original], cache: Path, *, restrict: bool = True) -> Path:
    """Return the index, in ``cache``, of the safetensors files with the tensors of several torch files.

    Raises what :func:`rewrite` does.

    :raises CorruptModelCheckpointError: two of them hold a tensor of the same name, too.
    """
    files = [rewrite(original, cache, restrict=restrict) for original in originals]
    target = _index(files, cache)
    if target.exists():
        return target

    weight_map: dict[str, str] = {}
    for original, file in zip(originals, files, strict=True):
        for name in index_file(file).names:
            if name in weight_map:
                raise corrupt(
                    str(original.path),
                    f"tensor {name.removesuffix(original.suffix)!r}",
                    expected="one of that name in all files of the checkpoint",
                    found="another one",
                )
            weight_map[name] = file.name
    with _new(target) as (fd, _):
        os.write(fd, json.dumps({"weight_map": weight_map}).encode())

    return target


def rewritten(original: Original, cache: Path) -> Path | None:
    """Return the file that :func:`rewrite` wrote of this state; ``None`` if it did not. Raises the same."""
    with _open(original, cache) as (_, _, target):
        return target if target.exists() else None


def rewritten_all(originals: Sequence[Original], cache: Path) -> Path | None:
    """Return the index that :func:`rewrite_all` wrote of these states of the files; ``None`` if it did not."""
    files = [rewritten(original, cache) for original in originals]
    target = _index([file for file in files if file is not None], cache)

    return target if None not in files and target.exists() else None


def is_rewritten(path: Path, cache: Path) -> bool:
    """Return whether ``path`` is that of a file which :func:`rewrite` or :func:`rewrite_all` writes."""
    return path.parent == cache / FOLDER and path.name.endswith((_FILE, _INDEX))


def rewritten_files(cache: Path) -> list[Path]:
    """Return all rewritten files in a cache."""
    return sorted(path for path in (cache / FOLDER).glob("*") if is_rewritten(path, cache) and path.is_file())


@contextmanager
def _open(original: Original, cache: Path) -> Iterator[tuple[BinaryIO, int, Path]]:
    """Open a checkpoint; yield the file, the bytes of the checkpoint, and the path of its rewritten file."""
    with open_regular(original.path) as (file, file_size):
        size = file_size - original.base if original.size is None else original.size
        stat = os.fstat(file.fileno())
        place: tuple[object, ...] = (original.base, size, original.suffix)
        if original.state_dict is not None:
            place += (original.state_dict,)
        name = _hash((VERSION, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, *place))
        yield file, size, cache / FOLDER / f"{name}{_FILE}"


def _index(files: Sequence[Path], cache: Path) -> Path:
    return cache / FOLDER / f"{_hash(tuple(file.name for file in files))}{_INDEX}"


def _hash(value: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".*.tmp"):
        try:
            if path.stat().st_mtime < time.time() - _STALE_SECONDS:
                path.unlink()
        except FileNotFoundError:
            pass


@contextmanager
def _new(target: Path) -> Iterator[tuple[int, Path]]:
    """Open a temporary file for writing that replaces ``target`` after the block."""
    fd, temporary = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=".tmp", dir=target.parent)
    try:
        yield fd, Path(temporary)
        os.fsync(fd)
        os.fchmod(fd, 0o444)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _run_child(file: BinaryIO, out: int, original: Original, size: int, restrict: bool) -> None:
    label = str(original.path)
    seconds = SECONDS + size // BYTES_PER_SECOND
    order = {
        "file": file.fileno(), "out": out, "base": original.base, "size": size, "suffix": original.suffix,
        "state_dict": original.state_dict, "restrict": restrict, "label": label, "seconds": seconds,
        "parent": os.getpid(),
    }  # fmt: skip
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path), json.dumps(order)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=(file.fileno(), out),
            env={**_ENVIRONMENT, **({"LD_LIBRARY_PATH": path} if (path := os.environ.get("LD_LIBRARY_PATH")) else {})},
            timeout=seconds * 2,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _stopped(label, f"more than {seconds * 2} s") from None

    if child.returncode == 0:
        return
    if child.returncode == -signal.SIGXCPU:
        raise _stopped(label, f"more than {seconds} s of a processor")
    if child.returncode == -signal.SIGBUS:
        raise CorruptModelCheckpointError(
            label, f"{label}: expected a file that does not change while it is read, found that it was cut meanwhile."
        )
    raise _error(child.stdout, label) or _stopped(
        label, f"an end with status {child.returncode}: {child.stderr[-500:].decode(errors='replace').strip()}"
    )


def _error(report: bytes, label: str) -> LadingError | None:
    """Return the error that the child reports, if it is one of the allowed ones."""
    try:
        kind, message = json.loads(report)
    except ValueError:
        return None
    if kind == "OSError":
        return ModelCheckpointError(label, message)
    if kind == "CorruptModelCheckpointError":
        return CorruptModelCheckpointError(label, message)
    if kind == "RefusedPickleError":
        return RefusedPickleError(label, message)

    return {"PolicyError": PolicyError, "NotSupportedError": NotSupportedError}.get(kind, LadingError)(message)


def _stopped(label: str, found: str) -> ModelCheckpointError:
    return ModelCheckpointError(
        label,
        f"{label}: expected that its tensors can be rewritten within the limits of time and memory, found {found}. "
        "Load it with torch, and save the tensors with `safetensors.torch.save_file`.",
    )
