"""The vocabulary of a tokenizer, and the protocol of the native models that read one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from lading.errors import NotSupportedError


@dataclass(frozen=True, slots=True)
class VocabularyInfo:
    """The size of a vocabulary, and the indices of its control tokens; ``None`` for one that it lacks."""

    size: int
    """The number of tokens; for a ``tokenizer.json``, as transformers counts them: without added tokens."""
    unk_idx: int | None
    """The index of the unknown token."""
    bos_idx: int | None
    """The index of the token that begins a sequence."""
    eos_idx: int | None
    """The index of the token that ends a sequence."""
    pad_idx: int | None
    """The index of the token for padding; ``None`` if that is the one that ends a sequence, as in fairseq2."""
    boh_idx: int | None = None
    """The index of the token that begins a header."""
    eoh_idx: int | None = None
    """The index of the token that ends a header."""

    def __post_init__(self) -> None:
        if self.pad_idx == self.eos_idx:
            object.__setattr__(self, "pad_idx", None)


class TokenModel(Protocol):
    """A vocabulary and its segmentation of text, behind the library that reads its file."""

    native: Any
    """The object of the library."""
    vocab_info: VocabularyInfo

    def encode(self, text: str) -> list[int]:
        """Return the indices of a text, without control tokens around it."""

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, likewise."""

    def decode(self, indices: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of indices.

        :raises LookupError: an index that the vocabulary lacks; a ``tokenizers.Tokenizer`` skips such indices.
        :raises OverflowError: a negative index.
        """

    def detokenize(self, tokens: Sequence[str], *, skip_special_tokens: bool) -> str:
        """Return the text of tokens; raise a ``LookupError`` for one that the vocabulary lacks."""

    def token_to_index(self, token: str) -> int | None:
        """Return the index of a token; ``None`` if the vocabulary lacks it."""


def import_library(package: str, label: str) -> Any:
    """Import the package that reads the tokenizer ``label``.

    :raises NotSupportedError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise NotSupportedError(
            f"{label} is read by the package {package}, which is not installed: "
            f"`pip install 'lading-hub[tokenizers]'`, or only `pip install {package}`."
        ) from error
