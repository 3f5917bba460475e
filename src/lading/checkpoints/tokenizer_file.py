"""The file of a tokenizer: found where a card says, fetched, and recognized by its bytes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias
from zipfile import BadZipFile, ZipFile

from lading.cards.card import AssetCard, checkpoint_ref
from lading.catalog.store import AssetStore
from lading.checkpoints.address import address_of
from lading.checkpoints.checkpoint import local_checkpoint
from lading.checkpoints.extra_files import (
    SENTENCEPIECE_NAMES,
    TOKENIZER_JSON,
    TOKENIZER_NAMES,
    RemoteTokenizer,
    TokenizerRef,
    same_source,
    tokenizer_elsewhere,
    tokenizer_ref,
)
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, ModelGatedError, NotSupportedError
from lading.formats.config_json import read_config_json
from lading.formats.files import corrupt, open_regular, refuse_lfs_pointer
from lading.formats.folder import container_of, folder_of
from lading.formats.tar import find_member
from lading.sources.open import has_folders
from lading.system.display import some
from lading.system.uris import uri_path

MAX_SIZE = 256 << 20
"""The most bytes of a tokenizer's file; the largest published ones have a tenth of it."""

Library: TypeAlias = Literal["tokenizers", "sentencepiece", "tiktoken"]
"""The package that reads a tokenizer's file."""

_NAMES: Mapping[Library, Sequence[str]] = {
    "tokenizers": (TOKENIZER_JSON,),
    "sentencepiece": SENTENCEPIECE_NAMES,
    "tiktoken": SENTENCEPIECE_NAMES[:1],  # LLaMA 3 kept the name of LLaMA 2
}
"""The names of the files that a library reads, the most common first."""

_KINDS: Mapping[Library, str] = {
    "tokenizers": TOKENIZER_JSON,
    "sentencepiece": "a model of sentencepiece",
    "tiktoken": "ranks of tiktoken",
}

_CONFIG, _SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
"""The files beside a ``tokenizer.json`` that name its control tokens; the second is of older repositories."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFile:
    """The content of a tokenizer's file."""

    library: Library
    """The library that reads it."""
    label: str
    """The path of the file, for messages."""
    data: bytes
    config: Mapping[str, object] = field(default_factory=dict)
    """The content of the ``tokenizer_config.json`` beside it, completed from ``special_tokens_map.json``."""


def card_tokenizer_file(
    card: AssetCard, store: AssetStore, libraries: Sequence[Library], *, progress: bool
) -> TokenizerFile:
    """Read the file of a card's tokenizer, after fetching it if it is missing here.

    :param libraries: the libraries that may read it, the preferred one first.

    :raises AssetCardError: references that form a circle, or a field of another type.
    :raises FetchError: its source cannot be reached.

    Raises what :func:`local_tokenizer_file` does, too.
    """
    ref = checkpoint_ref(card)
    stated = tokenizer_ref(card, store.retrieve_card)
    if stated is None:
        ref = address_of(card)
        if not ref.uri:
            raise ModelGatedError(card.title, ref.info_url)
        path = uri_path(ref.uri)
        if path is not None:
            path = local_checkpoint(path, inner_path=ref.path)
            return local_tokenizer_file(folder_of(path), libraries)
        if not has_folders(ref.uri):
            raise NotSupportedError(
                f"The card {card.name!r} names no tokenizer, and its checkpoint is one file of a server: {ref.shown}. "
                "Name the tokenizer in the card's `tokenizer`, or that of another card in its `tokenizer_ref`."
            )
        stated = TokenizerRef(uri=ref.uri, path=ref.path)

    path = uri_path(stated.uri)
    if path is not None:
        return local_tokenizer_file(path if stated.path is None else path / stated.path, libraries)

    known = store.checkpoint(ref.key) if ref.uri and same_source(stated, ref) else None

    revision = None if known is None else known.revision or None
    elsewhere = tokenizer_elsewhere(stated, settings=store.settings, revision=revision)
    assert elsewhere is not None  # it is not on this machine

    return _remote(elsewhere, store, ref.key if ref.uri else "", libraries, progress=progress)


def local_tokenizer_file(path: Path, libraries: Sequence[Library]) -> TokenizerFile:
    """Read the file of a tokenizer, or the preferred one in a folder.

    :param path: a file, a folder, or a path into an archive.
    :param libraries: the libraries that may read it, the preferred one first.

    :raises CheckpointNotFoundError: nothing is at the path, or no tokenizer is in the folder.
    :raises CorruptModelCheckpointError: the file is not what its name says.
    :raises NotSupportedError: it is a file of another library.
    """
    archive = container_of(path)
    if archive is not None:
        return _read(archive, libraries, member=path.relative_to(archive).as_posix())
    if path.is_dir():
        path = path / _choose([entry.name for entry in path.iterdir()], str(path), libraries)

    return _read(path, libraries, beside={name: path.with_name(name) for name in (_CONFIG, _SPECIAL)})


def _remote(
    elsewhere: RemoteTokenizer, store: AssetStore, checkpoint: str, libraries: Sequence[Library], *, progress: bool
) -> TokenizerFile:
    names = {file.name.rpartition("/")[2]: file for file in elsewhere.files}
    name = next(iter(names)) if len(names) == 1 else _choose(list(names), elsewhere.source.uri, libraries)
    wanted = (name, _CONFIG, _SPECIAL) if name == TOKENIZER_JSON else (name,)
    files = tuple(names[each] for each in wanted if each in names)
    fetched = replace(elsewhere, files=files).fetch(store, checkpoint, progress=progress)
    beside = {file.name.rpartition("/")[2]: file.path for file in fetched}

    return _read(beside.pop(name), libraries, member=elsewhere.member, name=name, beside=beside)


