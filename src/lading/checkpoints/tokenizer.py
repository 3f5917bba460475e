"""The tokenizer of a card, by the library of its files: tokenizers, or sentencepiece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lading.cards.card import AssetCard, checkpoint_ref
from lading.catalog.own_store import CardStore, open_store
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
from lading.checkpoints.names import find_card
from lading.errors import CheckpointNotFoundError, CorruptModelCheckpointError, ModelGatedError, NotSupportedError
from lading.formats.files import open_regular, refuse_lfs_pointer
from lading.formats.folder import container_of, folder_of
from lading.formats.tar import find_member
from lading.sources.open import has_folders
from lading.system.uris import uri_path

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_SIZE = 256 << 20
"""The most bytes of a tokenizer's file; the largest published ones have a tenth of it."""


def load_tokenizer(
    card: AssetCard | str | Path,
    *,
    revision: str | None = None,
    progress: bool = True,
    store: CardStore | None = None,
) -> Tokenizer | Any:
    """Load the tokenizer of a model: a ``tokenizers.Tokenizer`` if there is a ``tokenizer.json``, else a
    ``sentencepiece.SentencePieceProcessor`` if there is a model of sentencepiece.

    The card's ``tokenizer`` states its place, or that of the card that ``tokenizer_ref`` names; without either, it is
    beside the checkpoint. This fetches it if it is missing here. Anything beyond that, such as a symbol before each
    text, is in the file, or up to the caller.

    :param card: as ``load_model`` takes it, or the path of the tokenizer's file; likewise ``revision``.
    :param progress: show a bar on stderr.

    :raises ModelNotKnownError: it is not a card, a path or a repository of the hub.
    :raises AssetCardError: references that form a circle, or a field of another type.
    :raises CheckpointNotFoundError: nothing is at the place of the tokenizer (also a ``FileNotFoundError``).
    :raises CorruptModelCheckpointError: the file is not what its name says.
    :raises NotSupportedError: a tokenizer of another kind, or the package that reads it is not installed.
    :raises FetchError: its source cannot be reached.
    """
    found = find_card(card, store, revision=revision)
    if isinstance(found, Path):
        return _local(found)

    card, store = found, open_store(store)
    ref = checkpoint_ref(card)
    stated = tokenizer_ref(card, store.retrieve_card)
    if stated is None:
        ref = address_of(card)
        if not ref.uri:
            raise ModelGatedError(card.title, ref.info_url)
        path = uri_path(ref.uri)
        if path is not None:
            path = local_checkpoint(path, inner_path=ref.path)
            return _local(folder_of(path))
        if not has_folders(ref.uri):
            raise NotSupportedError(
                f"The card {card.name!r} names no tokenizer, and its checkpoint is one file of a server: {ref.shown}. "
                "Name the tokenizer in the card's `tokenizer`, or that of another card in its `tokenizer_ref`."
            )
        stated = TokenizerRef(uri=ref.uri, path=ref.path)

    path = uri_path(stated.uri)
    if path is not None:
        return _local(path if stated.path is None else path / stated.path)

    known = store.checkpoint(ref.key) if ref.uri and same_source(stated, ref) else None

    revision = None if known is None else known.revision or None
    elsewhere = tokenizer_elsewhere(stated, settings=store.settings, revision=revision)
    assert elsewhere is not None  # it is not on this machine

    return _remote(elsewhere, store, ref.key if ref.uri else "", progress=progress)


def _local(path: Path) -> Any:
    archive = container_of(path)
    if archive is not None:
        return _read(archive, path.relative_to(archive).as_posix())
    if path.is_dir():
        path = path / _choose([entry.name for entry in path.iterdir()], str(path))

    return _read(path)


def _remote(elsewhere: RemoteTokenizer, store: AssetStore, checkpoint: str, *, progress: bool) -> Any:
    names = {file.name.rpartition("/")[2]: file for file in elsewhere.files}
    name = next(iter(names)) if len(names) == 1 else _choose(list(names), elsewhere.source.uri)
    (fetched,) = replace(elsewhere, files=(names[name],)).fetch(store, checkpoint, progress=progress)

    return _read(fetched.path, elsewhere.member, name=name)


def _choose(names: list[str], where: str) -> str:
    """Return the file of the tokenizer in a folder."""
    for name in (TOKENIZER_JSON, *SENTENCEPIECE_NAMES):
        if name in names:
            return name

    others = sorted(TOKENIZER_NAMES & set(names))
    if others:
        raise NotSupportedError(
            f"{where}: expected {TOKENIZER_JSON} or a model of sentencepiece, found {', '.join(others)}, which neither "
            "tokenizers nor sentencepiece reads as they are. `transformers.AutoTokenizer` may."
        )
    raise CheckpointNotFoundError(
        where,
        f"{where}: expected {TOKENIZER_JSON} or {SENTENCEPIECE_NAMES[0]}, found no tokenizer. Name "
        "its place in the card's `tokenizer`.",
    )


def _read(path: Path, member: str | None = None, *, name: str | None = None) -> Any:
    """Return the tokenizer in a file, or in a member of an archive.

    :param name: the name of the file, if its path has another one.
    """
    name = name if member is None and name is not None else (member or path.name)
    label = str(path) if member is None else f"{path}[{member}]"
    with open_regular(path) as (file, size):
        offset, length = (0, size) if member is None else find_member(file, member, size=size, label=str(path))
        if length > MAX_SIZE:
            raise CorruptModelCheckpointError(
                label, f"{label}: expected a tokenizer of at most {MAX_SIZE} bytes, found {length}. Fetch it again."
            )
        file.seek(offset)
        data = file.read(length)
    refuse_lfs_pointer(data, label)

    # The bytes count, and the name only if they are inconclusive.
    is_sentencepiece = _is_sentencepiece(data)
    if not is_sentencepiece and (name.endswith(".json") or data.lstrip()[:1] == b"{"):
        return _parse("tokenizers", label, lambda package: package.Tokenizer.from_buffer(data))
    if not is_sentencepiece and _is_tiktoken(data):
        raise NotSupportedError(
            f"{label}: expected a model of sentencepiece, found ranks of tiktoken. Use the tokenizer.json that is "
            "published with the same model in Hugging Face's form: name it in the card's `tokenizer`."
        )

    if not is_sentencepiece and not name.endswith(".model"):
        raise NotSupportedError(
            f"{label}: expected a tokenizer.json or a model of sentencepiece, found a file of another kind, which "
            f"begins with {data[:20]!r}."
        )

    return _parse("sentencepiece", label, lambda package: package.SentencePieceProcessor(model_proto=data))


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

    return bool(token) and rank.isdigit() and token.isascii()


def _parse(package: str, label: str, parse: Callable[[Any], Any]) -> Any:
    try:
        module = import_module(package)
    except ImportError as error:
        raise NotSupportedError(
            f"{label} is read by the package {package}, which is not installed: `pip install {package}`."
        ) from error

    try:
        return parse(module)
    except Exception as error:  # tokenizers raises a bare Exception, sentencepiece a RuntimeError
        raise CorruptModelCheckpointError(
            label, f"{label} is not a tokenizer that {package} reads: {error}. Fetch it again."
        ) from error
