"""The decoder of Gemma 3n: layers with alternating updates, low-rank residuals and embeddings of their own.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.families.nn.altup import AltUp
from lading.families.nn.attention import AttentionInputs
from lading.families.nn.decoder import Decoder, DecoderLayer
from lading.families.nn.decoder_lm import DecoderLM
from lading.families.nn.ffn import activate
from lading.families.nn.gemma3n_spec import Gemma3nSpec
from lading.families.nn.norm import RMSNorm
from lading.families.nn.rounding import scaled
from lading.families.nn.uninitialized import Embedding, Linear


class Laurel(nn.Module):
    """A residual with learned changes of a low rank (https://arxiv.org/abs/2411.07501)."""

    def __init__(self, spec: Gemma3nSpec) -> None:
        super().__init__()

        self.linear_left = Linear(spec.model_dim, spec.laurel_rank, bias=False)
        self.linear_right = Linear(spec.laurel_rank, spec.model_dim, bias=False)
        self.post_laurel_norm = RMSNorm.of(spec, spec.model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → the same shape."""
        y: Tensor = x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))

        return y


class Gemma3nLayer(DecoderLayer):
    """A layer that computes one state of each token, and adds the token's embedding for this layer to the others."""

    def __init__(self, spec: Gemma3nSpec, layer: int) -> None:
        super().__init__(spec, layer)

        self.activation = spec.ffn_activation
        self.correct_scale = spec.altup_correct_scale

        self.altup = AltUp(spec)
        self.laurel = Laurel(spec)
        self.per_layer_input_gate = Linear(spec.model_dim, spec.hidden_size_per_layer_input, bias=False)
        self.per_layer_projection = Linear(spec.hidden_size_per_layer_input, spec.model_dim, bias=False)
        self.post_per_layer_input_norm = RMSNorm.of(spec, spec.model_dim)

    def forward(self, x: Tensor, given: AttentionInputs, per_layer_input: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the layer to states (A, N, S, model_dim) → the same shape.

        :param per_layer_input: the embeddings of the tokens for this layer, (N, S, hidden_size_per_layer_input).
        """
        predicted = self.altup.predict(x)
        active = predicted[self.altup.active]

        normed = self.input_layernorm(active)
        y = self.post_attention_layernorm(self.self_attn(normed, given))
        y = active + dropout(y, self.dropout_p, self.training)
        y = self.apply_feed_forward((y + self.laurel(normed)) / 2**0.5)

        corrected = self.altup.correct(predicted, y)
        gate = corrected[self.altup.active]
        if self.correct_scale:
            gate = self.altup(gate)
        added = self.per_layer_projection(activate(self.per_layer_input_gate(gate), self.activation) * per_layer_input)

        # To all states but the first, whichever is the active one.
        return torch.cat((corrected[:1], corrected[1:] + self.post_per_layer_input_norm(added)))


class Gemma3nDecoder(Decoder):
    """The stack of these layers."""

    layer_kls: ClassVar[type[DecoderLayer]] = Gemma3nLayer

    def __init__(self, spec: Gemma3nSpec) -> None:
        super().__init__(spec)

        self.embed_tokens_per_layer = Embedding(
            spec.vocab_size_per_layer_input, spec.per_layer_dim, padding_idx=spec.pad_idx
        )
        self.per_layer_model_projection = Linear(spec.model_dim, spec.per_layer_dim, bias=False)
        self.per_layer_projection_norm = RMSNorm.of(spec, spec.hidden_size_per_layer_input)

        self.altup_projections, self.altup_unembed_projections = (
            nn.ModuleList(Linear(spec.model_dim, spec.model_dim, bias=False) for _ in range(1, spec.altup_num_inputs))
            for _ in range(2)
        )

    def apply_layers(self, x: Tensor, input_ids: Tensor, layers: Sequence[tuple[nn.Module, AttentionInputs]]) -> Tensor:
        """Apply the layers to (N, S, model_dim) → the same shape, the mean of the states of each token."""
        inputs = self._per_layer_inputs(x, input_ids).unbind(2)

        size = _root_mean_square(x)
        states = torch.stack((x, *(_resized(project(x), size) for project in self.altup_projections)))
        for (layer, given), own in zip(layers, inputs, strict=True):
            states = layer(states, given, own)

        first, *others = states.unbind()
        size = _root_mean_square(first)
        pairs = zip(self.altup_unembed_projections, others, strict=True)

        return torch.stack((first, *(_resized(project(state), size) for project, state in pairs))).mean(0)

    def _per_layer_inputs(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Return the input of each layer: embeddings (N, S, model_dim) → (N, S, num_layers, width)."""
        table, norm = self.embed_tokens_per_layer, self.per_layer_projection_norm
        width = norm.weight.size(-1)

        projected = scaled(self.per_layer_model_projection(x), x.size(-1) ** -0.5).view(*x.shape[:-1], -1, width)
        # The symbols of images and sounds, which come last, have no embeddings per layer.
        known = torch.where(input_ids < table.num_embeddings, input_ids, 0)
        looked_up = scaled(table(known), width**0.5).view_as(projected)

        return scaled(norm(projected) + looked_up, 2**-0.5)


class Gemma3n(DecoderLM):
    """A Gemma 3n language model."""

    decoder_kls: ClassVar[type[Decoder]] = Gemma3nDecoder


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _resized(x: Tensor, size: Tensor) -> Tensor:
    """Scale (…, dim) to a root mean square of ``size`` (…, 1)."""
    return x * size / x.square().mean(-1, keepdim=True).clamp(min=1e-5).sqrt()