def _choose(names: list[str], where: str, libraries: Sequence[Library]) -> str:
    """Return the file of the tokenizer in a folder."""
    for name in (name for library in libraries for name in _NAMES[library]):
        if name in names:
            return name

    expected = " or ".join(_KINDS[library] for library in libraries)
    if others := sorted(TOKENIZER_NAMES & set(names)):
        raise NotSupportedError(
            f"{where}: expected {expected}, found {some(others)}. Name the family of this tokenizer in the card's "
            "`tokenizer_family`, or read it with `transformers.AutoTokenizer`, which may know it."
        )
    raise CheckpointNotFoundError(
        where, f"{where}: expected {expected}, found no tokenizer. Name its place in the card's `tokenizer`."
    )


def _read(
    path: Path,
    libraries: Sequence[Library],
    *,
    member: str | None = None,
    name: str | None = None,
    beside: Mapping[str, Path] | None = None,
) -> TokenizerFile:
    """Read a file, or a member of an archive.

    :param name: the name of the file, if its path has another one.
    :param beside: the files beside it, by their names; those that do not exist count as empty.
    """
    name = name if member is None and name is not None else (member or path.name)
    label = str(path) if member is None else f"{path}[{member}]"
    with open_regular(path) as (file, size):
        if member is None:
            data = _read_range(file, 0, size, label)
        elif file.read(4) == b"PK\x03\x04":
            data = _read_zipped(file, member, label)
        else:
            data = _read_range(file, *find_member(file, member, size=size, label=str(path)), label)
    refuse_lfs_pointer(data, label)

    library = _recognize(data, name, label)
    if library not in libraries:
        raise NotSupportedError(
            f"{label}: expected {' or '.join(_KINDS[each] for each in libraries)}, found {_KINDS[library]}. "
            "Name the family that reads it in the card's `tokenizer_family` (for `llama` also `impl` in "
            "`tokenizer_config`), or another file in its `tokenizer`."
        )
    config: dict[str, object] = {}
    if library == "tokenizers" and beside is not None:
        for each in (_SPECIAL, _CONFIG):
            config |= (read_config_json(beside[each]) if each in beside else None) or {}

    return TokenizerFile(library=library, label=label, data=data, config=config)


def _read_range(file: BinaryIO, offset: int, size: int, label: str) -> bytes:
    _require_size(size, label)
    file.seek(offset)

    return file.read(size)


def _read_zipped(file: BinaryIO, member: str, label: str) -> bytes:
    """Return the bytes of a member of a zip archive, in which fairseq published tokenizers."""
    try:
        with ZipFile(file) as archive:
            try:
                info = archive.getinfo(member)
            except KeyError:
                raise CheckpointNotFoundError(
                    label, f"{label}: expected such a member, found {some(archive.namelist()) or 'none at all'}."
                ) from None
            _require_size(info.file_size, label)
            with archive.open(info) as opened:
                return opened.read(info.file_size)  # no more, whatever the compressed bytes say
    except (BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise corrupt(label, "", expected="a readable member of a zip archive", found=f"an error: {error}") from None


def _require_size(size: int, label: str) -> None:
    if size > MAX_SIZE:
        raise CorruptModelCheckpointError(
            label, f"{label}: expected a tokenizer of at most {MAX_SIZE} bytes, found {size}. Fetch it again."
        )


def _recognize(data: bytes, name: str, label: str) -> Library:
    """Return the library that reads a file. Its bytes count, and its name only if they are inconclusive."""
    if _is_sentencepiece(data):
        return "sentencepiece"
    if name.endswith(".json") or data.lstrip()[:1] == b"{":
        return "tokenizers"
    if _is_tiktoken(data):
        return "tiktoken"
    if name.endswith(".model"):
        return "sentencepiece"

    raise NotSupportedError(
        f"{label}: expected {', '.join(_KINDS.values())}, found a file of another kind, which begins with "
        f"{data[:20]!r}. Name the file of the tokenizer in the card's `tokenizer`."
    )


def _is_sentencepiece(data: bytes) -> bool:
    """Return whether the data begins as a model of sentencepiece: a list of pieces, whose first has a text.

    Source: ``ModelProto`` and ``SentencePiece`` in sentencepiece_model.proto, by the wire format of protocol buffers:
    field 1 of the model is a piece (``0a``, its size), and field 1 of that its text (``0a``, its size).
    """
    if len(data) < 4 or data[0] != 0x0A or data[1] >= 0x80 or data[2] != 0x0A or data[3] + 2 > data[1]:
        return False
    try:
        return bool(data[4 : 4 + data[3]].decode())
    except UnicodeDecodeError:
        return False


def _is_tiktoken(data: bytes) -> bool:
    """Return whether the data is lines of a token in base64 and its rank, as in LLaMA 3's ``tokenizer.model``."""
    token, _, rank = data[:200].partition(b"\n")[0].partition(b" ")

    return bool(token) and rank.strip().isdigit() and token.isascii()
