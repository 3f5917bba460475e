"""The layers of Transformers with an encoder and a decoder, and what the decoder keeps between tokens.

The names of parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from lading.families.nn.attention import AttentionMask, MultiHeadAttention
from lading.families.nn.cache import KeyValueCache
from lading.families.nn.encoder_decoder_spec import EncoderDecoderSpec
from lading.families.nn.uninitialized import LayerNorm, Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOutput:
    """The output of an encoder, which the decoder attends to."""

    hidden: Tensor
    """The hidden states, (N, T, model_dim)."""
    padding: Tensor | None
    """The mask over hidden states, bool, (N, T); false for padding. ``None`` means that all are in use."""


class EncoderDecoderCache(KeyValueCache):
    """Also the output of the encoder, and its keys and values in each layer of the decoder; all are computed once."""

    def __init__(self) -> None:
        super().__init__()

        self.encoded: EncoderOutput | None = None
        """The output of the encoder, as soon as it is computed."""
        self._projected: dict[int, tuple[Tensor, Tensor]] = {}

    def project(self, layer: int, attention: MultiHeadAttention, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of hidden states (N, T, model_dim) in ``attention`` of a layer."""
        if layer not in self._projected:
            k, v = attention.keys_and_values(encoded)
            self._projected[layer] = k.detach(), v.detach()

        return self._projected[layer]


class _Layer(nn.Module):
    """Self-attention and a feed-forward network; the inputs of both are normalized."""

    def __init__(self, spec: EncoderDecoderSpec, num_attn_heads: int) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p
        self.ffn_inner_dropout_p = spec.ffn_inner_dropout_p

        self.self_attn = MultiHeadAttention(spec.model_dim, num_attn_heads, dropout_p=spec.attn_dropout_p)
        self.self_attn_layer_norm = LayerNorm(spec.model_dim)
        self.fc1 = Linear(spec.model_dim, spec.ffn_inner_dim)
        self.fc2 = Linear(spec.ffn_inner_dim, spec.model_dim)
        self.final_layer_norm = LayerNorm(spec.model_dim)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + dropout(y, self.dropout_p, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y = dropout(relu(self.fc1(self.final_layer_norm(x))), self.ffn_inner_dropout_p, self.training)

        return self._add(x, self.fc2(y))


class TransformerEncoderLayer(_Layer):
    """Self-attention and a feed-forward network."""

    def __init__(self, spec: EncoderDecoderSpec) -> None:
        super().__init__(spec, spec.num_encoder_attn_heads)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """Apply the layer to (N, S, model_dim) → the same shape."""
        return self._feed_forward(self._add(x, self.self_attn(self.self_attn_layer_norm(x), mask)))


class TransformerDecoderLayer(_Layer):
    """Causal self-attention, attention to the encoder's output, and a feed-forward network.

    :param layer: the index of the layer, which identifies its keys and values in a cache.
    """

    def __init__(self, spec: EncoderDecoderSpec, layer: int) -> None:
        super().__init__(spec, spec.num_decoder_attn_heads)

        self.layer = layer

        self.encoder_attn = MultiHeadAttention(
            spec.model_dim, spec.num_decoder_attn_heads, dropout_p=spec.attn_dropout_p
        )
        self.encoder_attn_layer_norm = LayerNorm(spec.model_dim)

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        encoded: Tensor,
        encoded_mask: AttentionMask,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """Apply the layer to (N, S, model_dim) → the same shape.

        :param encoded: the hidden states of the encoder, (N, T, model_dim): a tensor by itself, because FSDP looks for
            inputs with a gradient in the arguments, but not inside of objects.
        """
        y = self.self_attn_layer_norm(x)
        held = self.self_attn.keys_and_values(y)
        if cache is not None:
            held = cache.append(self.layer, *held)
        x = self._add(x, self.self_attn(y, mask, held))

        if cache is None:
            held = self.encoder_attn.keys_and_values(encoded)
        else:
            held = cache.project(self.layer, self.encoder_attn, encoded)
        x = self._add(x, self.encoder_attn(self.encoder_attn_layer_norm(x), encoded_mask, held))

        return self._feed_forward(x)
