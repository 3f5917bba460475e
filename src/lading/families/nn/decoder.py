"""The stack of a decoder: embedding, layers of attention and feed-forward networks, and the final normalization.

The names of its parameters are those of Hugging Face checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lading.families.nn.attention import AttentionInputs, CausalSelfAttention, causal_mask, query_factors
from lading.families.nn.cache import KeyValueCache, SharedKeyValues
from lading.families.nn.decoder_spec import DecoderSpec
from lading.families.nn.experts import MixtureOfExperts
from lading.families.nn.ffn import GatedFeedForward
from lading.families.nn.latent_attention import LatentSelfAttention
from lading.families.nn.norm import RMSNorm
from lading.families.nn.rope import RotaryEmbedding
from lading.families.nn.rounding import scaled
from lading.families.nn.uninitialized import Embedding


class DecoderLayer(nn.Module):
    """Attention and a feed-forward network, each with a residual and normalized before, after, or both."""

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p

        attention = LatentSelfAttention if spec.latent is not None else CausalSelfAttention
        self.self_attn = attention(spec, layer)
        experts = spec.experts_of(layer)
        self.ffn_name = spec.ffn_name
        self.add_module(
            spec.ffn_name, GatedFeedForward.of(spec, layer) if experts is None else MixtureOfExperts(experts, spec)
        )

        # In Hugging Face's names, `post_attention_layernorm` is the first norm after attention: it normalizes the
        # output of attention, or else the input of the feed-forward network.
        self.norms = spec.norms
        if spec.norms != "after":
            self.input_layernorm = RMSNorm.of(spec, spec.model_dim)
        self.post_attention_layernorm = RMSNorm.of(spec, spec.model_dim)
        if spec.norms == "both":
            self.pre_feedforward_layernorm = RMSNorm.of(spec, spec.model_dim)
        if spec.norms != "before":
            self.post_feedforward_layernorm = RMSNorm.of(spec, spec.model_dim)

    def forward(self, x: Tensor, given: AttentionInputs) -> Tensor:
        """Apply the layer to (N, S, model_dim) → the same shape."""
        y = self.self_attn(x if self.norms == "after" else self.input_layernorm(x), given)
        if self.norms != "before":
            y = self.post_attention_layernorm(y)

        return self.apply_feed_forward(x + dropout(y, self.dropout_p, self.training))

    def apply_feed_forward(self, x: Tensor) -> Tensor:
        """Apply the second half of the layer to (N, S, model_dim) → the same shape."""
        ffn = getattr(self, self.ffn_name)
        if self.norms == "before":
            y = ffn(self.post_attention_layernorm(x))
        else:
            y = ffn(x if self.norms == "after" else self.pre_feedforward_layernorm(x))
            y = self.post_feedforward_layernorm(y)

        return x + dropout(y, self.dropout_p, self.training)


class Decoder(nn.Module):
    """Embedding, layers and the final normalization: token ids to hidden states."""

    layer_kls: ClassVar[type[DecoderLayer]] = DecoderLayer

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()

        self.dropout_p = spec.dropout_p
        self.embed_scale = spec.embed_scale
        self.wide_rotary = spec.wide_rotary

        # A pipeline stage has some of these modules and layers; the others are ``None``.
        self.embed_tokens: Embedding | None = Embedding(spec.vocab_size, spec.model_dim, padding_idx=spec.pad_idx)
        self.layers = nn.ModuleList(self.layer_kls(spec, layer) for layer in range(spec.num_layers))
        self.norm: RMSNorm | None = RMSNorm.of(spec, spec.model_dim)
        self.rotary_emb = RotaryEmbedding(spec.rotary_dim, theta=spec.rope_theta, scaling=spec.rope_scaling)
        self.window_rotary_emb: RotaryEmbedding | None = None
        if spec.window_rope_theta is not None:
            self.window_rotary_emb = RotaryEmbedding(spec.rotary_dim, theta=spec.window_rope_theta)

        self.windows = tuple(spec.window_of(layer) for layer in range(spec.num_layers))
        self.chunked = spec.chunked_attn
        self.temperature = spec.attn_temperature
        self.key_value_sources = spec.key_value_sources()

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Map token ids (N, S), or without an embedding hidden states (N, S, model_dim) → (N, S, model_dim).

        The other parameters are those of :meth:`lading.families.nn.decoder_lm.DecoderLM.forward`.
        """
        new = input_ids.size(1)
        past = 0 if cache is None else cache.num_tokens

        x = input_ids
        if self.embed_tokens is not None:
            x = self.embed_tokens(input_ids)
            if self.embed_scale != 1.0:
                x = scaled(x, self.embed_scale)
            x = dropout(x, self.dropout_p, self.training)

        if position_ids is None:
            position_ids = torch.arange(past, past + new, device=x.device)[None]
        rotary_dtype = torch.float32 if self.wide_rotary else x.dtype
        rotary = self.rotary_emb(position_ids, rotary_dtype)
        window_rotary = rotary
        if self.window_rotary_emb is not None:
            window_rotary = self.window_rotary_emb(position_ids, rotary_dtype)

        padding = None if attention_mask is None else attention_mask.to(x.device, torch.bool)
        layers = [pair for pair in zip(self.layers, self.windows, strict=True) if pair[0] is not None]
        masks = {
            window: causal_mask(new, past=past, window=window, padding=padding, device=x.device, chunked=self.chunked)
            for window in {window for _, window in layers}
        }
        factors = None
        if self.temperature is not None:
            factors = query_factors(self.temperature, new, past=past, device=x.device)

        shared = SharedKeyValues(self.key_value_sources)
        given = {
            window: AttentionInputs(
                rotary=rotary if window is None else window_rotary,
                mask=mask,
                cache=cache,
                factors=factors,
                shared=shared,
            )
            for window, mask in masks.items()
        }
        x = self.apply_layers(x, input_ids, [(layer, given[window]) for layer, window in layers])

        y: Tensor = x if self.norm is None else self.norm(x)

        return y

    def apply_layers(self, x: Tensor, input_ids: Tensor, layers: Sequence[tuple[nn.Module, AttentionInputs]]) -> Tensor:
        """Apply the layers, each with the inputs of its attention, to (N, S, model_dim) → the same shape.

        :param input_ids: as :meth:`forward` takes them.
        """
        for layer, given in layers:
            x = layer(x, given)

        return x
