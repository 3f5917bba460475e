"""Multi-head attention, attention masks, and causal self-attention with grouped queries."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lading.families.nn.cache import KeyValueCache, SharedKeyValues
from lading.families.nn.decoder_spec import AttentionTemperature, DecoderSpec
from lading.families.nn.norm import RMSNorm, normalize
from lading.families.nn.rope import rotate, rotate_adjacent
from lading.families.nn.uninitialized import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMask:
    """The keys that each query attends to; without a tensor, all keys, or all up to the query."""

    visible: Tensor | None = None
    """The mask, bool, (N or 1, 1, S or 1, K)."""
    bias: Tensor | None = None
    """Numbers to add to the scores, (N or 1, heads, S, K), with ``-inf`` at invisible keys, instead of ``visible``."""
    is_causal: bool = False
    """True if a query attends to the keys up to its own; only with as many keys as queries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionInputs:
    """The inputs of the attention of a decoder layer besides the hidden states."""

    rotary: tuple[Tensor, Tensor]
    """Cosines and sines, each (N or 1, 1, S, rotary_dim / 2)."""
    mask: AttentionMask
    cache: KeyValueCache | None = None
    """The keys and values of earlier calls."""
    factors: Tensor | None = None
    """The factors of queries in layers without rotary embeddings, (S, 1); ``None`` means 1."""
    shared: SharedKeyValues = field(default_factory=SharedKeyValues)
    """The keys and values of this call that several layers attend to."""


