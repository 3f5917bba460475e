"""Checkpoints of ``torch.distributed.checkpoint``, as FSDP2 users save them, without reading a tensor or running code.

Such a checkpoint is a folder: each rank writes the parts of tensors that it owns into files of its own,
``__0_0.distcp``, ``__1_0.distcp`` …, one ``torch.save`` file behind another, and rank 0 writes ``.metadata`` at the
end. That is a pickle of torch's class ``Metadata``: for each tensor its dtype, its shape and the boxes of its parts
(``state_dict_metadata``), and for each part the file, the offset and the length (``storage_data``). Of values that are
not tensors it has only the names. Nested dicts are flattened, and ``planner_data`` has the original path of each name,
by which :mod:`lading.formats.state_dict` finds the state dict of the model beside that of the optimizer.

:mod:`lading.formats.torch_save.unpickle` reads the pickle with the few names that ``.metadata`` needs, and each of
these classes stays an inert value. The manifest takes nothing on trust: the header of each part is read, and has to
have the dtype and the shape that ``.metadata`` says; and the parts of a tensor have to make all of it.

Source: torch 2.13, ``torch/distributed/checkpoint/metadata.py`` and ``filesystem.py``; decision 0008.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, NotSupportedError
from lading.formats.files import corrupt, open_regular
from lading.formats.folder import DISTRIBUTED_SUFFIX, METADATA_NAME
from lading.formats.manifest import BITS, Manifest, Piece, Shard
from lading.formats.shard_index import require_plain_names
from lading.formats.state_dict import find_state_dict, require_name
from lading.formats.torch_save.reader import place_tensor
from lading.formats.torch_save.unpickle import (
    DTYPE_NAMES,
    Instance,
    Vocabulary,
    describe,
    dtype_of,
    is_shape,
    is_size,
    read_pickle,
    shape_of,
)
from lading.system.filesystem import path_exists

_MAX_CUTS = 4
"""The most dims along which the parts of a tensor are cut: a device mesh has as many axes, or fewer."""

_MAX_DEPTH = 64
"""The most nested dicts of a name."""

_PACKAGE = "torch.distributed.checkpoint"

_CLASSES = {
    *((f"{_PACKAGE}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    (f"{_PACKAGE}.filesystem", "_StorageInfo"),
    # Before torch 2.4, two of them were elsewhere.
    *(("torch.distributed._shard.sharded_tensor.metadata", name) for name in (
        "TensorProperties", "MEM_FORMAT_ENCODING")),
}  # fmt: skip
"""The classes that ``.metadata`` holds objects of."""

_HARMLESS = {
    ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}
"""Names of values that lading does not look at: the layout of a tensor, and the path where a checkpoint was saved."""


def _instance(kind: str, *args: object) -> object:
    # Enums take their value; all others are made empty, and get their attributes afterwards.
    return Instance(kind)


_VOCABULARY = Vocabulary(
    calls={
        **{(module, name): partial(_instance, name) for module, name in _CLASSES},
        ("torch", "Size"): shape_of,
    },
    names={*_CLASSES, *_HARMLESS, *DTYPE_NAMES, ("torch", "Size")},
    content="the metadata of `torch.distributed.checkpoint`, which holds names, shapes and places only",
    remedy="Save the checkpoint with `torch.distributed.checkpoint.save` and its own planner",
    scale=4,  # the parts of 70 billion parameters and of their optimizer, by up to 300 ranks
)


class _Part(NamedTuple):
    """A part of a tensor: a box, and the bytes of the ``torch.save`` file that holds it alone."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as ``.metadata`` describes it. Its parts make all of it, and do not overlap."""

    name: str
    """Its name in the state dict."""
    key: str
    """Its flattened name."""
    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[_Part]
    """At least one; a single one if the tensor has no elements."""


