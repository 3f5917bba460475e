"""The options by which the decoder families differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeAlias

from lading.families.nn.checks import (
    require_dropout,
    require_layers,
    require_multiple,
    require_positive,
    require_size,
    require_symbol,
    shared_fields,
)
from lading.families.nn.experts_spec import ExpertsSpec, gated_shapes
from lading.families.nn.latent_spec import LatentSpec
from lading.families.nn.rope_scaling import Scaling
from lading.families.nn.shapes import Shapes, projection, under

Activation: TypeAlias = Literal["silu", "gelu_tanh"]
"""The activation of a gated feed-forward network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionTemperature:
    """The growth of attention scores with the position of the query, which keeps attention sharp over long contexts
    (https://arxiv.org/abs/2501.19399): query ``i``, counted from 1, is multiplied by ``1 + scale * ln(1 + i // step)``.

    :raises ValueError: ``scale`` is negative, or ``step`` is not positive.
    """

    scale: float
    step: int

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise ValueError(f"`scale` of the attention temperature must not be negative, but is {self.scale}")
        require_positive(self, "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """The options of the shared decoder.

    :raises ValueError: the sizes are not valid, such as key/value heads that don't divide the attention heads.
    """

    model_dim: int
    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_attn_heads: int
    num_key_value_heads: int
    ffn_inner_dim: int
    norm_eps: float
    rope_theta: float

    # Embeddings and logits
    pad_idx: int | None = None
    tied_embeddings: bool = False
    """True if the output projection *is* the embedding table."""
    embed_scale: float = 1.0
    """The factor of embeddings, applied in their dtype."""
    final_logit_soft_cap: float | None = None
    """The bound of the logits, which they approach as a hyperbolic tangent does."""

    # Attention
    head_dim: int | None = None
    """The width of an attention head; ``None`` means ``model_dim // num_attn_heads``."""
    qkv_proj_bias: bool = False
    output_proj_bias: bool = False
    q_norm: bool = False
    """True if queries are normalized per head, before the rotary embedding."""
    k_norm: bool = False
    v_norm: bool = False
    """True if values are normalized per head, without a weight."""
    norm_whole: bool = False
    """True if ``q_norm`` and ``k_norm`` normalize all heads together."""
    attn_scale: float | None = None
    """The factor of the attention scores; ``None`` means ``head_dim ** -0.5``."""
    num_kv_shared_layers: int = 0
    """The number of layers, from the last, that attend to the keys and values of the last layer before these with the
    same window."""
    latent: LatentSpec | None = None
    """The options of latent attention, in place of attention with grouped queries."""

    # Windows of attention
    attn_window_len: int | None = None
    """The number of tokens, itself included, that a token attends to."""
    full_attn_layers: frozenset[int] = frozenset()
    """The indices of layers without a window."""
    chunked_attn: bool = False
    """True if windows are chunks: a token attends to the tokens of its chunk, up to itself."""

    # Positions
    rope_scaling: Scaling | None = None
    window_rope_theta: float | None = None
    """The ``rope_theta`` of layers with a window, without scaling; ``None`` if it is that of all layers."""
    wide_rotary: bool = False
    """True if queries and keys are rotated in float32, whatever their dtype."""
    adjacent_rotary: bool = False
    """True if rotary embeddings turn neighboring channels of a head together, instead of its two halves."""
    norm_rotated: bool = False
    """True if queries and keys are normalized per head after the rotary embedding, without a weight, in layers with
    rotary embeddings."""
    unrotated_layers: frozenset[int] = frozenset()
    """The indices of layers without rotary embeddings."""
    attn_temperature: AttentionTemperature | None = None
    """The temperature of attention in layers without rotary embeddings."""

    # Feed-forward networks
    ffn_name: Literal["mlp", "feed_forward"] = "mlp"
    """The name of the feed-forward network in a layer."""
    ffn_bias: bool = False
    ffn_activation: Activation = "silu"
    ffn_inner_dims: tuple[int, ...] | None = None
    """The inner width of the feed-forward network of each layer; ``None`` if all have ``ffn_inner_dim``."""
    ffn_sparsity: tuple[float, ...] | None = None
    """The share of the gates that are closed in each layer, by their distribution; ``None`` if none are."""
    experts: ExpertsSpec | None = None
    """The experts, in place of the feed-forward network of some or all layers."""

    # Normalization and dropout
    norms: Literal["before", "after", "both"] = "before"
    """The position of normalizations: before each block, after it (before the residual is added), or both."""
    wide_norm: bool = False
    """True if the weights of normalizations are applied in float32, whatever the dtype."""
    norm_offset: float = 0.0
    """The number that is added to the weights of normalizations."""
    dropout_p: float = 0.0
    """The dropout probability of the embeddings and of the outputs of attention and feed-forward blocks."""

    def __post_init__(self) -> None:
        require_layers(self.num_layers)
        require_positive(
            self,
            "model_dim",
            "vocab_size",
            "max_seq_len",
            "num_attn_heads",
            "num_key_value_heads",
            "attn_head_dim",
            "ffn_inner_dim",
            "norm_eps",
            "rope_theta",
            "embed_scale",
        )
        optional = ("window_rope_theta", "attn_window_len", "attn_scale", "final_logit_soft_cap")
        require_positive(self, *(name for name in optional if getattr(self, name) is not None))
        require_multiple(self, "num_attn_heads", "num_key_value_heads")
        width = self.attn_head_dim
        if self.latent is not None:
            width = max(self.latent.query_dim, self.latent.head_dim + self.latent.value_dim)
        require_size("the width of all attention heads together", self.num_attn_heads * width)
        if self.attn_head_dim % 2 != 0:
            raise ValueError(f"the heads must be of even width for rotary embeddings, but are of {self.attn_head_dim}")
        if self.latent is not None and self.num_key_value_heads != self.num_attn_heads:
            raise ValueError(
                f"`num_key_value_heads` must be `num_attn_heads` in latent attention, but they are "
                f"{self.num_key_value_heads} and {self.num_attn_heads}"
            )
        require_symbol(self.pad_idx, self.vocab_size)
        require_dropout(self, "dropout_p")
        self._check_layers()
        self._check_shared_layers()

    def _check_layers(self) -> None:
        if self.experts is not None and self.experts.layers is not None:
            strange = sorted(layer for layer in self.experts.layers if not 0 <= layer < self.num_layers)
            if strange:
                raise ValueError(
                    f"the layers with experts must be among the {self.num_layers} layers, but {strange[0]} is not"
                )
        for name in ("ffn_inner_dims", "ffn_sparsity"):
            given = getattr(self, name)
            if given is not None and len(given) != self.num_layers:
                raise ValueError(
                    f"`{name}` must have one for each of the {self.num_layers} layers, but has {len(given)}"
                )
        for width in self.ffn_inner_dims or ():
            if not width > 0:
                raise ValueError(f"`ffn_inner_dims` must be positive, but one is {width}")
            require_size("each of `ffn_inner_dims`", width)
        if wrong := [share for share in self.ffn_sparsity or () if not 0 <= share < 1]:
            raise ValueError(f"`ffn_sparsity` must be in [0, 1), but one is {wrong[0]}")

    def _check_shared_layers(self) -> None:
        if not 0 <= self.num_kv_shared_layers < self.num_layers:
            raise ValueError(
                f"`num_kv_shared_layers` must be from 0 to {self.num_layers - 1}, one less than there are layers, but "
                f"is {self.num_kv_shared_layers}"
            )
        sources = self._sources_by_window()
        for layer in range(self.num_layers - self.num_kv_shared_layers, self.num_layers):
            if self.window_of(layer) not in sources:
                raise ValueError(
                    f"each of the last `num_kv_shared_layers`, {self.num_kv_shared_layers}, attends to the keys and "
                    f"values of a layer before these with the same window, but layer {layer} has none"
                )

    @classmethod
    def of(cls, config: Any, **others: Any) -> Self:
        """Return the switches that a configuration has under their names, and ``others``.

        :raises ValueError: sizes that make no decoder.
        """
        return cls(**shared_fields(cls, config) | others)

    def normalized(self) -> Self:
        """Return the switches without those that make no difference: equal ones make equal models."""
        same = replace(self, head_dim=self.attn_head_dim)
        if any(self.window_of(layer) is not None for layer in range(self.num_layers)):
            return same

        return replace(
            same,
            attn_window_len=None,
            full_attn_layers=frozenset(),
            chunked_attn=False,
            window_rope_theta=None,
        )

    def with_experts(self, experts: ExpertsSpec) -> Self:
        """Return the switches with experts, whose layers are ``None`` if all have them."""
        everywhere = experts.layers is not None and len(experts.layers) == self.num_layers

        return replace(self, experts=replace(experts, layers=None) if everywhere else experts)

    @property
    def attn_head_dim(self) -> int:
        """The width of an attention head."""
        return self.model_dim // self.num_attn_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """The width of the part of an attention head that the rotary embedding turns."""
        return self.attn_head_dim if self.latent is None else self.latent.rotary_dim

    def window_of(self, layer: int) -> int | None:
        """Return the attention window of layer ``layer``, or ``None`` if it attends to all tokens before."""
        return None if layer in self.full_attn_layers else self.attn_window_len

    def experts_of(self, layer: int) -> ExpertsSpec | None:
        """Return the experts of layer ``layer``, or ``None`` if it has a single feed-forward network."""
        if self.experts is None or self.experts.layers is None or layer in self.experts.layers:
            return self.experts

        return None

    def ffn_inner_dim_of(self, layer: int) -> int:
        """Return the inner width of the feed-forward network of layer ``layer``."""
        return self.ffn_inner_dim if self.ffn_inner_dims is None else self.ffn_inner_dims[layer]

    def ffn_sparsity_of(self, layer: int) -> float:
        """Return the share of the gates that are closed in layer ``layer``."""
        return 0.0 if self.ffn_sparsity is None else self.ffn_sparsity[layer]

    def key_value_source_of(self, layer: int) -> int | None:
        """Return the layer whose keys and values layer ``layer`` attends to, or ``None`` if it has its own."""
        if layer < self.num_layers - self.num_kv_shared_layers:
            return None

        return self._sources_by_window()[self.window_of(layer)]

    def key_value_sources(self) -> frozenset[int]:
        """Return the layers whose keys and values others attend to, too."""
        sources = self._sources_by_window()
        shared = range(self.num_layers - self.num_kv_shared_layers, self.num_layers)

        return frozenset(sources[self.window_of(layer)] for layer in shared)

    def _sources_by_window(self) -> dict[int | None, int]:
        """Return the last layer of each window among those that have keys and values of their own."""
        return {self.window_of(layer): layer for layer in range(self.num_layers - self.num_kv_shared_layers)}

    def shapes(self) -> Shapes:
        """Return the names and shapes of the parameters of a :class:`~lading.families.nn.decoder_lm.DecoderLM`."""
        table = (self.vocab_size, self.model_dim)
        head = "model.embed_tokens.weight" if self.tied_embeddings else table

        return under("model", self._decoder_shapes()) | {"lm_head.weight": head}

    def _decoder_shapes(self) -> Shapes:
        found: Shapes = {"embed_tokens.weight": (self.vocab_size, self.model_dim)}
        for i in range(self.num_layers):
            found |= under(f"layers.{i}", self._layer_shapes(i))

        return found | {"norm.weight": (self.model_dim,)}

    def _layer_shapes(self, layer: int) -> Shapes:
        dim, experts = self.model_dim, self.experts_of(layer)
        if self.latent is None:
            found = under("self_attn", self._attention_shapes(has_keys=self.key_value_source_of(layer) is None))
        else:
            found = under("self_attn", self.latent.shapes(dim, self.num_attn_heads))
        if experts is None:
            found |= under(self.ffn_name, gated_shapes(dim, self.ffn_inner_dim_of(layer), bias=self.ffn_bias))
        else:
            found |= under(self.ffn_name, experts.shapes(dim))

        norms = {
            "before": ("input", "post_attention"),
            "after": ("post_attention", "post_feedforward"),
            "both": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
        }

        return found | {f"{name}_layernorm.weight": (dim,) for name in norms[self.norms]}

    def _attention_shapes(self, *, has_keys: bool) -> Shapes:
        dim, head = self.model_dim, self.attn_head_dim
        queries, keys = self.num_attn_heads * head, self.num_key_value_heads * head
        found = projection("q_proj", dim, queries, bias=self.qkv_proj_bias)
        if has_keys:
            found |= projection("k_proj", dim, keys, bias=self.qkv_proj_bias)
            found |= projection("v_proj", dim, keys, bias=self.qkv_proj_bias)
        found |= projection("o_proj", queries, dim, bias=self.output_proj_bias)
        if self.q_norm:
            found["q_norm.weight"] = (queries if self.norm_whole else head,)
        if self.k_norm and has_keys:
            found["k_norm.weight"] = (keys if self.norm_whole else head,)

        return found
