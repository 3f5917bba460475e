"""The options of an encoder with a decoder, and its parallel plan."""

from __future__ import annotations

from dataclasses import dataclass

from lading.families.nn.checks import (
    require_dropout,
    require_layers,
    require_multiple,
    require_positive,
    require_size,
    require_symbol,
)
from lading.families.nn.shapes import Shapes, norm, projection, under, weight_and_bias
from lading.models.parallel_plan import ParallelPlan, Split

FILTER_KERNELS = (5, 5)
"""The kernel sizes of the convolutions over filter banks."""
FILTER_STRIDE = 2
"""The stride of each of them: four filter banks make a frame."""
FILTER_DIM = 1024
"""The output dimension of all but the last, before the gate halves it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderDecoderSpec:
    """The options of a Transformer with an encoder and a decoder (https://arxiv.org/abs/1706.03762).

    All layers normalize the inputs of their blocks, and both stacks their output.

    :raises ValueError: the sizes are not valid, such as a number of heads that doesn't divide ``model_dim``.
    """

    model_dim: int
    vocab_size: int
    pad_idx: int | None
    max_source_seq_len: int
    max_target_seq_len: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_encoder_attn_heads: int
    num_decoder_attn_heads: int
    ffn_inner_dim: int
    num_fbank_channels: int | None = None
    """The channels of filter banks, which the encoder reads instead of tokens."""
    first_source_position: int = 2
    """The position of the first token or frame of a source; targets count from 2."""
    tied_embeddings: bool = True
    """True if the output projection is the table of the decoder."""
    input_dropout_p: float
    """The dropout probability of the inputs of both stacks, with their positions."""
    dropout_p: float
    """The dropout probability of the outputs of attention and feed-forward blocks."""
    attn_dropout_p: float
    """The dropout probability of the attention weights."""
    ffn_inner_dropout_p: float

    def __post_init__(self) -> None:
        require_layers(self.num_encoder_layers)
        require_layers(self.num_decoder_layers)
        require_positive(self, "model_dim", "vocab_size", "max_source_seq_len", "max_target_seq_len", "ffn_inner_dim")
        require_positive(self, "num_encoder_attn_heads", "num_decoder_attn_heads")
        require_multiple(self, "model_dim", "num_encoder_attn_heads", "num_decoder_attn_heads")
        if self.model_dim % 2 != 0 or self.model_dim < 4:
            raise ValueError(
                f"`model_dim` must be even for sinusoidal positions, and 4 or more, but is {self.model_dim}"
            )
        if self.num_fbank_channels is not None:
            require_positive(self, "num_fbank_channels")
        if self.first_source_position < 0:
            raise ValueError(f"`first_source_position` must not be negative, but is {self.first_source_position}")
        require_size("`first_source_position`", self.first_source_position)
        require_symbol(self.pad_idx, self.vocab_size)
        require_dropout(self, "input_dropout_p", "dropout_p", "attn_dropout_p", "ffn_inner_dropout_p")

    def shapes(self) -> Shapes:
        """Return the names and shapes of the parameters of the model."""
        table = (self.vocab_size, self.model_dim)
        found = under("model.encoder", self.encoder_shapes())
        if self.num_fbank_channels is None:
            shared = "model.shared.weight"
            found = {shared: table} | found | {"model.encoder.embed_tokens.weight": shared}
            first: tuple[int, ...] | str = shared
        else:
            first = table
        found["model.decoder.embed_tokens.weight"] = first
        found |= under("model.decoder", self.decoder_shapes())
        tied = first if isinstance(first, str) else "model.decoder.embed_tokens.weight"

        return found | {"lm_head.weight": tied if self.tied_embeddings else table}

    def encoder_shapes(self) -> Shapes:
        """Return the parameters of the encoder, except for an embedding table."""
        found: Shapes = {}
        for i in range(self.num_encoder_layers):
            found |= under(f"layers.{i}", self._layer_shapes())
        found |= norm("layer_norm", self.model_dim)

        return found if self.num_fbank_channels is None else found | under("conv", subsampler_shapes(self))

    def decoder_shapes(self) -> Shapes:
        """Return the parameters of the decoder, except for its embedding table."""
        found: Shapes = {}
        for i in range(self.num_decoder_layers):
            found |= under(f"layers.{i}", self._layer_shapes() | self._attention_shapes("encoder_attn"))

        return found | norm("layer_norm", self.model_dim)

    def _layer_shapes(self) -> Shapes:
        dim, inner = self.model_dim, self.ffn_inner_dim

        return {
            **self._attention_shapes("self_attn"),
            **projection("fc1", dim, inner),
            **projection("fc2", inner, dim),
            **norm("final_layer_norm", dim),
        }

    def _attention_shapes(self, name: str) -> Shapes:
        dim = self.model_dim
        found: Shapes = {}
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found |= projection(f"{name}.{part}", dim, dim)

        return found | norm(f"{name}_layer_norm", dim)


def subsampler_shapes(spec: EncoderDecoderSpec) -> Shapes:
    """Return the parameters of the convolutions over filter banks."""
    found: Shapes = {}
    for i, (inputs, outputs, kernel_size) in enumerate(subsampler_convolutions(spec)):
        found |= weight_and_bias(f"conv_layers.{i}", (outputs, inputs, kernel_size))

    return found


def subsampler_convolutions(spec: EncoderDecoderSpec) -> list[tuple[int, int, int]]:
    """Return the input and output dimensions and the kernel size of each convolution over filter banks."""
    inputs = (spec.num_fbank_channels or 0, *[FILTER_DIM // 2] * (len(FILTER_KERNELS) - 1))
    outputs = (*[FILTER_DIM] * (len(FILTER_KERNELS) - 1), 2 * spec.model_dim)

    return list(zip(inputs, outputs, FILTER_KERNELS, strict=True))


def encoder_decoder_plan(spec: EncoderDecoderSpec) -> ParallelPlan:
    """Return the parallel plan of the model.

    It splits attention by heads, feed-forward networks by their inner width, tables by symbols. The convolutions over
    filter banks are not split.
    """
    tensor = {
        "model.shared": Split.VOCABULARY,
        "model.decoder.embed_tokens": Split.VOCABULARY,
        "model.*.layer_norm": Split.REPLICATED,
        "lm_head": Split.LOGITS,
    }
    layer = "model.*.layers.*"
    for attention in ("self_attn", "encoder_attn"):
        tensor |= {f"{layer}.{attention}.{name}": Split.COLUMN for name in ("q_proj", "k_proj", "v_proj")}
        tensor[f"{layer}.{attention}.out_proj"] = Split.ROW
        tensor[f"{layer}.{attention}_layer_norm"] = Split.REPLICATED
    tensor |= {
        f"{layer}.fc1": Split.COLUMN,
        f"{layer}.fc2": Split.ROW,
        f"{layer}.final_layer_norm": Split.REPLICATED,
    }

    return ParallelPlan(
        tensor=tensor,
        divisible={
            "num_encoder_attn_heads": spec.num_encoder_attn_heads,
            "num_decoder_attn_heads": spec.num_decoder_attn_heads,
            "ffn_inner_dim": spec.ffn_inner_dim,
        },
        units=(layer,),
    )
