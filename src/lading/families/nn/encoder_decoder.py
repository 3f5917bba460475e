"""Transformers with an encoder and a decoder (https://arxiv.org/abs/1706.03762), and their random initialization.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import glu

from lading.families.nn.attention import bidirectional_mask, causal_mask
from lading.families.nn.encoder_decoder_spec import FILTER_STRIDE, EncoderDecoderSpec, subsampler_convolutions
from lading.families.nn.language_model import LanguageModel, generate_greedily
from lading.families.nn.positions import SinusoidalPositions
from lading.families.nn.transformer import (
    EncoderDecoderCache,
    EncoderOutput,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from lading.families.nn.uninitialized import Conv1d, Embedding, LayerNorm


class FilterBankSubsampler(nn.Module):
    """Frames from log-mel filter banks, by gated convolutions (https://arxiv.org/abs/1911.08460, section 2.1)."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__()

        self.conv_layers = nn.ModuleList(
            Conv1d(inputs, outputs, kernel_size, stride=FILTER_STRIDE, padding=kernel_size // 2)
            for inputs, outputs, kernel_size in subsampler_convolutions(spec)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, num_fbank_channels) → frames (N, T, model_dim)."""
        x = x.transpose(1, 2)
        for conv in self.conv_layers:
            x = glu(conv(x), dim=1)

        return x.transpose(1, 2)

    def num_frames(self, lengths: Tensor) -> Tensor:
        """Map numbers of filter banks → numbers of frames."""
        for _ in self.conv_layers:
            lengths = torch.div(lengths + FILTER_STRIDE - 1, FILTER_STRIDE, rounding_mode="floor")

        return lengths


class TransformerEncoder(nn.Module):
    """The layers of an encoder and the normalization of their output; a subclass says what it reads."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__()

        self.max_seq_len = spec.max_source_seq_len

        self.embed_positions = SinusoidalPositions(
            spec.model_dim, first=spec.first_source_position, dropout_p=spec.input_dropout_p
        )
        self.layers = nn.ModuleList(TransformerEncoderLayer(spec) for _ in range(spec.num_encoder_layers))
        self.layer_norm = LayerNorm(spec.model_dim)

    def encode(self, x: Tensor, padding: Tensor | None) -> EncoderOutput:
        """Encode (N, T, model_dim).

        :raises ValueError: the source is empty, or longer than ``max_source_seq_len``.
        """
        check_length("max_source_seq_len", self.max_seq_len, x.size(1))

        x = self.embed_positions(x, padding)
        mask = bidirectional_mask(padding)
        for layer in self.layers:
            x = layer(x, mask)

        return EncoderOutput(hidden=self.layer_norm(x), padding=padding)


class TextEncoder(TransformerEncoder):
    """An encoder of token ids."""

    def __init__(self, spec: EncoderDecoderSpec, embed_tokens: Embedding) -> None:
        super().__init__(spec)

        self.embed_tokens = embed_tokens

    def forward(self, source: Tensor, source_mask: Tensor | None) -> EncoderOutput:
        """Encode token ids (N, S); ``source_mask`` is as :meth:`EncoderDecoder.forward` takes it."""
        _check_mask("source_mask", source_mask, source.shape)

        return self.encode(self.embed_tokens(source), _padding(source_mask, source))


class FilterBankEncoder(TransformerEncoder):
    """An encoder of log-mel filter banks."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__(spec)

        self.conv = FilterBankSubsampler(spec)

    def forward(self, source: Tensor, source_mask: Tensor | None) -> EncoderOutput:
        """Encode (N, S, num_fbank_channels); ``source_mask`` is as :meth:`EncoderDecoder.forward` takes it."""
        return self.encode(*subsample(self.conv, source, source_mask))


def subsample(
    subsampler: FilterBankSubsampler, source: Tensor, source_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Map filter banks (N, S, num_fbank_channels) → frames (N, T, model_dim), and which are not padding, (N, T).

    :raises ValueError: the filter banks, or their mask, are of another shape.
    """
    channels = subsampler.conv_layers[0].in_channels
    if source.dim() != 3 or source.size(2) != channels or source.size(1) == 0:
        raise ValueError(f"`source` must be filter banks (N, S, {channels}), but is of shape {tuple(source.shape)}")
    _check_mask("source_mask", source_mask, source.shape[:2])

    x = subsampler(source)
    if source_mask is None:
        return x, None
    num_frames = subsampler.num_frames(source_mask.to(x.device).long().sum(1))

    return x, torch.arange(x.size(1), device=x.device) < num_frames[:, None]


class TransformerDecoder(nn.Module):
    """A decoder of token ids that attends to the output of an encoder."""

    def __init__(self, spec: EncoderDecoderSpec, embed_tokens: Embedding) -> None:
        super().__init__()

        self.max_seq_len = spec.max_target_seq_len

        self.embed_tokens = embed_tokens
        self.embed_positions = SinusoidalPositions(spec.model_dim, first=2, dropout_p=spec.input_dropout_p)
        self.layers = nn.ModuleList(TransformerDecoderLayer(spec, layer) for layer in range(spec.num_decoder_layers))
        self.layer_norm = LayerNorm(spec.model_dim)

    def forward(
        self,
        target: Tensor,
        target_mask: Tensor | None,
        encoded: EncoderOutput,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Map token ids (N, S) → hidden states (N, S, model_dim)."""
        new, past = target.size(1), 0 if cache is None else cache.num_tokens
        check_length("max_target_seq_len", self.max_seq_len, past + new)
        _check_mask("target_mask", target_mask, (target.size(0), past + new))

        padding = _padding(target_mask, target)
        x = self.embed_positions(self.embed_tokens(target), padding, past=past)
        mask = causal_mask(new, past=past, window=None, padding=padding, device=x.device)
        encoded_mask = bidirectional_mask(encoded.padding)
        for layer in self.layers:
            x = layer(x, mask, encoded.hidden, encoded_mask, cache)
        y: Tensor = self.layer_norm(x)

        return y


def _padding(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(like.device, torch.bool)


def _check_mask(name: str, mask: Tensor | None, shape: Sequence[int]) -> None:
    if mask is not None and mask.shape != tuple(shape):
        raise ValueError(f"`{name}` must be of shape {tuple(shape)}, but is of shape {tuple(mask.shape)}")


def check_length(name: str, most: int, length: int) -> None:
    """Require a sequence of 1 to ``most`` elements.

    :param name: the field with ``most``, for the message.

    :raises ValueError: its length is another.
    """
    if not 0 < length <= most:
        raise ValueError(f"the model's `{name}` is {most}, but the sequence is of length {length}")


class _Stacks(nn.Module):
    """The encoder, the decoder, and the table of token ids if both have the same."""

    def __init__(self, encoder: nn.Module, decoder: TransformerDecoder, shared: Embedding | None) -> None:
        super().__init__()

        if shared is not None:
            self.shared = shared
        self.encoder = encoder
        self.decoder = decoder


class EncoderDecoder(LanguageModel):
    """An encoder, a decoder and an output projection; their parameters are uninitialized.

    :param encoder: a module that maps a source and its mask to an :class:`EncoderOutput`.
    :param shared: the table of token ids if encoder and decoder have the same.
    """

    def __init__(
        self, spec: EncoderDecoderSpec, encoder: nn.Module, decoder: TransformerDecoder, shared: Embedding | None = None
    ) -> None:
        super().__init__()

        self.spec = spec

        self.model = _Stacks(encoder, decoder, shared)
        self._add_head(spec.model_dim, spec.vocab_size, tied=spec.tied_embeddings)

    def embedding(self) -> Embedding:
        """Return the module of the decoder's table."""
        return self.model.decoder.embed_tokens

    def forward(
        self,
        source: Tensor,
        source_mask: Tensor | None,
        target: Tensor,
        *,
        target_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Map a source and token ids of a target (N, S), int64 → logits (N, S, V) of the token after each.

        :param source: token ids (N, T), int64, or filter banks (N, T, C), as the family has it.
        :param source_mask: (N, T); 1 is a token or filter bank, 0 the padding after them.
        :param target_mask: (N, S_total), where S_total includes the tokens in ``cache``; 1 is a token, 0 padding.
        :param cache: the encoder's output, and the keys and values of earlier calls, to which those of this call are
            appended. The source is read in the first call only.
        :param last_only: whether to compute the logits of the last token only: (N, 1, V).

        :raises ValueError: the source or the target is empty, or longer than the configuration says, or a mask has
            another shape.
        """
        encoded = None if cache is None else cache.encoded
        if encoded is None:
            encoded = self.model.encoder(source, source_mask)
            if cache is not None:
                cache.encoded = encoded

        x = self.model.decoder(target, target_mask, encoded, cache)
        logits: Tensor = self.lm_head(x[:, -1:] if last_only else x)  # type: ignore[misc]

        return logits

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        source_mask: Tensor | None,
        target: Tensor,
        *,
        max_new_tokens: int,
        eos_id: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Continue ``target`` (N, S) greedily → (N, S + T) with T ≤ ``max_new_tokens``, including these first tokens.

        The mode of the module does not change: call ``eval()`` first on a model with dropout.

        :param source: as :meth:`forward` takes it; likewise ``source_mask``.
        :param target: the first tokens of each target: those that its tokenizer puts before a text, such as the end of
            a sequence and a language.
        :param eos_id: the token, or tokens, that end a sequence; the rest is filled with ``pad_idx``. The call returns
            when all sequences have ended.

        :raises ValueError: as :meth:`forward`; or ``target`` is empty, or ``max_new_tokens`` negative.
        """
        cache = EncoderDecoderCache()

        def step(ids: Tensor) -> Tensor:
            logits: Tensor = self(source, source_mask, ids, cache=cache, last_only=True)

            return logits[:, -1]

        return generate_greedily(
            step,
            target,
            max_new_tokens=max_new_tokens,
            max_seq_len=self.spec.max_target_seq_len,
            eos_id=eos_id,
            pad_idx=self.spec.pad_idx,
        )


class NLLB(EncoderDecoder):
    """A model from text to text, with one table of token ids for all three uses."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        shared = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)

        super().__init__(spec, TextEncoder(spec, shared), TransformerDecoder(spec, shared), shared)


class S2TTransformer(EncoderDecoder):
    """A model from filter banks to text."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        table = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)

        super().__init__(spec, FilterBankEncoder(spec), TransformerDecoder(spec, table))


@torch.no_grad()
def init_encoder_decoder(model: EncoderDecoder, name: str, parameter: Tensor) -> None:
    """Initialize ``parameter`` randomly.

    Tables are drawn from a normal distribution of variance ``1 / model_dim``; weights of projections, and of
    convolutions, uniformly, as in https://proceedings.mlr.press/v9/glorot10a.html. Biases and the embedding of padding
    become zero, norms one.

    :param name: the name of the parameter in ``model``, whose own tensor is not used.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)

    if leaf == "bias":
        parameter.zero_()
    elif isinstance(module, LayerNorm):
        parameter.fill_(1.0)
    elif isinstance(module, Embedding) or module is model.lm_head:
        nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
        if isinstance(module, Embedding) and module.padding_idx is not None:
            parameter[module.padding_idx].zero_()
    else:
        nn.init.xavier_uniform_(parameter)