def index_distributed(folder: Path, *, restrict: bool = True, state_dict: str | None = None) -> Manifest:
    """Return the manifest of the checkpoint in ``folder``.

    :param restrict: see :func:`lading.formats.index`.
    :param state_dict: the dotted path of the state dict of the model; default: the usual ones.

    :raises CheckpointNotFoundError: ``.metadata`` is missing, or nothing is at ``state_dict``.
    :raises CorruptModelCheckpointError: it is damaged, a file is missing or damaged, or they disagree about a tensor.
    :raises RefusedPickleError: unpickling it would import something that the metadata does not need.
    :raises NotSupportedError: a tensor is not a plain range of bytes.
    :raises OSError: a file cannot be read.
    """
    tensors = _Metadata.read(folder / METADATA_NAME, restrict=restrict).tensors(state_dict)
    by_file: dict[str, list[tuple[int, _Part]]] = {}
    for i, tensor in enumerate(tensors):
        for part in tensor.parts:
            by_file.setdefault(part.file, []).append((i, part))

    shards: list[Shard] = []
    pieces: list[list[Piece]] = [[] for _ in tensors]
    for shard, name in enumerate(sorted(by_file)):
        try:
            with open_regular(folder / name) as (file, size):
                end = 0
                for i, part in sorted(by_file[name], key=lambda each: each[1].offset):
                    offset = _first_byte(file, size, tensors[i], part, after=end, label=str(folder / name))
                    pieces[i].append(Piece(part.starts, part.shape, shard, offset))
                    end = part.offset + part.length
        except CheckpointNotFoundError as error:
            raise corrupt(str(folder), "", expected=f"the file {name!r}", found="that it is missing") from error
        shards.append(Shard(name=name, size=size))

    for each in pieces:
        each.sort(key=lambda piece: piece[2:])
    order = sorted(range(len(tensors)), key=lambda i: (pieces[i][0][2:], tensors[i].name))

    return Manifest(
        format="torch",
        shards=tuple(shards),
        names=[tensors[i].name for i in order],
        dtypes=[tensors[i].dtype for i in order],
        shapes=[tensors[i].shape for i in order],
        shard_ids=array("I", [pieces[i][0].shard for i in order]),
        offsets=array("q", [pieces[i][0].offset for i in order]),
        index_name=METADATA_NAME,
        pieces={at: tuple(pieces[i]) for at, i in enumerate(order) if len(pieces[i]) > 1},
    )


def _first_byte(file: BinaryIO, size: int, tensor: _Tensor, part: _Part, *, after: int, label: str) -> int:
    """Return the first byte of a part in its file, after a check that its header says what ``.metadata`` does.

    :param after: the end of the part before, so that no bytes are read for several parts.
    """
    where, end = f"tensor {tensor.key[:80]!r}", part.offset + part.length
    if part.offset < after:
        expected = f"its part at or behind byte {after}, where another ends"
        raise corrupt(label, where, expected=expected, found=f"{part.offset}, as {METADATA_NAME} says")
    if end > size:
        expected = f"its part in the bytes {part.offset} to {end}, as {METADATA_NAME} says"
        raise corrupt(label, where, expected=expected, found=f"a file of {size} bytes")
    if 0 in part.shape:
        return part.offset

    found = place_tensor(file, tensor.key, base=part.offset, size=part.length, label=label)
    if (found.tensor.dtype, found.tensor.shape) != (tensor.dtype, part.shape):
        raise corrupt(
            label,
            where,
            expected=f"{tensor.dtype} of the shape {list(part.shape)}, as {METADATA_NAME} says",
            found=f"{found.tensor.dtype} of the shape {list(found.tensor.shape)}",
        )
    if not found.contiguous:
        raise NotSupportedError(
            f"{label}: {where}: expected elements in row-major order, found the shape {list(part.shape)} with the "
            f"strides {list(found.tensor.strides)}. Save `tensor.contiguous()`."
        )

    return found.offset


