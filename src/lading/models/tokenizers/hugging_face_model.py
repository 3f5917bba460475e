"""Files ``tokenizer.json`` of Hugging Face, read as transformers reads them together with the files beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lading.formats.files import corrupt
from lading.models.tokenizers.vocabulary import VocabularyInfo, import_library

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The fields of ``tokenizer_config.json`` that name a control token."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""The texts that ``clean_up_tokenization_spaces`` writes without their spaces, in this order."""


class HuggingFaceModel:
    """A ``tokenizers.Tokenizer``."""

    def __init__(self, data: bytes, label: str, *, config: Mapping[str, object], names: Mapping[str, str]) -> None:
        """
        :param config: the content of the ``tokenizer_config.json`` beside the file; empty without one.
        :param names: the control tokens by their roles, ``"bos"``, ``"eos"`` …, in place of those that ``config`` says.
        """
        package = import_library("tokenizers", label)
        try:
            self.native = package.Tokenizer.from_buffer(data)
        except Exception as error:  # tokenizers raises a bare Exception
            raise corrupt(
                label, "", expected="a tokenizer that tokenizers reads", found=f"an error: {error}"
            ) from error

        stated = bool(config)
        # The file may state both, which hold for batches of a pipeline and would cut single texts.
        if (padding := self.native.padding) is not None:
            config = {"pad_token": padding["pad_token"], **config}
        self.native.no_truncation()
        self.native.no_padding()
        # In one call: each call indexes all added tokens again, which takes 5 ms for the 6,000 of Gemma.
        self.native.add_tokens(list(_added_tokens(config, label, package)))
        # As transformers does, which takes a missing field for a false one, and leaves the file as it is for a null.
        prefix_space = config.get("add_prefix_space", False)
        if stated and isinstance(prefix_space, bool) and hasattr(self.native.pre_tokenizer, "add_prefix_space"):
            self.native.pre_tokenizer.add_prefix_space = prefix_space

        self._cleans = config.get("clean_up_tokenization_spaces") is True

        def index(role: str) -> int | None:
            token = names.get(role) or _content(config.get(f"{role}_token"))
            return None if token is None else self.token_to_index(token)

        size = self.native.get_vocab_size(with_added_tokens=False)
        self.vocab_info = VocabularyInfo(size, *map(index, ("unk", "bos", "eos", "pad", "boh", "eoh")))

    def encode(self, text: str) -> list[int]:
        indices: list[int] = self.native.encode(text, add_special_tokens=False).ids
        return indices

    def tokenize(self, text: str) -> list[str]:
        return [self.native.id_to_token(index) for index in self.encode(text)]

    def decode(self, indices: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self.native.decode(indices, skip_special_tokens=skip_special_tokens)
        if self._cleans:
            for spaced in _SPACED:
                text = text.replace(spaced, spaced.strip())

        return text

    def detokenize(self, tokens: Sequence[str], *, skip_special_tokens: bool) -> str:
        indices = []
        for token in tokens:
            index = self.token_to_index(token)
            index = self.vocab_info.unk_idx if index is None else index
            if index is None:
                raise LookupError(token)
            indices.append(index)

        return self.decode(indices, skip_special_tokens=skip_special_tokens)

    def token_to_index(self, token: str) -> int | None:
        index: int | None = self.native.token_to_id(token)
        return index


def _added_tokens(config: Mapping[str, object], label: str, package: Any) -> Iterator[Any]:
    """Yield the tokens that ``tokenizer_config.json`` adds, in the order in which transformers adds them; it leaves
    those that the tokenizer has as they are.
    """
    added = config.get("added_tokens_decoder") or {}
    try:
        for _, entry in sorted(added.items(), key=lambda item: int(item[0])):  # type: ignore[attr-defined]
            yield package.AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in _FLAGS if flag in entry})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise corrupt(
            label,
            "tokenizer_config.json beside it, added_tokens_decoder",
            expected="a mapping from indices to tokens",
            found=f"an error: {error!r}",
        ) from None

    others = config.get("additional_special_tokens")
    for token in (*(config.get(name) for name in _NAMED), *(others if isinstance(others, list) else ())):
        if content := _content(token):
            yield package.AddedToken(content, special=True)


def _content(token: object) -> str | None:
    """Return the text of a token, which the file states alone or in a mapping with its flags."""
    content = token.get("content") if isinstance(token, Mapping) else token

    return content if isinstance(content, str) else None