def causal_mask(
    new: int, *, past: int, window: int | None, padding: Tensor | None, device: torch.device, chunked: bool = False
) -> AttentionMask:
    """Return the mask of ``new`` tokens after ``past`` others, over the keys that :class:`KeyValueCache` returns.

    :param window: the number of tokens, itself included, that a token attends to.
    :param padding: (N, past + new); false for padding.
    :param chunked: whether windows are chunks of ``window`` tokens, beginning behind the padding on the left.
    """
    total = past + new
    first = 0 if window is None else max(0, past - (window - 1))

    if padding is None:
        if new == 1 and (not chunked or window is None or total <= window):
            return AttentionMask()
        if past == 0 and (window is None or total <= window):
            return AttentionMask(is_causal=True)

    queries = torch.arange(past, total, device=device)[:, None]
    keys = torch.arange(first, total, device=device)[None, :]

    visible = keys <= queries
    if window is not None and chunked:
        start = 0 if padding is None else (padding.cumsum(-1) == 0).sum(-1)[:, None, None]
        visible = visible & ((keys - start) // window == (queries - start) // window)
    elif window is not None:
        visible &= keys > queries - window
    if padding is None:
        return AttentionMask(visible=visible[None, None])

    # The output at padding is unused, but softmax over an empty row gives NaN: let padding attend to itself.
    visible = (visible & padding[:, None, first:]) | (keys == queries)

    return AttentionMask(visible=visible[:, None])


def bidirectional_mask(padding: Tensor | None) -> AttentionMask:
    """Return the mask of queries that attend to all tokens.

    :param padding: bool, (N, K); false for padding.
    """
    if padding is None:
        return AttentionMask()

    # A row without any token attends to its padding, because softmax over an empty row gives NaN.
    visible = padding | ~padding.any(1, keepdim=True)

    return AttentionMask(visible=visible[:, None, None])


def query_factors(temperature: AttentionTemperature, new: int, *, past: int, device: torch.device) -> Tensor:
    """Return the factors of the queries of ``new`` tokens after ``past`` others: (new, 1), float32.

    Padding counts, as in transformers.
    """
    counts = torch.arange(past + 1, past + new + 1, device=device) // temperature.step

    return (temperature.scale * torch.log1p(counts.float()) + 1.0)[:, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, *, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """Attend with queries (N, H, S, head_dim) to keys and values (N, H / G, K, head_dim) → (N, S, H * head_dim).

    :param scale: the factor of the scores; ``None`` means ``head_dim ** -0.5``.
    """
    groups = q.size(1) // k.size(1)
    if groups > 1 and mask.visible is not None:
        # The fused kernels take grouped queries or a mask, not both.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)

    y = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask.visible if mask.bias is None else mask.bias,
        dropout_p=dropout_p,
        is_causal=mask.is_causal,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    )

    return y.transpose(1, 2).flatten(2)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Split (N, S, heads * head_dim) into (N, heads, S, head_dim).

    The number of heads follows from ``x``: under tensor parallelism a rank projects to its own heads only.
    """
    return torch.unflatten(x, -1, (-1, head_dim)).transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention (https://arxiv.org/abs/1706.03762) of a sequence to itself, or to other keys and values."""

    def __init__(self, model_dim: int, num_heads: int, *, dropout_p: float) -> None:
        super().__init__()

        self.head_dim = model_dim // num_heads
        self.dropout_p = dropout_p

        self.k_proj = Linear(model_dim, model_dim)
        self.v_proj = Linear(model_dim, model_dim)
        self.q_proj = Linear(model_dim, model_dim)
        self.out_proj = Linear(model_dim, model_dim)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project (N, K, model_dim) → two (N, H, K, head_dim)."""
        return split_heads(self.k_proj(x), self.head_dim), split_heads(self.v_proj(x), self.head_dim)

    def forward(self, x: Tensor, mask: AttentionMask, keys_and_values: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Map (N, S, model_dim) → the same shape.

        :param keys_and_values: as the method of this name returns them; by default those of ``x``.
        """
        k, v = self.keys_and_values(x) if keys_and_values is None else keys_and_values
        q = split_heads(self.q_proj(x), self.head_dim)
        y: Tensor = self.out_proj(attend(q, k, v, mask, dropout_p=self.dropout_p if self.training else 0.0))

        return y


class CausalSelfAttention(nn.Module):
    """Attention with grouped queries (https://arxiv.org/abs/2305.13245) and rotary positions.

    :param layer: the index of the layer, which identifies its keys and values in a cache.
    """

    def __init__(self, spec: DecoderSpec, layer: int) -> None:
        super().__init__()

        self.head_dim = spec.attn_head_dim
        self.window = spec.window_of(layer)
        self.layer = layer
        self.norm_whole = spec.norm_whole
        self.scale = spec.attn_scale
        self.rotate = None if layer in spec.unrotated_layers else rotate_adjacent if spec.adjacent_rotary else rotate
        self.rotated_eps = spec.norm_eps if spec.norm_rotated else None
        self.values_eps = spec.norm_eps if spec.v_norm else None
        self.source = spec.key_value_source_of(layer)

        queries, keys = spec.num_attn_heads * self.head_dim, spec.num_key_value_heads * self.head_dim
        self.q_proj = Linear(spec.model_dim, queries, bias=spec.qkv_proj_bias)
        if self.source is None:
            self.k_proj = Linear(spec.model_dim, keys, bias=spec.qkv_proj_bias)
            self.v_proj = Linear(spec.model_dim, keys, bias=spec.qkv_proj_bias)
        self.o_proj = Linear(queries, spec.model_dim, bias=spec.output_proj_bias)

        self.q_norm = RMSNorm.of(spec, queries if spec.norm_whole else self.head_dim) if spec.q_norm else None
        if self.source is None:
            self.k_norm = RMSNorm.of(spec, keys if spec.norm_whole else self.head_dim) if spec.k_norm else None

    def forward(self, x: Tensor, given: AttentionInputs) -> Tensor:
        """Apply attention to (N, S, model_dim) → the same shape."""
        q = self._rotated(self._normalized_heads(self.q_proj(x), self.q_norm), given.rotary)
        if self.rotate is None and given.factors is not None:
            q = (q * given.factors).to(q.dtype)
        k, v = self._keys_and_values(x, given) if self.source is None else given.shared.of(self.source)

        y: Tensor = self.o_proj(attend(q, k, v, given.mask, scale=self.scale))

        return y

    def _keys_and_values(self, x: Tensor, given: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the tokens that these may attend to, two (N, heads, K, head_dim)."""
        k = self._normalized_heads(self.k_proj(x), self.k_norm)
        v = split_heads(self.v_proj(x), self.head_dim)
        if self.values_eps is not None:
            v = normalize(v, self.values_eps).to(v.dtype)

        k = self._rotated(k, given.rotary)
        if given.cache is not None:
            k, v = given.cache.append(self.layer, k, v, window=self.window)
        given.shared.offer(self.layer, k, v)

        return k, v

    def _rotated(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        if self.rotate is None:
            return x
        # With angles in float32, the rotation is in float32 as well.
        y = self.rotate(x, *rotary).to(x.dtype)

        return y if self.rotated_eps is None else normalize(y, self.rotated_eps).to(x.dtype)

    def _normalized_heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """Normalize and split (N, S, heads * head_dim) → (N, heads, S, head_dim)."""
        if norm is None:
            return split_heads(x, self.head_dim)
        if self.norm_whole:
            return split_heads(norm(x), self.head_dim)

        y: Tensor = norm(torch.unflatten(x, -1, (-1, self.head_dim)))

        return y.transpose(1, 2)