# --- .metadata --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Metadata:
    """The content of ``.metadata``. Only what it says of a wanted tensor is checked."""

    label: str
    entries: Mapping[str, object]
    """The description of each value of the flattened state dict."""
    paths: Mapping[str, object]
    """The path of each of them in the nested dicts."""
    places: Mapping[tuple[str, str], object]
    """The place of each part, by the name of the tensor and the first element, as :func:`_key` has it.
    """

    @classmethod
    def read(cls, path: Path, *, restrict: bool) -> _Metadata:
        """Read ``.metadata``; raises what :func:`index_distributed` does."""
        label = str(path)
        try:
            with open_regular(path) as (file, size):
                pickle = read_pickle(file, label=label, where="metadata", restrict=restrict, vocabulary=_VOCABULARY)
        except CheckpointNotFoundError as error:
            if path_exists(path.with_name(f"__0{METADATA_NAME}")):
                raise NotSupportedError(
                    f"{path.parent}: expected {METADATA_NAME}, which describes the parts of all ranks, found a file "
                    "for each rank, as `torch.distributed.checkpoint.save` writes them without collectives. Save the "
                    "checkpoint with `use_collectives=True`."
                ) from error
            raise CheckpointNotFoundError(
                path,
                f"{path.parent}: expected {METADATA_NAME}, which `torch.distributed.checkpoint.save` writes at its "
                f"end, found only files of ranks. The save was interrupted, or the file was not copied along: its name "
                "begins with a dot.",
            ) from error
        if pickle.size != size:
            raise corrupt(label, "", expected=f"one pickle of {size} bytes", found=f"one of {pickle.size}")

        whole = _attributes(pickle.value, "Metadata", label, "metadata")
        entries, storage, paths = (
            _dict(whole.get(key) or {}, label, key) for key in ("state_dict_metadata", "storage_data", "planner_data")
        )

        places: dict[tuple[str, str], object] = {}
        for index, place in storage.items():
            of = _attributes(index, "MetadataIndex", label, "storage_data")
            name, starts = of.get("fqn"), of.get("offset")
            if type(name) is str and is_shape(starts):  # else it is that of a value that is not a tensor
                if (name, _key(starts)) in places:
                    where = f"tensor {name[:80]!r}"
                    raise corrupt(label, where, expected=f"one part at {list(starts)}", found="another one")
                places[name, _key(starts)] = place

        return cls(label, entries, paths, places)

    def tensors(self, state_dict: str | None) -> list[_Tensor]:
        """Return the tensors of a state dict, at least one; raises what :func:`index_distributed` does."""
        found = find_state_dict(
            self._nested(), state_dict, label=self.label, is_tensor=lambda v: type(v) is str, describe=describe
        )
        tensors = [self._tensor(name, key) for name, key in found.items() if type(key) is str]
        if not tensors:
            raise corrupt(self.label, "", expected="at least one tensor", found="none")

        return tensors

    def _nested(self) -> dict[str, object]:
        """Return the dicts that were saved, with the flattened name of each tensor in its place."""
        whole: dict[str, object] = {}
        for key, entry in self.entries.items():
            if not (type(entry) is Instance and entry.kind == "TensorStorageMetadata") or type(key) is not str:
                continue
            path = self.paths.get(key, (key,))
            if type(path) is not tuple or not 0 < len(path) <= _MAX_DEPTH:
                expected = f"a path of at most {_MAX_DEPTH} keys"
                raise corrupt(self.label, f"planner_data of {key[:80]!r}", expected=expected, found=describe(path))
            if not all(type(each) is str for each in path):
                continue  # in a list: not a tensor of a state dict
            *outer, last = path
            inner: object = whole
            for each in outer:
                inner = inner.setdefault(each, {}) if type(inner) is dict else None
            if type(inner) is not dict or last in inner:
                found = f"another value at {'.'.join(path)[:80]!r}"
                raise corrupt(self.label, f"planner_data of {key[:80]!r}", expected="a path of its own", found=found)
            inner[last] = key

        return whole

    def _tensor(self, name: str, key: str) -> _Tensor:
        require_name(name, label=self.label)
        where = f"tensor {key[:80]!r}"

        def fail(expected: str, found: str) -> CorruptModelCheckpointError:
            return corrupt(self.label, where, expected=expected, found=found)

        of = _attributes(self.entries[key], "TensorStorageMetadata", self.label, where)
        properties, shape, chunks = of.get("properties"), of.get("size"), of.get("chunks")
        state = properties.state if type(properties) is Instance else None
        dtype = dtype_of(state[0]) if type(state) is tuple and state else None
        if dtype is None or not is_shape(shape) or type(chunks) is not list:
            raise fail("a dtype, a size and a list of chunks", ", ".join(map(describe, (state, shape, chunks))))
        if dtype not in BITS:
            raise NotSupportedError(
                f"{self.label}: {where}: expected a tensor of one of the dtypes {', '.join(BITS)}, found {dtype}. "
                "Convert it, and save it again."
            )
        if math.prod(n or 1 for n in shape) * BITS[dtype] >= 2**63:
            raise fail("fewer than 2^63 bits", f"the shape {list(shape)}")

        boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        for chunk in chunks:
            box = _attributes(chunk, "ChunkStorageMetadata", self.label, where)
            starts, sizes = (_shape(box.get(key), self.label, where) for key in ("offsets", "sizes"))
            if not len(starts) == len(sizes) == len(shape):
                raise fail(f"chunks of {len(shape)} dims", f"{list(sizes)} at {list(starts)}")
            if any(start + n > whole for start, n, whole in zip(starts, sizes, shape, strict=True)):
                raise fail(f"chunks within the shape {list(shape)}", f"{list(sizes)} at {list(starts)}")
            boxes.append((starts, sizes))

        # Ranks that own nothing of a tensor have an empty part; where all are empty, one says where the tensor is.
        full = [box for box in boxes if 0 not in box[1]] if math.prod(shape) else boxes[:1]
        self._require_whole(shape, full, fail)

        return _Tensor(name, key, dtype, shape, [self._part(key, *box, where) for box in full])

    def _require_whole(
        self,
        shape: tuple[int, ...],
        boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        fail: Callable[[str, str], CorruptModelCheckpointError],
    ) -> None:
        """Require that boxes within ``shape`` make all of it, and do not overlap."""
        if not boxes:
            raise fail(f"chunks of the shape {list(shape)}", "none")
        cuts = [d for d in range(len(shape)) if any(sizes[d] != shape[d] for _, sizes in boxes)]
        if len(cuts) > _MAX_CUTS:
            raise fail(f"chunks that are cut along at most {_MAX_CUTS} dims", f"{len(cuts)}")

        elements = sum(math.prod(sizes) for _, sizes in boxes)
        if elements < math.prod(shape):
            raise fail(f"chunks of all {math.prod(shape)} elements", f"{elements}: chunks are missing")
        # Boxes make a whole without overlap exactly if their corners, with alternating signs, add up to its corners.
        # That takes a step for each box, where comparing them with one another would take a step for each pair.
        corners: Counter[str] = Counter()
        for weight, (starts, sizes) in ((-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)):
            for ends in product((0, 1), repeat=len(cuts)):
                sign = weight * (-1) ** sum(ends)
                corners[_key(tuple(starts[d] + end * sizes[d] for d, end in zip(cuts, ends, strict=True)))] += sign
        if any(corners.values()):
            raise fail(f"chunks that make the shape {list(shape)}", "chunks that overlap")

    def _part(self, key: str, starts: tuple[int, ...], shape: tuple[int, ...], where: str) -> _Part:
        entry = self.places.get((key, _key(starts)))
        if entry is None:
            raise corrupt(self.label, where, expected=f"the place of its part at {list(starts)}", found="none")
        of = _attributes(entry, "_StorageInfo", self.label, where)
        file, offset, length = of.get("relative_path"), of.get("offset"), of.get("length")
        if type(file) is not str or not is_size(offset) or not is_size(length):
            found = ", ".join(map(describe, (file, offset, length)))
            raise corrupt(self.label, where, expected="a file, an offset and a length", found=found)
        require_plain_names(self.label, where, [file], DISTRIBUTED_SUFFIX)
        if transforms := of.get("transform_descriptors"):
            named = ", ".join(map(describe, transforms)) if isinstance(transforms, list) else describe(transforms)
            raise NotSupportedError(
                f"{self.label}: {where}: expected bytes as they are in memory, found that they were transformed by "
                f"{named[:80]}. Save the checkpoint without extensions of the writer."
            )

        return _Part(starts, shape, file, offset, length)


def _key(numbers: tuple[int, ...]) -> str:
    """Return numbers of a file as the key of a dict: of texts, unlike of numbers, the file cannot choose the hashes."""
    return str(numbers)


def _dict(value: object, label: str, where: str) -> dict[Any, object]:
    if type(value) is not dict:
        raise corrupt(label, where, expected="a dict", found=describe(value))

    return value


def _shape(value: object, label: str, where: str) -> tuple[int, ...]:
    if not is_shape(value):
        raise corrupt(label, where, expected="a tuple of sizes", found=describe(value))

    return value


def _attributes(value: object, kind: str, label: str, where: str) -> dict[str, object]:
    if not (type(value) is Instance and value.kind == kind and type(value.state) is dict):
        raise corrupt(label, where, expected=f"an object of the class {kind}", found=describe(value))

    return value.state
