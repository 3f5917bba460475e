"""Tokenizers, their encoders and decoders, as fairseq2 0.8.1 has them: one class of each over all native models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import TYPE_CHECKING, Any, Final

from lading.errors import NotSupportedError
from lading.models.tokenizers.vocabulary import TokenModel, VocabularyInfo
from lading.system.needs import needs_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTokens:
    """The control tokens that a family puts around a text, by task, language and mode."""

    modes: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)
    """The tokens before and after a text in each mode, the default first; ``{lang}`` stands for the language."""
    task: str | None = None
    """The one task of the tokenizer, if it has any."""
    langs: Collection[str] = ()
    """The languages of the tokenizer, if it has any."""
    default_lang: str | None = None
    ignore: bool = False
    """Take any task, language and mode, and put nothing around a text."""

    def around(
        self, family: str, task: str | None, lang: str | None, mode: str | None
    ) -> tuple[Sequence[str], Sequence[str]]:
        """Return the tokens before and after a text.

        :raises NotSupportedError: the family has another task, or lacks the language or the mode.
        """
        if self.ignore:
            return (), ()
        _choose(family, "task", task, () if self.task is None else (self.task,), self.task)
        lang = _choose(family, "lang", lang, self.langs, self.default_lang)
        mode = _choose(family, "mode", mode, self.modes, next(iter(self.modes), None))
        if mode is None:
            return (), ()

        prefix, suffix = self.modes[mode]

        return [token.replace("{lang}", lang or "") for token in prefix], suffix


def _choose(
    family: str, parameter: str, value: str | None, choices: Collection[str], default: str | None
) -> str | None:
    value = default if value is None else value
    if value is None or value in choices:
        return value

    shown = sorted(choices) if parameter == "lang" else list(choices)
    text = ", ".join(map(repr, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
    raise NotSupportedError(
        f"create_encoder({parameter}=…) of a tokenizer of the family {family!r}: expected "
        f"{text or 'None, as it has none'}, found {value!r}. Pass what is expected, or state another "
        "`tokenizer_family` or `tokenizer_config` in the card."
    )


class Tokenizer:
    """A tokenizer: the native model of a vocabulary, and the control tokens that its family puts around a text."""

    def __init__(self, model: TokenModel, control: ControlTokens, *, family: str, label: str) -> None:
        self._model: Final = model
        self._control: Final = control
        self._family: Final = family
        self._label: Final = label

    def __repr__(self) -> str:
        return f"<Tokenizer: {self._family}, {self.vocab_info.size:,} tokens, {self._label}>"

    @property
    def model(self) -> Any:
        """The object of the library that reads the file: a ``tokenizers.Tokenizer``, a
        ``sentencepiece.SentencePieceProcessor`` or a ``tiktoken.Encoding``.
        """
        return self._model.native

    @property
    def vocab_info(self) -> VocabularyInfo:
        """The size of the vocabulary and its control tokens."""
        return self._model.vocab_info

    def encode(self, text: str, *, device: torch.device | str | None = None, pin_memory: bool = False) -> Tensor:
        """Return the indices of a text, with the control tokens of the default mode. *Shape:* (S).

        Raises what :meth:`create_encoder` does.
        """
        return self.create_encoder(device=device, pin_memory=pin_memory)(text)

    def decode(self, token_indices: Tensor | Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of indices, as a decoder does; :class:`TokenDecoder` describes the parameters and errors."""
        return self.create_decoder(skip_special_tokens=skip_special_tokens)(token_indices)

    def create_encoder(
        self,
        *,
        task: str | None = None,
        lang: str | None = None,
        mode: str | None = None,
        device: torch.device | str | None = None,
        pin_memory: bool = False,
    ) -> TokenEncoder:
        """Create an encoder that puts control tokens around a text, as the family of the tokenizer states.

        :param task: ``"translation"`` or ``"transcription"``, for the families that have tasks.
        :param lang: a language of the tokenizer, for the families that have languages.
        :param mode: a mode of the family, such as ``"prompt"`` (the end is left open) or ``"target"``.
        :param device: where to put the indices; default: torch's default device.
        :param pin_memory: put them in pinned memory.

        :raises NotSupportedError: the family lacks the task, the language or the mode, or the vocabulary lacks one of
            the control tokens.
        """
        prefix, suffix = self._control.around(self._family, task, lang, mode)

        return TokenEncoder(
            self._model, self._indices(prefix), self._indices(suffix), device=device, pin_memory=pin_memory
        )

    def create_raw_encoder(self, *, device: torch.device | str | None = None, pin_memory: bool = False) -> TokenEncoder:
        """Create an encoder that puts nothing around a text."""
        return TokenEncoder(self._model, {}, {}, device=device, pin_memory=pin_memory)

    def create_decoder(self, *, skip_special_tokens: bool = False) -> TokenDecoder:
        """Create a decoder.

        :param skip_special_tokens: leave control tokens out; sentencepiece always does.
        """
        return TokenDecoder(self._model, skip_special_tokens=skip_special_tokens)

    def _indices(self, tokens: Sequence[str]) -> dict[str, int]:
        indices = {}
        for token in tokens:
            found = self._model.token_to_index(token)
            if found is None:
                raise NotSupportedError(
                    f"{self._label}: expected the control token {token!r}, which the tokenizer family {self._family!r} "
                    "puts around a text, found a vocabulary without it. Name the family of this tokenizer in the "
                    "card's `tokenizer_family`, or encode without control tokens: `create_raw_encoder()`."
                )
            indices[token] = found

        return indices


