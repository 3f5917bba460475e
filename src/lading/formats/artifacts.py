"""Recognition of weights that lading does not load: other formats, adapters, quantized checkpoints, pipelines.

The names of files say what may be there, their first bytes whether it is. Nothing is executed, unpickled or extracted;
of each file, at most a header is read.

Sources: the specifications of the formats, and the names that the libraries give to the files that they write.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lading.errors import LadingError, NotSupportedError
from lading.formats.adapter_config import ADAPTER_CONFIG_NAME, ADAPTER_NAME, parse_adapter_config
from lading.formats.config_json import read_config_json
from lading.formats.files import File, corrupt, open_file, refuse_lfs_pointer
from lading.formats.folder import is_other_format
from lading.formats.gguf import read_gguf_header
from lading.formats.local import index
from lading.formats.manifest import Manifest

MODEL_INDEX_NAME = "model_index.json"
"""The file by which diffusers knows the parts of a pipeline."""

SAVED_MODEL_NAME = "saved_model.pb"

LORA = "lora adapter"
"""The kind of adapters that a card can add to its checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactFiles:
    """The files of a folder that are one artifact, by their names."""

    kind: str
    folder: Path
    names: tuple[str, ...]
    """The names of the files; the first one is read."""
    whole: bool = False
    """``True`` if the artifact is the whole folder, and all folders below it."""

    @property
    def path(self) -> Path:
        """The path of the artifact: the folder if all of it, or its configuration, belongs to the artifact."""
        return self.folder if self.whole or self.kind == "adapter" else self.folder / self.names[0]

    def paths(self) -> list[Path]:
        """Return the paths of all files, the one to read first; links to folders are not followed."""
        paths = [self.folder / name for name in self.names]
        if self.whole:
            paths += [Path(root, name) for root, _, names in os.walk(self.folder) for name in sorted(names)]

        return list(dict.fromkeys(paths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """Weights on this machine that lading does not load."""

    kind: str
    """``gguf``, ``lora adapter``, ``quantized (awq)``, ``diffusers`` and so on."""
    files: int
    """The number of its files."""
    bytes: int
    """The size of its files."""
    tensors: int | None = None
    """The number of its tensors; ``None`` if no header that lading reads says it."""
    dtypes: tuple[str, ...] = ()
    """The dtypes of its tensors, that of the most elements first, as far as headers that lading reads say them."""
    reason: str
    """The reason that lading does not load it, and what to do instead."""


_REASONS: Mapping[str, str] = {
    "diffusers": "It is a pipeline of several models for diffusers, not one model. Load it with diffusers.",
    "tensorflow": "It is of a format of TensorFlow, which lading does not read. Convert it with transformers 4 "
    "(`from_tf=True`, then `save_pretrained`).",
    LORA: "It holds changes to the weights of a base model, not a model. `lading add` makes a card for it, on top of "
    "the card of that model.",
    "adapter": "It holds changes to the weights of a base model, not a model. Merge it with PEFT "
    "(`merge_and_unload`, then `save_pretrained`).",
    "gguf": "It is of the format of llama.cpp, which lading does not read. Use the safetensors checkpoint that it was "
    "converted from.",
    "ggml": "It is of an early format of llama.cpp, which lading does not read. Use the checkpoint that it was "
    "converted from.",
    "onnx": "It is a graph of ONNX, which lading does not read. Use the checkpoint that it was exported from.",
    "hdf5": "It is of the format HDF5, as Keras writes it, which lading does not read. Convert it with transformers 4 "
    "(`from_tf=True`, then `save_pretrained`).",
    "keras": "It is of the format of Keras, which lading does not read. Use the checkpoint that it was converted from.",
    "flax": "It is of the format of Flax, which lading does not read. Convert it with transformers 4 "
    "(`from_flax=True`, then `save_pretrained`).",
    "numpy": "It is an archive of NumPy, which lading does not read. Convert it with `safetensors.numpy.save_file`.",
    "pickle": "It is a pickle, which can run any code when it is loaded. Convert it with `safetensors.torch.save_file` "
    "where its origin is trusted.",
    "quantized": "It is quantized, which lading does not load. Use the checkpoint in its original precision.",
}

_SUFFIXES: Mapping[str, str] = {
    ".gguf": "gguf", ".ggml": "ggml", ".h5": "hdf5", ".hdf5": "hdf5", ".keras": "keras", ".msgpack": "flax",
    ".npz": "numpy", ".pkl": "pickle",
}  # fmt: skip

_MANY = ("numpy", "pickle")
"""The kinds whose files a folder may hold by the thousand, as data sets do: they are one artifact."""

_SERIES = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}\.\w+")
_TENSORFLOW = re.compile(r"(.+)\.(?:data-[0-9]{5}-of-[0-9]{5}|index|meta)")
_ADAPTER = re.compile(r"adapter_model.*\.(?:safetensors|bin)")


def artifact_files(folder: Path, names: Collection[str]) -> list[ArtifactFiles]:
    """Return the artifacts that a folder with files of these names may hold, without reading anything."""
    for name, kind in ((MODEL_INDEX_NAME, "diffusers"), (SAVED_MODEL_NAME, "tensorflow")):
        if name in names:
            return [ArtifactFiles(kind=kind, folder=folder, names=(name,), whole=True)]

    found = chain.from_iterable(find(folder, names) for find in (_adapters, _tensorflow, _graphs, _others))

    return sorted(found, key=lambda artifact: artifact.names)


def _adapters(folder: Path, names: Collection[str]) -> Iterator[ArtifactFiles]:
    found = sorted(name for name in names if _ADAPTER.fullmatch(name))
    if found and ADAPTER_CONFIG_NAME in names:
        yield ArtifactFiles(kind="adapter", folder=folder, names=(ADAPTER_CONFIG_NAME, *found))


def _tensorflow(folder: Path, names: Collection[str]) -> Iterator[ArtifactFiles]:
    """Yield the checkpoints of TensorFlow: files with numbers for the data, and an index."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := _TENSORFLOW.fullmatch(name):
            found.setdefault(match[1], []).append(name)
    for files in found.values():
        if ".data-" in files[0]:
            yield ArtifactFiles(kind="tensorflow", folder=folder, names=tuple(files))


def _graphs(folder: Path, names: Collection[str]) -> Iterator[ArtifactFiles]:
    """Yield the graphs of ONNX, each with the files beside it that hold its tensors."""
    for graph in sorted(name for name in names if name.lower().endswith(".onnx")):
        beside = sorted(name for name in names if name.startswith((f"{graph}_data", f"{graph}.data")))
        yield ArtifactFiles(kind="onnx", folder=folder, names=(graph, *beside))


def _others(folder: Path, names: Collection[str]) -> Iterator[ArtifactFiles]:
    """Yield the files whose suffix is that of another format, those of a series together."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(filter(is_other_format, names)):
        kind = _SUFFIXES.get(Path(name).suffix.lower())
        if kind is not None:
            series = _SERIES.fullmatch(name)
            found.setdefault((kind, "" if kind in _MANY else series[1] if series else name), []).append(name)
    for (kind, _), files in found.items():
        yield ArtifactFiles(kind=kind, folder=folder, names=tuple(files))


def read_artifact(kind: str, paths: Sequence[Path]) -> Artifact:
    """Return what an artifact is, by its headers.

    :param kind: the kind that the names of its files suggest.
    :param paths: those that :meth:`ArtifactFiles.paths` returns.

    :raises CheckpointNotFoundError: a file is missing.
    :raises CorruptModelCheckpointError: a file is of another format, is damaged, or is not a regular file.
    :raises OSError: a file cannot be read.
    """
    size, tensors = 0, 0
    elements: Counter[str] = Counter()
    for path in paths:
        with open_file(path) as file:
            size += file.size
            if kind == "gguf":
                header = read_gguf_header(file)
                tensors += header.tensors
                elements.update(header.elements)
            elif path == paths[0]:
                _require_signature(file, kind)
    manifests = list(_manifests(paths)) if kind in ("adapter", "diffusers") else []
    if kind == "adapter":
        kind, reason = _adapter(paths)
    else:
        reason = _REASONS[kind]

    return Artifact(
        kind=kind,
        files=len(paths),
        bytes=size,
        tensors=tensors + sum(map(len, manifests)) or None,
        dtypes=_by_elements(elements) if kind == "gguf" else _dtypes(manifests),
        reason=reason,
    )


def artifact_in(path: Path) -> Artifact | None:
    """Return the artifact at a path, a file or a folder; ``None`` if nothing is there that is certainly one."""
    try:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else [path.name]
        found = artifact_files(path if path.is_dir() else path.parent, names)
        return next((read_artifact(each.kind, each.paths()) for each in found), None)
    except (LadingError, OSError):
        return None


def not_loaded_error(path: Path, artifact: Artifact) -> NotSupportedError:
    """Return the error that says why an artifact is not loaded, and has no card."""
    return NotSupportedError(f"{path}: {artifact.kind}: {artifact.reason}")


def quantized_artifact(scheme: str, manifest: Manifest) -> Artifact:
    """Return a checkpoint that is quantized as an artifact.

    :param scheme: the method of its quantization: ``awq``, ``gptq`` and so on.
    """
    return Artifact(
        kind=f"quantized ({scheme if _WORD.fullmatch(scheme) else 'unknown'})",
        files=len(manifest.shards),
        bytes=sum(shard.size for shard in manifest.shards),
        tensors=len(manifest),
        dtypes=_dtypes([manifest]),
        reason=_REASONS["quantized"],
    )


def _adapter(paths: Sequence[Path]) -> tuple[str, str]:
    """Return the kind of an adapter, and the reason that it is not loaded."""
    label = str(paths[0])
    stated = read_config_json(paths[0]) or {}
    peft_type = stated.get("peft_type")
    if not isinstance(peft_type, str) or not _WORD.fullmatch(peft_type):
        return "adapter", _REASONS["adapter"]
    if peft_type != "LORA":
        return f"{peft_type.lower()} adapter", _REASONS["adapter"]
    try:
        parse_adapter_config(stated, label=label)
    except NotSupportedError as error:
        return "adapter", error.message
    if ADAPTER_NAME not in {path.name for path in paths}:
        return "adapter", f"{_REASONS['adapter']} An old version of PEFT wrote it."

    return LORA, _REASONS[LORA]


_WORD = re.compile(r"[\w.-]{1,32}", re.ASCII)
"""The names of types and schemes that are shown as a file states them."""


def _manifests(paths: Iterable[Path]) -> Iterator[Manifest]:
    """Yield the manifests of the files with tensors that lading reads."""
    for path in paths:
        if path.suffix in (".safetensors", ".bin"):
            try:
                yield index(path)
            except (LadingError, OSError):
                continue  # what it holds stays unknown, and its size is known


def _dtypes(manifests: Iterable[Manifest]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for manifest in manifests:
        counts.update(manifest.dtype_counts)

    return _by_elements(counts)


def _by_elements(counts: Counter[str]) -> tuple[str, ...]:
    return tuple(dtype for dtype, _ in counts.most_common())


# --- headers ----------------------------------------------------------------------------------------------------------

_SIGNATURES: Mapping[str, re.Pattern[bytes]] = {
    "adapter": re.compile(rb"\s*\{"),
    "diffusers": re.compile(rb"\s*\{"),
    "flax": re.compile(rb"[\x80-\x8f\xde\xdf]"),
    "ggml": re.compile(rb"lmgg|fmgg|tjgg|algg"),
    "hdf5": re.compile(rb"\x89HDF\r\n\x1a\n"),
    "keras": re.compile(rb"PK\x03\x04"),
    "numpy": re.compile(rb"PK\x03\x04|PK\x05\x06"),
    "onnx": re.compile(rb"\x08[\x01-\x7f]"),
}
"""The first bytes of the first file, by the kind of the artifact. Pickles of early protocols have no signature, and
neither have the checkpoints of TensorFlow."""


def _require_signature(file: File, kind: str) -> None:
    head, signature = file.read(0, 512), _SIGNATURES.get(kind)
    refuse_lfs_pointer(head, file.label)
    if not head or (signature is not None and not signature.match(head)):
        raise corrupt(file.label, "", expected=f"the first bytes of a file of the kind {kind!r}", found=_shown(head))


def _shown(head: bytes) -> str:
    return repr(head[:16]) if head else "an empty file"
