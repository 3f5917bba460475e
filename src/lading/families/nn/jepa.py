"""The modules of JEPA, and their random initialization.

The names of parameters are those of Hugging Face checkpoints of I-JEPA, and fairseq2's of what those do not have.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lading.families.jepa_config import JepaClassifierConfig, JepaConfig, checked_classifier, encoder_spec
from lading.families.nn.attention import AttentionMask
from lading.families.nn.encoder_blocks import LayerStack
from lading.families.nn.uninitialized import LayerNorm, Linear
from lading.families.nn.vision import VisionLayer, VisionTransformer, init_vision
from lading.families.nn.vision_spec import VisionSpec


class Jepa(VisionTransformer):
    """The encoder of a JEPA model; its parameters are uninitialized."""

    def __init__(self, config: JepaConfig) -> None:
        super().__init__(encoder_spec(config.encoder_config))


class CrossAttentionLayer(VisionLayer):
    """A layer whose inputs attend to another sequence, which alone is normalized before."""

    def forward(self, x: Tensor, mask: AttentionMask, memory: Tensor | None = None) -> Tensor:
        """Map (N, Q, model_dim), which attends to ``memory`` (N, S, model_dim) → the shape of ``x``."""
        memory = self.layernorm_before(x if memory is None else memory)

        return self._feed_forward(x + self.attention(x, mask, memory))


class AttentivePooler(nn.Module):
    """Trained queries that attend to the patches of an input (https://arxiv.org/abs/2404.08471)."""

    def __init__(self, config: JepaClassifierConfig, spec: VisionSpec) -> None:
        super().__init__()

        depth = config.pool_depth

        self.query_tokens = nn.Parameter(torch.empty(1, config.num_queries, spec.model_dim))
        # As in fairseq2, this layer drops attention weights only.
        plain = replace(spec, dropout_p=0.0, droppath_p=0.0)
        self.decoder_layer = CrossAttentionLayer(plain, depth + 1, project=config.decoder_projection)
        self.encoder = LayerStack(VisionLayer(spec, i) for i in range(1, depth + 1)) if depth > 1 else None
        self.layernorm = LayerNorm(spec.model_dim, eps=spec.norm_eps) if depth > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, S, model_dim) → (N, num_queries, model_dim)."""
        mask = AttentionMask()
        if self.encoder is not None and self.layernorm is not None:
            x = self.layernorm(self.encoder(x, mask))
        y: Tensor = self.decoder_layer(self.query_tokens.expand(x.size(0), -1, -1), mask, x)

        return y


class JepaClassifier(nn.Module):
    """The encoder of a JEPA model with an attentive classifier; its parameters are uninitialized."""

    def __init__(self, config: JepaClassifierConfig) -> None:
        super().__init__()

        spec = checked_classifier(config)

        self.jepa = VisionTransformer(spec)
        self.attn_pooler = AttentivePooler(config, spec)
        self.head_proj = Linear(spec.model_dim, config.num_classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Classify images (N, C, height, width), or videos (N, C, depth, height, width) → logits (N, num_classes).

        With several queries, the logits of each: (N, num_queries, num_classes).

        :raises ValueError: the input has another number of dimensions or channels, or is smaller than a patch.
        """
        logits: Tensor = self.head_proj(self.attn_pooler(self.jepa(pixel_values)).squeeze(1))

        return logits.clone()  # because FSDP warns about views, which a projection of three dims with a bias returns


def init_jepa(model: nn.Module, config: JepaConfig | JepaClassifierConfig, name: str, parameter: Tensor) -> None:
    """Initialize a parameter of a model with or without classifier."""
    init_vision(model, name, parameter, std=config.encoder_config.init_std)