class TokenEncoder:
    """An encoder of a tokenizer: text to indices."""

    def __init__(
        self,
        model: TokenModel,
        prefix: Mapping[str, int],
        suffix: Mapping[str, int],
        *,
        device: torch.device | str | None,
        pin_memory: bool,
    ) -> None:
        self._model = model
        self._prefix = prefix
        self._suffix = suffix
        self._device = device
        self._pin_memory = pin_memory

    def __call__(self, text: str) -> Tensor:
        """Return the indices of a text, int64. *Shape:* (S).

        :raises TorchNotFoundError: torch is not installed.
        """
        return self._tensor([*self._prefix.values(), *self._model.encode(text), *self._suffix.values()])

    def encode_as_tokens(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        return [*self._prefix, *self._model.tokenize(text), *self._suffix]

    @property
    def prefix_indices(self) -> Tensor | None:
        """The indices that this encoder puts before a text; ``None`` if it puts none. *Shape:* (S)."""
        return self._tensor(list(self._prefix.values())) if self._prefix else None

    @property
    def suffix_indices(self) -> Tensor | None:
        """The indices that it puts after a text, likewise."""
        return self._tensor(list(self._suffix.values())) if self._suffix else None

    def _tensor(self, indices: list[int]) -> Tensor:
        with needs_torch("Encoding a text"):
            import torch

        return torch.tensor(indices, dtype=torch.int64, device=self._device, pin_memory=self._pin_memory)


class TokenDecoder:
    """A decoder of a tokenizer: indices to text."""

    def __init__(self, model: TokenModel, *, skip_special_tokens: bool) -> None:
        self._model = model
        self._skip_special_tokens = skip_special_tokens

    def __call__(self, token_indices: Tensor | Sequence[int]) -> str:
        """Return the text of indices.

        :param token_indices: a tensor on any device or a sequence of integers. *Shape:* (S).

        :raises ValueError: another shape, or an index that the vocabulary lacks; with a ``tokenizer.json``, indices
            past the vocabulary are skipped.
        """
        shape = getattr(token_indices, "shape", (0,))
        if len(shape) != 1:
            raise ValueError(f"`token_indices` must be one-dimensional, but is of the shape {tuple(shape)}")

        indices = [index(each) for each in getattr(token_indices, "tolist", lambda: token_indices)()]
        try:
            return self._model.decode(indices, skip_special_tokens=self._skip_special_tokens)
        except (LookupError, OverflowError) as error:
            found = f"{min(indices)} to {max(indices)}"
            raise ValueError(f"`token_indices` must be indices of the vocabulary, but are {found}: {error}") from None

    def decode_from_tokens(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens.

        :raises ValueError: the vocabulary lacks one of them.
        """
        try:
            return self._model.detokenize(tokens, skip_special_tokens=self._skip_special_tokens)
        except LookupError as error:
            raise ValueError(f"`tokens` must be tokens of the vocabulary, but it lacks one: {error}") from None
