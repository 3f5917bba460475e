"""Files of ranks that tiktoken reads, as that of LLaMA 3."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping, Sequence

from lading.formats.files import corrupt
from lading.models.tokenizers.vocabulary import VocabularyInfo, import_library


class TiktokenModel:
    """A ``tiktoken.Encoding``."""

    def __init__(
        self, data: bytes, label: str, *, split_regex: str, special_tokens: Sequence[str], names: Mapping[str, str]
    ) -> None:
        """
        :param split_regex: splits a text into the parts that are encoded on their own.
        :param special_tokens: the control tokens, whose indices follow those of the file.
        :param names: the control tokens by their roles, ``"bos"``, ``"eos"`` ….
        """
        package = import_library("tiktoken", label)
        ranks = _ranks(data, label)
        self._num_ranks = len(ranks)
        try:
            self.native = package.Encoding(
                name=label,
                pat_str=split_regex,
                mergeable_ranks=ranks,
                special_tokens={token: len(ranks) + i for i, token in enumerate(special_tokens)},
            )
        except Exception as error:  # tiktoken raises a ValueError, and others for what it does not expect
            raise corrupt(label, "", expected="a tokenizer that tiktoken reads", found=f"an error: {error}") from error

        indices = {f"{role}_idx": self.token_to_index(token) for role, token in names.items()}
        absent: dict[str, int | None] = dict.fromkeys(("unk_idx", "bos_idx", "eos_idx", "pad_idx"))
        self.vocab_info = VocabularyInfo(self.native.n_vocab, **(absent | indices))

    def encode(self, text: str) -> list[int]:
        indices: list[int] = self.native.encode(text, allowed_special="all")
        return indices

    def tokenize(self, text: str) -> list[str]:
        return [each.decode("utf-8", "replace") for each in self.native.decode_tokens_bytes(self.encode(text))]

    def decode(self, indices: Sequence[int], *, skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            indices = [index for index in indices if index < self._num_ranks]
        text: str = self.native.decode(indices)

        return text

    def detokenize(self, tokens: Sequence[str], *, skip_special_tokens: bool) -> str:
        indices = [self.native.encode_single_token(token) for token in tokens]

        return self.decode(indices, skip_special_tokens=skip_special_tokens)

    def token_to_index(self, token: str) -> int | None:
        try:
            index: int = self.native.encode_single_token(token)
        except KeyError:
            return None

        return index


def _ranks(data: bytes, label: str) -> dict[bytes, int]:
    """Return the tokens and their ranks: lines of a token in base64, a space, and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise corrupt(
                label, f"line {number}", expected="a token in base64 and its rank", found=repr(line[:80])
            ) from None

    # The control tokens come next.
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise corrupt(label, "", expected=f"the ranks 0 to {len(ranks) - 1}, each once", found="others")

    return ranks
